"""gradsmith::rms_norm and gradsmith::add_rms_norm: schemas, checks, fakes, autograd, backends."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.registration import differentiable

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = frozenset((*FLOATS, torch.float64))
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


def check_norm(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """What every norm over the last dimension asks of its arguments."""
    dtype, shape, device = x.dtype, x.shape, x.device
    if dtype not in _DTYPES:
        raise TypeError(_not_a_float(op, "x", dtype))
    if not shape:
        raise ValueError(f"{op}: x is (); it needs a last dimension to normalise over")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            if tensor.dtype not in _DTYPES:
                raise TypeError(_not_a_float(op, name, tensor.dtype))
            if torch.float64 in (dtype, tensor.dtype):
                raise TypeError(f"{op}: float64 does not mix: x is {dtype}, {name} {tensor.dtype}")
        if tensor.shape != shape[-1:]:
            raise ValueError(
                f"{op}: {name} must have the size of x's last dimension: x is {tuple(shape)}, "
                f"{name} is {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: x is on {device}, {name} on {tensor.device}")
    if residual is not None:
        if residual.shape != shape or residual.device != device:
            raise ValueError(
                f"{op}: residual must be like x, which is {tuple(shape)} on {device}; "
                f"it is {tuple(residual.shape)} on {residual.device}"
            )
        if residual.dtype != dtype:
            raise TypeError(f"{op}: residual is {residual.dtype}, x is {dtype}")
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}; it must be > 0")


def _not_a_float(op: str, name: str, dtype: torch.dtype) -> str:
    return f"{op}: {name} is {dtype}; it must be float32, bfloat16, float16 or float64"


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
