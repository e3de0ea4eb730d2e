"""Rotary embedding in plain PyTorch: the definition. In float32, or in float64 for float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(
    tensors: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> list[Tensor]:
    """Each (B, S, heads, D) tensor rotated; `transposed`: by the transposed matrices, which is the
    gradient. The rotation of a pair (a, b) is

        a' = a * cos_a - b * sin_a,    b' = a * sin_b + b * cos_b
    """
    return [_rotate(x, cos, sin, interleaved, transposed) for x in tensors]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    size = cos.shape[-1]
    a, b = _pairs(x[..., :size].to(compute), interleaved)
    cos_a, cos_b = _pairs(cos.to(compute).unsqueeze(2), interleaved)
    sin_a, sin_b = _pairs(sin.to(compute).unsqueeze(2), interleaved)
    if transposed:
        sin_a, sin_b = -sin_b, -sin_a
    rotated = (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    joined = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return torch.cat((joined.to(x.dtype), x[..., size:]), -1).contiguous()


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
