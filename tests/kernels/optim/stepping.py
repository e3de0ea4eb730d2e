"""Parameters, steps of an optimizer with gradients that are the same in every run, their result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def parameters(
    dtype: torch.dtype = torch.float32, *, shapes: Iterable[Sequence[int]]
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def steps(
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    count: int,
    seed: int = 1,
    scale: float = 1.0,
) -> list[Tensor]:
    """Takes `count` steps and returns the parameters."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in params:
            # In float32 whatever the dtype, so that all runs have the same gradients.
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()
    return params


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements in float64, one tensor after the other."""
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])
