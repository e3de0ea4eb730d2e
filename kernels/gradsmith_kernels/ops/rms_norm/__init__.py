"""Root-mean-square layer normalisation, with an optional fused residual add."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from gradsmith_kernels.ops.rms_norm import op

__all__ = ["rms_norm"]


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = ...,
    offset: float = ...,
    residual: None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = ...,
    offset: float = ...,
    residual: Tensor,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

        y = h * rsqrt(mean(h^2) + eps) * (offset + weight),    h = x, or x + residual

    Everything after h is computed in float32 and rounded once; h itself is rounded to x's dtype, so
    that it is the same tensor as `x + residual`.

    Args:
        x: (..., N), float32, bfloat16 or float16 (float64: reference backend only). Rows may have
            any stride; where the elements of a row are not adjacent, x is copied.
        weight: (N,), of x's dtype or another of those dtypes.
        eps: added to the mean square; > 0.
        offset: added to weight, in float32; Gemma's models have 1.0, so that weights near 0 scale
            by nearly 1.
        residual: like x. With it, the result is (y, h), both differentiable.
        backend: reference, cpu or triton; None chooses by device, see `backends`.

    Returns:
        y, contiguous, of x's shape and dtype; with `residual`, (y, h).

    The same inputs give the same bits, forward and backward, for any number of threads: weight's
    gradient is summed in float32 over blocks of rows that depend on the shape alone. There is no
    second derivative.

    Raises:
        ValueError: shapes, devices, eps or offset do not fit.
        TypeError: a dtype is not one of the above.
        BackendError: the backend cannot run here.
    """
    y: Tensor
    h: Tensor
    if residual is None:
        y, _ = op.RMS_NORM(x, weight, eps, offset, backend)
        return y
    y, h, _ = op.ADD_RMS_NORM(x, residual, weight, eps, offset, backend)
    return y, h
