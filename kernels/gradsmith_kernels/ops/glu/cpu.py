"""Gated linear units on the CPU: csrc/glu."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.common.native import DTYPE_CODES, as_rows, shape_as_rows

ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # of csrc/glu/glu.h


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y = activation(gate) * up, contiguous, of gate's shape."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    (gate_rows, gate_stride), (up_rows, up_stride) = as_rows(gate), as_rows(up)
    _native.glu_forward(
        (gate_rows.data_ptr(), gate_stride),
        (up_rows.data_ptr(), up_stride),
        y.data_ptr(),
        *shape_as_rows(gate, up),
        ACTIVATION_CODES[activation],
        DTYPE_CODES[gate.dtype],
        torch.get_num_threads(),
    )
    return y


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """dgate and dup, contiguous, of gate's shape; (0,) for one that is not needed."""
    dgate, dup = (gate.new_empty(gate.shape if need else 0) for need in (need_dgate, need_dup))
    if gate.numel() == 0:
        return dgate, dup
    (dy_rows, dy_stride), (gate_rows, gate_stride) = as_rows(dy), as_rows(gate)
    up_rows, up_stride = as_rows(up)
    _native.glu_backward(
        (dy_rows.data_ptr(), dy_stride),
        (gate_rows.data_ptr(), gate_stride),
        (up_rows.data_ptr(), up_stride),
        (dgate.data_ptr() if need_dgate else 0, dup.data_ptr() if need_dup else 0),
        *shape_as_rows(dy, gate, up),
        ACTIVATION_CODES[activation],
        DTYPE_CODES[gate.dtype],
        torch.get_num_threads(),
    )
    return dgate, dup
