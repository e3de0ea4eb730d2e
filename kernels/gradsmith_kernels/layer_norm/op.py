"""gradsmith::layer_norm and gradsmith::add_layer_norm: schemas, fakes, autograd, backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.registration import register, without_second_derivative
from gradsmith_kernels.rms_norm.op import FLOATS, check_norm

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
    return x.new_empty(x.shape)


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


def _gradients(
    ctx: Any, dy: Tensor, dh: Tensor | None, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias; None for what is not needed."""
    h, weight, bias, statistics = ctx.saved_tensors
    gradients = torch.ops.gradsmith.layer_norm_backward.default(
        dy, dh, h, weight, bias, statistics, needed, ctx.backend
    )
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, statistics = torch.ops.gradsmith.layer_norm.default(x, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.backend = backend
        return y, statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, None, ctx.needs_input_grad[:3]), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, h, statistics = torch.ops.gradsmith.add_layer_norm.default(
                x, residual, weight, bias, eps, backend
            )
        ctx.save_for_backward(h, weight, bias, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.backend = backend
        return y, h, statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias = ctx.needs_input_grad[:4]
        dx, dweight, dbias = _gradients(ctx, dy, dh, [x or residual, weight, bias])
        return dx, dx, dweight, dbias, None, None


def _layer_norm_autograd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    apply: Any = _LayerNorm.apply  # untyped in torch
    y, statistics = apply(x, weight, bias, eps, backend)
    return y, statistics


def _add_layer_norm_autograd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    apply: Any = _AddLayerNorm.apply  # untyped in torch
    y, h, statistics = apply(x, residual, weight, bias, eps, backend)
    return y, h, statistics


register("layer_norm", _layer_norm, _layer_norm_fake, _layer_norm_autograd)
register("add_layer_norm", _add_layer_norm, _add_layer_norm_fake, _add_layer_norm_autograd)
register(
    "layer_norm_backward",
    _layer_norm_backward,
    _layer_norm_backward_fake,
    without_second_derivative(torch.ops.gradsmith.layer_norm_backward.default, "layer_norm has"),
)
