"""gradsmith::glu: schemas, checks, fakes, autograd, backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.registration import (
    differentiable,
    register,
    without_second_derivative,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
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


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.gradsmith.glu.default(gate, up, activation, backend)
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_dgate, need_dup, *_ = ctx.needs_input_grad
        dgate, dup = torch.ops.gradsmith.glu_backward.default(
            dy, *ctx.saved_tensors, ctx.activation, need_dgate, need_dup, ctx.backend
        )
        return dgate if need_dgate else None, dup if need_dup else None, None, None


def _glu_autograd(gate: Tensor, up: Tensor, activation: str, backend: str | None = None) -> Tensor:
    y: Tensor
    if differentiable(gate, up):
        apply: Any = _Glu.apply  # untyped in torch
        y = apply(gate, up, activation, backend)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        y = torch.ops.gradsmith.glu.default(gate, up, activation, backend)
    return y


register("glu", _glu, _glu_fake, _glu_autograd)
register(
    "glu_backward",
    _glu_backward,
    _glu_backward_fake,
    without_second_derivative(torch.ops.gradsmith.glu_backward.default, "swiglu and geglu have"),
)
