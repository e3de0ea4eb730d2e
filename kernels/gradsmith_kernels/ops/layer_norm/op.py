"""gradsmith::layer_norm and gradsmith::add_layer_norm: schemas, fakes, autograd, backends.

Rows (...) of N elements: x, residual, y, h, dy, dh, dx (..., N); weight, bias, dweight, dbias (N,);
statistics (..., 3), float32 (float64 for float64). h is x, or x + residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.norm import check_norm
from gradsmith_kernels.ops.common.registration import FLOATS, differentiable

OP = Op(
    "layer_norm",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

# statistics: (..., 3) for rows (..., N): the mean, what its rounding left, rstd.
# needed: whether dx, dweight and dbias are; one that is not is returned empty.
torch.library.define(
    "gradsmith::layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str? backend=None)"
    " -> (Tensor y, Tensor statistics)",
)
torch.library.define(
    "gradsmith::add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str? backend=None)"
    " -> (Tensor y, Tensor h, Tensor statistics)",
)
torch.library.define(
    "gradsmith::layer_norm_backward",
    "(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, Tensor statistics,"
    " bool[3] needed, str? backend=None) -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_statistics(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((*x.shape[:-1], 3), dtype=dtype)


def empty_gradients(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for dx, dweight and dbias."""
    dx = _empty(h) if needed[0] else h.new_empty(0)
    dweight = _empty(weight) if weight is not None and needed[1] else h.new_empty(0)
    dbias = _empty(bias) if bias is not None and needed[2] else h.new_empty(0)
    return dx, dweight, dbias


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    check_norm("layer_norm", x, None, eps, weight, bias)
    module = OP.choose(backend, x.device, x.dtype)
    y, _, statistics = module.forward(x, None, weight, bias, eps)
    return y, statistics


def _layer_norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    check_norm("layer_norm", x, None, eps, weight, bias)
    return _empty(x), _empty_statistics(x)


def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm("layer_norm", x, residual, eps, weight, bias)
    result: tuple[Tensor, Tensor, Tensor] = OP.choose(backend, x.device, x.dtype).forward(
        x, residual, weight, bias, eps
    )
    return result


def _add_layer_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm("layer_norm", x, residual, eps, weight, bias)
    return _empty(x), _empty(x), _empty_statistics(x)


def _layer_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    needed: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = OP.choose(backend, h.device, h.dtype).backward(
        dy, dh, h, weight, bias, statistics, needed
    )
    return result


def _layer_norm_backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    needed: list[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(h, weight, bias, needed)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of both operators: the last output but the statistics is h where there is a residual."""
    *tensors, weight, bias, _, ctx.backend = inputs
    *_, h, statistics = output
    ctx.save_for_backward(h if len(tensors) > 1 else tensors[0], weight, bias, statistics)
    ctx.mark_non_differentiable(statistics)


def _gradients(
    ctx: Any,
    saved: tuple[Tensor, ...],
    dy: Tensor | None,
    dh: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias; None for what is not needed."""
    if dy is None:  # nobody used y
        dy = torch.zeros_like(saved[0])
    dx, dweight, dbias = BACKWARD(dy, dh, *saved, needed, ctx.backend)
    return (
        dx if needed[0] else None,
        dweight if needed[1] else None,
        dbias if needed[2] else None,
    )


def _of_layer_norm(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor, _: None
) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, saved, dy, None, ctx.needs_input_grad[:3]), None, None


def _of_add_layer_norm(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor | None, dh: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    x, residual, weight, bias = ctx.needs_input_grad[:4]
    dx, dweight, dbias = _gradients(ctx, saved, dy, dh, (x or residual, weight, bias))
    return dx, dx, dweight, dbias, None, None


LAYER_NORM = differentiable("layer_norm", _layer_norm, _layer_norm_fake, _setup, _of_layer_norm)
ADD_LAYER_NORM = differentiable(
    "add_layer_norm",
    _add_layer_norm,
    _add_layer_norm_fake,
    _setup,
    _of_add_layer_norm,
    title="layer_norm",
)
BACKWARD = differentiable("layer_norm_backward", _layer_norm_backward, _layer_norm_backward_fake)
