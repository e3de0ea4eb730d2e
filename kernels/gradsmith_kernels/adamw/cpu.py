"""AdamW on the CPU: csrc/adamw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.native import DTYPE_CODES


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
    rows = []
    keep = []  # contiguous copies, alive until the kernel has run
    copies = []  # (original, contiguous copy) to write back
    for p, g, m, v, t in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        if not g.is_contiguous():
            g = g.contiguous()
            keep.append(g)
        written = [p, m, v]
        for i, tensor in enumerate(written):
            if not tensor.is_contiguous():
                written[i] = tensor.contiguous()
                copies.append((tensor, written[i]))
        rows.append(
            (
                written[0].data_ptr(),
                g.data_ptr(),
                written[1].data_ptr(),
                written[2].data_ptr(),
                p.numel(),
                DTYPE_CODES[p.dtype],
                DTYPE_CODES[g.dtype],
                t.data_ptr(),
            )
        )
    _native.adamw_step(rows, lr, beta1, beta2, eps, weight_decay, torch.get_num_threads())
    for original, copy in copies:
        original.copy_(copy)
