"""AdamW in plain PyTorch: the definition. Computed in float32, or in float64 for float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    for param, grad, m, v, count in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        t = count.add_(1).item()
        p = param.to(torch.promote_types(param.dtype, torch.float32))
        g = grad.to(p.dtype)
        m.add_(g - m, alpha=1 - beta1)
        v.add_(g * g - v, alpha=1 - beta2)
        denominator = v.sqrt() / math.sqrt(1 - beta2**t) + eps
        update = lr / (1 - beta1**t) * (m / denominator)
        param.copy_(p - lr * weight_decay * p - update)
