"""Rotary embedding on the CPU: csrc/rope."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.common.native import DTYPE_CODES, adjacent


def rotate(
    tensors: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> list[Tensor]:
    """The tensors (B, S, H, D) rotated by cos and sin (B or 1, S, R); contiguous."""
    y = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    x = [adjacent(tensor) for tensor in tensors]
    cos, sin = adjacent(cos), adjacent(sin)
    batch, length, _, size = x[0].shape
    _native.rope(
        [(_view(a), b.data_ptr(), a.shape[2]) for a, b in zip(x, y, strict=True)],
        _table(cos),
        _table(sin),
        batch,
        length,
        size,
        cos.shape[2],
        interleaved,
        transposed,
        DTYPE_CODES[x[0].dtype],
        DTYPE_CODES[cos.dtype],
        torch.get_num_threads(),
    )
    return y


def _view(x: Tensor) -> tuple[int, int, int, int]:
    """Address, and the strides of batch, row and head."""
    batch, row, head, _ = x.stride()
    return x.data_ptr(), batch, row, head


def _table(table: Tensor) -> tuple[int, int, int]:
    """Address, and the strides of batch (0 where all sequences share one) and row."""
    return table.data_ptr(), table.stride(0) if table.shape[0] > 1 else 0, table.stride(1)
