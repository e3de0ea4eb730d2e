"""gradsmith::glu: schemas, checks, fakes, autograd, backends.

gate, up, y, dy, dgate, dup: (..., N), of one dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.registration import FLOATS, differentiable

# The activation -> the public function that takes it, for messages.
ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu"}
OP = Op(
    "glu",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

torch.library.define(
    "gradsmith::glu",
    "(Tensor gate, Tensor up, str activation, str? backend=None) -> Tensor",
)
# A gradient that is not needed has the shape (0,).
torch.library.define(
    "gradsmith::glu_backward",
    "(Tensor dy, Tensor gate, Tensor up, str activation, bool need_dgate, bool need_dup,"
    " str? backend=None) -> (Tensor dgate, Tensor dup)",
)


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    """Raises TypeError or ValueError for arguments that do not fit."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"glu: activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
        )
    name = ACTIVATIONS[activation]
    if gate.dtype not in (*FLOATS, torch.float64):
        raise TypeError(
            f"{name}: gate is {gate.dtype}; it must be float32, bfloat16, float16 or float64"
        )
    if up.dtype != gate.dtype:
        raise TypeError(f"{name}: up is {up.dtype}, gate is {gate.dtype}; they must agree")
    if gate.dim() == 0:
        raise ValueError(f"{name}: gate has no dimension; it must be (..., N)")
    if up.shape != gate.shape:
        raise ValueError(
            f"{name}: up must have gate's shape: gate is {tuple(gate.shape)}, up is "
            f"{tuple(up.shape)}"
        )
    if up.device != gate.device:
        raise ValueError(f"{name}: gate is on {gate.device}, up on {up.device}")


def _glu(gate: Tensor, up: Tensor, activation: str, backend: str | None = None) -> Tensor:
    _check(gate, up, activation)
    y: Tensor = OP.choose(backend, gate.device, gate.dtype).forward(gate, up, activation)
    return y


def _glu_fake(gate: Tensor, up: Tensor, activation: str, backend: str | None = None) -> Tensor:
    _check(gate, up, activation)
    return gate.new_empty(gate.shape)


def _glu_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    need_dgate: bool,
    need_dup: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    module = OP.choose(backend, gate.device, gate.dtype)
    gradients: tuple[Tensor, Tensor] = module.backward(
        dy, gate, up, activation, need_dgate, need_dup
    )
    return gradients


def _glu_backward_fake(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    need_dgate: bool,
    need_dup: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    dgate = gate.new_empty(gate.shape if need_dgate else (0,))
    return dgate, gate.new_empty(gate.shape if need_dup else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    gate, up, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _of_glu(ctx: Any, saved: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    need_dgate, need_dup, *_ = ctx.needs_input_grad
    dgate, dup = BACKWARD(dy, *saved, ctx.activation, need_dgate, need_dup, ctx.backend)
    return dgate if need_dgate else None, dup if need_dup else None, None, None


TITLE = "glu (swiglu, geglu)"
GLU = differentiable("glu", _glu, _glu_fake, _setup, _of_glu, title=TITLE)
BACKWARD = differentiable("glu_backward", _glu_backward, _glu_backward_fake, title=TITLE)
