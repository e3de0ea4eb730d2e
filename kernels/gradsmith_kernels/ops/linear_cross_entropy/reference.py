"""Linear cross-entropy in plain PyTorch: the definition. Computed in float64.

Here, as in the other backends, hidden is (N, C), and every target counts: the operator has taken
out those to ignore.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRADIENTS_IN_FORWARD = False
TILE_ROOM = 15  # rows after a gradient's own that a backend's whole tiles may write to


@dataclass(frozen=True)
class Options:
    label_smoothing: float
    z_loss: float
    softcap: float
    chunk: int | None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    if options.softcap > 0:
        z = options.softcap * torch.tanh(z / options.softcap)
    return z


def _chunks(rows: int, options: Options) -> list[slice]:
    step = options.chunk or max(rows, 1)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Each token's loss and lse, both float64."""
    loss, lse = (hidden.new_empty(len(hidden), dtype=torch.float64) for _ in range(2))
    s = options.label_smoothing
    for rows in _chunks(len(hidden), options):
        z = _logits(hidden[rows], weight, bias, options)
        lse[rows] = torch.logsumexp(z, -1)
        at_target = z.gather(1, target[rows, None]).squeeze(1)
        smooth = s * (lse[rows] - z.mean(-1)) if s > 0 else 0.0
        loss[rows] = (1 - s) * (lse[rows] - at_target) + smooth
    return loss + options.z_loss * lse.square(), lse


def backward(
    upstream: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias. With upstream g and p = exp(z - lse), before the softcap:

    dz = g * (p * (1 + 2 * z_loss * lse) - (1 - s) * onehot(target) - s / V) * (1 - (z / softcap)^2)
    """
    s = options.label_smoothing
    dhidden = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=torch.float64)
    dweight = hidden.new_zeros(weight.shape if needs[1] else 0, dtype=torch.float64)
    dbias = hidden.new_zeros(weight.shape[:1] if needs[2] else 0, dtype=torch.float64)
    for rows in _chunks(len(hidden), options):
        z = _logits(hidden[rows], weight, bias, options)
        p = (z - lse[rows, None]).exp()
        dz = p * (1 + 2 * options.z_loss * lse[rows, None]) - s / len(weight)
        dz.scatter_add_(1, target[rows, None], dz.new_full((len(z), 1), s - 1))
        dz *= upstream[rows, None]
        if options.softcap > 0:
            dz *= 1 - (z / options.softcap).square()
        if needs[0]:
            dhidden[rows] = dz @ weight.double()
        if needs[1]:
            dweight += dz.T @ hidden[rows].double()
        if needs[2]:
            dbias += dz.sum(0)
    return dhidden.to(hidden.dtype), dweight.to(hidden.dtype), dbias.to(hidden.dtype)
