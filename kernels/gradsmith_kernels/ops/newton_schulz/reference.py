"""Newton-Schulz in plain PyTorch: the definition. Computed in float32, or float64 for float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def newton_schulz(x: Tensor, steps: int, coefficients: Sequence[float], eps: float) -> Tensor:
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    y: Tensor = (x.mT if tall else x).to(torch.promote_types(x.dtype, torch.float32))
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if tall else y).to(x.dtype).contiguous()
