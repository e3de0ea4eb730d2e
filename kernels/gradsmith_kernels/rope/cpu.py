"""Rotary embedding on the CPU: csrc/rope."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.native import DTYPE_CODES


def _adjacent(x: Tensor) -> Tensor:
    """x with the elements of its last dimension next to each other; copied only where they are not.

    The caller keeps it for as long as its address is in use.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate(
    tensors: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> list[Tensor]:
    y = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    x = [_adjacent(tensor) for tensor in tensors]
    cos, sin = _adjacent(cos), _adjacent(sin)
    batch, length, _, size = x[0].shape
    views = [
        ((a.data_ptr(), *a.stride()[:3]), b.data_ptr(), a.shape[2])
        for a, b in zip(x, y, strict=True)
    ]
    tables = [
        (table.data_ptr(), table.stride(0) if table.shape[0] > 1 else 0, table.stride(1))
        for table in (cos, sin)
    ]
    _native.rope(
        views,
        tables[0],
        tables[1],
        (batch, length, size, cos.shape[2]),
        interleaved,
        transposed,
        DTYPE_CODES[x[0].dtype],
        DTYPE_CODES[cos.dtype],
        torch.get_num_threads(),
    )
    return y
