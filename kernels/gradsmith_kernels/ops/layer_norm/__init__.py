"""Layer normalisation, with an optional fused residual add."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from gradsmith_kernels.ops.layer_norm import op

__all__ = ["layer_norm"]


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: Tensor,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

        y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias,    h = x, or x + residual

    var is the biased variance, mean((h - mean(h))^2). Everything after h is computed in float32 and
    rounded once; h itself is rounded to x's dtype, so that it is the same tensor as `x + residual`.
    The mean is taken off in two parts, itself and what its rounding left: rows whose mean is large
    beside their deviation lose nothing to it, forward or backward.

    Args:
        x: (..., N), float32, bfloat16 or float16 (float64: reference backend only). Rows may have
            any stride; where the elements of a row are not adjacent, x is copied.
        weight: (N,), of x's dtype or another of those dtypes; None is 1.
        bias: likewise, its dtype may be a third one; None is 0.
        eps: added to the variance; > 0.
        residual: like x. With it, the result is (y, h), both differentiable.
        backend: reference, cpu or triton; None chooses by device, see `backends`.

    Returns:
        y, contiguous, of x's shape and dtype; with `residual`, (y, h).

    The same inputs give the same bits, forward and backward, for any number of threads: the
    gradients of weight and bias are summed in float32 over blocks of rows that depend on the shape
    alone. A gradient that nobody asks for is not computed. There is no second derivative.

    Raises:
        ValueError: shapes, devices or eps do not fit.
        TypeError: a dtype is not one of the above.
        BackendError: the backend cannot run here.
    """
    y: Tensor
    h: Tensor
    if residual is None:
        y, _ = op.LAYER_NORM(x, weight, bias, eps, backend)
        return y
    y, h, _ = op.ADD_LAYER_NORM(x, residual, weight, bias, eps, backend)
    return y, h
