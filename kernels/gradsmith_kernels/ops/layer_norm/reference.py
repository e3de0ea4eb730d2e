"""LayerNorm in plain PyTorch: the definition.

Computed in float64 and rounded at the end: in float32, without fused multiply-adds, it would be
further from the truth than torch's own kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (x itself without a residual) and the statistics of each row, (..., 3):

    the mean, what its rounding left, and rstd = 1 / sqrt(var + eps).
    """
    h = x if residual is None else (x + residual).contiguous()
    centre = h.double().mean(-1, keepdim=True)
    centred = h.double() - centre
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    mean = centre.to(torch.promote_types(x.dtype, torch.float32))
    statistics = torch.cat((mean, (centre - mean).to(mean.dtype), rstd.to(mean.dtype)), -1)
    return y.to(x.dtype).contiguous(), h, statistics


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, those that are needed; the others are empty. Of bias only the dtype
    counts. With n = (h - mean) * rstd (the normalised row) and g = dy * weight:

    dx = rstd * (g - mean(g) - n * mean(g * n)) + dh,
    dweight = sum over the rows of dy * n,    dbias = sum over the rows of dy
    """
    mean, rest, rstd = statistics.double().split(1, -1)
    normalised = (h.double() - mean - rest) * rstd
    dy = dy.double()
    over_rows = tuple(range(dy.dim() - 1))
    dx, dweight, dbias = h.new_empty(0), h.new_empty(0), h.new_empty(0)
    if needed[0]:
        g = dy if weight is None else dy * weight
        along = normalised * (g * normalised).mean(-1, keepdim=True)
        dx = rstd * (g - g.mean(-1, keepdim=True) - along)
        if dh is not None:
            dx = dx + dh
        dx = dx.to(h.dtype).contiguous()
    if weight is not None and needed[1]:
        dweight = (dy * normalised).sum(over_rows).to(weight.dtype)
    if bias is not None and needed[2]:
        dbias = dy.sum(over_rows).to(bias.dtype)
    return dx, dweight, dbias
