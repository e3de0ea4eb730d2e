"""One AdamW step over many tensors, in place; the optimizer is `gradsmith_kernels.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import gradsmith_kernels.adamw.op  # noqa: F401 - registers gradsmith::adamw_

__all__ = ["adamw_"]


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    backend: str | None = None,
) -> None:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), in place.

        m = m + (1 - beta1) (g - m)
        v = v + (1 - beta2) (g^2 - v)
        p = p - lr * weight_decay * p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Each element's p, g, m and v are read once and p, m and v written once. The arithmetic is
    float32; a bfloat16 parameter is rounded to nearest even when it is written.

    Args:
        params: float32 or bfloat16, any shape (float64: reference backend, with float64 moments).
        grads: like params in shape and device; float32 or bfloat16, not necessarily params' dtype.
        exp_avgs: m, like params in shape and device, float32.
        exp_avg_sqs: v, likewise.
        steps: the number of steps that each tensor has behind it, one float32 element on the CPU;
            raised by one. t is the raised number.
        lr, beta1, beta2, eps, weight_decay: see the formula.
        backend: reference, cpu or triton; None chooses by device.

    Raises:
        ValueError: numbers of tensors, shapes or devices do not fit.
        TypeError: a dtype or layout is not one of the above.
        BackendError: the backend cannot run here.
    """
    torch.ops.gradsmith.adamw_.default(
        params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, backend
    )
