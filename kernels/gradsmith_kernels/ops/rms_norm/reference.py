"""RMSNorm in plain PyTorch: the definition. Computed in float32, or in float64 for float64."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (x itself without a residual) and rstd = 1 / sqrt(mean(h^2) + eps) of each row."""
    h = x if residual is None else (x + residual).contiguous()
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = h.to(compute)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd.unsqueeze(-1) * (weight.to(compute) + offset)).to(x.dtype)
    return y.contiguous(), h, rstd.contiguous()


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dweight. With n = h * rstd (the normalised row) and g = dy * (offset + weight):

    dx = rstd * (g - n * mean(g * n)) + dh,    dweight = sum over the rows of dy * n
    """
    compute = rstd.dtype
    dy = dy.to(compute)
    normalised = h.to(compute) * rstd.unsqueeze(-1)
    g = dy * (weight.to(compute) + offset)
    dx = rstd.unsqueeze(-1) * (g - normalised * (g * normalised).mean(-1, keepdim=True))
    if dh is not None:
        dx = dx + dh.to(compute)
    dx = dx.to(h.dtype).contiguous()
    if not need_dweight:
        return dx, weight.new_empty(0)
    return dx, (dy * normalised).sum(tuple(range(dy.dim() - 1))).to(weight.dtype)
