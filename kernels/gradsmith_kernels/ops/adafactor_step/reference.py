"""Adafactor in plain PyTorch: the definition. In float32, or in float64 for float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsmith_kernels.ops.adafactor_step.tensors import Options, Tensors


class Plan:
    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def step(
        self, grads: Sequence[Tensor], options: Options, scale: float, zero_grads: bool
    ) -> None:
        for i, grad in enumerate(grads):
            self._step_one(i, grad, options, scale)
            if zero_grads:
                grad.zero_()

    def _step_one(self, i: int, grad: Tensor, o: Options, scale: float) -> None:
        """Steps params[i] and its states in place, and raises its count of steps."""
        columns = self._tensors
        p, row, col = columns.params[i], columns.row_vars[i], columns.col_vars[i]
        t = columns.steps[i].add_(1).item()
        if p.numel() == 0:
            return
        compute = torch.promote_types(p.dtype, torch.float32)
        weight = columns.masters[i] if columns.masters else p
        x = weight.to(compute, copy=True)
        if columns.compensations:
            x += columns.compensations[i]
        g = grad.to(compute) * scale
        share, least = t**o.beta2_decay, o.least_root(compute)
        if p.ndim >= 2:
            row.lerp_(_mean_square(g, -1).to(compute), share)
            col.lerp_(_mean_square(g, -2).to(compute), share)
            root = (row / row.mean(-2, keepdim=True).clamp(min=least)).sqrt() * col.sqrt()
        else:
            row.lerp_(g * g, share)
            root = row.sqrt()
        u = g / root.clamp(min=least)
        alpha = max(o.eps2, rms(x)) * min(o.lr, 1 / math.sqrt(t))
        x.sub_(x, alpha=o.lr * o.weight_decay).sub_(u, alpha=alpha / max(1.0, rms(u) / o.d))
        if o.l1:
            x = x.sign() * (x.abs() - o.lr * o.l1).clamp(min=0)
        if columns.masters:
            columns.masters[i].copy_(x)
        p.copy_(x)
        if columns.compensations:
            columns.compensations[i].copy_(x - p)


def _mean_square(x: Tensor, dim: int) -> Tensor:
    return x.double().square().mean(dim, keepdim=True)


def rms(x: Tensor) -> float:
    """The root of the mean square of all elements."""
    return math.sqrt(x.double().square().mean().item())
