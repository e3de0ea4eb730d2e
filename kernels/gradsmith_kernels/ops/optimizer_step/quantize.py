"""8-bit block-wise states: codes of the dynamic map, with a scale for each 256 elements.

The map has 256 values in [-1, 1] (signed) or [0, 1]: seven decades below 1, each with twice as many
evenly spaced values as the one below it, and 0 and 1 (Dettmers 2015, arXiv:1511.04561; block-wise:
Dettmers et al. 2022, arXiv:2110.02861). It is bitsandbytes' map, so states can be exchanged.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gradsmith_kernels.ops.optimizer_step.tensors import STATE_BLOCK


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values in ascending order, float32 on the CPU. Do not write to it."""
    values = [0.0, 1.0]
    for decade in range(7):
        cells = 2 ** (decade if signed else decade + 1)
        bounds = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        means = 10.0 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values of the codes, in their shape."""
    values = dynamic_map(signed).to(codes.device)[codes.reshape(-1).long()]
    scales = absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()]
    return (values * scales).view(codes.shape)


def encode(values: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The codes and scales of a tensor.

    Args:
        values: float32; not negative where signed is False.
        signed: which map.
        random: numbers in [0, 1), one for each element: each value then becomes one of its two
            neighbours in the map, the nearer the likelier. None: the nearest.
    """
    flat = values.detach().reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % STATE_BLOCK))
    absmax = padded.view(-1, STATE_BLOCK).abs().amax(1)
    scales = absmax.repeat_interleave(STATE_BLOCK)[: flat.numel()]
    x = torch.where(scales > 0, flat / scales, 0.0)
    table = dynamic_map(signed).to(values.device)
    if random is None:
        codes = torch.bucketize(x, (table[:-1] + table[1:]) / 2, right=True)
    else:
        size = x.abs()  # towards zero first, so that both signs are treated alike
        positive = table[table >= 0]
        low = torch.searchsorted(positive, size, right=True) - 1
        high = (low + 1).clamp(max=len(positive) - 1)
        up = random * (positive[high] - positive[low]) < size - positive[low]
        count = torch.where(up, high, low)
        codes = count
        if signed:  # -1 has no code
            codes = torch.where(x < 0, 127 - count.clamp(max=127), 127 + count)
    return codes.to(torch.uint8).view(values.shape), absmax
