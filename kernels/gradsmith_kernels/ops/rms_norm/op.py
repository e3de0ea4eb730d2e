"""gradsmith::rms_norm and gradsmith::add_rms_norm: schemas, checks, fakes, autograd, backends.

Rows (...) of N elements: x, residual, y, h, dy, dh, dx (..., N); weight, dweight (N,); rstd (...,),
float32 (float64 for float64). h is x, or x + residual.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.norm import check_norm
from gradsmith_kernels.ops.common.registration import FLOATS, differentiable

OP = Op(
    "rms_norm",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

torch.library.define(
    "gradsmith::rms_norm",
    "(Tensor x, Tensor weight, float eps, float offset, str? backend=None)"
    " -> (Tensor y, Tensor rstd)",
)
torch.library.define(
    "gradsmith::add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps, float offset, str? backend=None)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
)
torch.library.define(
    "gradsmith::rms_norm_backward",
    "(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, float offset,"
    " bool need_dweight, str? backend=None) -> (Tensor dx, Tensor dweight)",
)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> None:
    check_norm("rms_norm", x, residual, eps, weight, None)
    if not math.isfinite(offset):
        raise ValueError(f"rms_norm: offset is {offset}; it must be finite")


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _empty_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, None, weight, eps, offset)
    y, _, rstd = OP.choose(backend, x.device, x.dtype).forward(x, None, weight, eps, offset)
    return y, rstd


def _rms_norm_fake(
    x: Tensor, weight: Tensor, eps: float, offset: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, None, weight, eps, offset)
    return _empty(x), _empty_rstd(x)


def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, residual, weight, eps, offset)
    result: tuple[Tensor, Tensor, Tensor] = OP.choose(backend, x.device, x.dtype).forward(
        x, residual, weight, eps, offset
    )
    return result


def _add_rms_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, residual, weight, eps, offset)
    return _empty(x), _empty(x), _empty_rstd(x)


def _rms_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = OP.choose(backend, h.device, h.dtype).backward(
        dy, dh, h, weight, rstd, offset, need_dweight
    )
    return result


def _rms_norm_backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    return _empty(h), weight.new_empty(weight.shape if need_dweight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of both operators: the last output but rstd is h where there is a residual."""
    *tensors, weight, _, ctx.offset, ctx.backend = inputs
    *_, h, rstd = output
    ctx.save_for_backward(h if len(tensors) > 1 else tensors[0], weight, rstd)
    ctx.mark_non_differentiable(rstd)


def _gradients(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor | None, dh: Tensor | None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    h, weight, rstd = saved
    if dy is None:  # nobody used y
        dy = torch.zeros_like(h)
    dx, dweight = BACKWARD(dy, dh, h, weight, rstd, ctx.offset, need_dweight, ctx.backend)
    return dx, dweight if need_dweight else None


def _of_rms_norm(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor, _: None
) -> tuple[Tensor | None, ...]:
    dx, dweight = _gradients(ctx, saved, dy, None, ctx.needs_input_grad[1])
    return dx, dweight, None, None, None


def _of_add_rms_norm(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor | None, dh: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    dx, dweight = _gradients(ctx, saved, dy, dh, ctx.needs_input_grad[2])
    return dx, dx, dweight, None, None, None


RMS_NORM = differentiable("rms_norm", _rms_norm, _rms_norm_fake, _setup, _of_rms_norm)
ADD_RMS_NORM = differentiable(
    "add_rms_norm", _add_rms_norm, _add_rms_norm_fake, _setup, _of_add_rms_norm, title="rms_norm"
)
BACKWARD = differentiable("rms_norm_backward", _rms_norm_backward, _rms_norm_backward_fake)
