"""The linear layer's products in 16 bits on the CPU: csrc/linear."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.common.native import DTYPE_CODES, as_rows
from gradsmith_kernels.ops.linear import reference


# With fewer, packing the weight costs more than the product; of 16 rows on, torch's slow loop
# costs more than both.
def _too_few(rows: int) -> bool:
    return rows < (16 if _native.isa() == "avx2" else 64)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.numel() // max(1, x.shape[-1])
    if _too_few(rows) or not x.numel() or not weight.numel():
        return reference.forward(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], len(weight)))
    _product(y, (as_rows(x), False), (as_rows(weight), True), bias, x.shape[-1])
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (..., K), dweight (N, K) and dbias (N,); (0,) for what is not needed."""
    rows = x.numel() // max(1, x.shape[-1])
    if _too_few(rows) or not x.numel() or not weight.numel():
        return reference.backward(dy, x, weight, needs)
    of_dy, of_x = as_rows(dy), as_rows(x)
    dx = x.new_empty(x.shape if needs[0] else 0)
    dweight = x.new_empty(weight.shape if needs[1] else 0)
    if needs[0]:
        _product(dx, (of_dy, False), (as_rows(weight), False), None, len(weight))
    if needs[1]:
        _product(dweight, (of_dy, True), (of_x, False), None, rows)
    dbias = reference.sum_rows(reference.as_matrix(dy)) if needs[2] else x.new_empty(0)
    return dx, dweight, dbias


_Operand = tuple[tuple[Tensor, int], bool]  # rows and their stride, and whether it is transposed


def _product(c: Tensor, a: _Operand, b: _Operand, bias: Tensor | None, depth: int) -> None:
    """c = a b + bias."""
    bias = None if bias is None else bias.contiguous()
    columns = c.shape[-1]
    (a_rows, a_stride), a_transposed = a
    (b_rows, b_stride), b_transposed = b
    _native.linear_product(
        a_rows.data_ptr(),
        a_stride,
        a_transposed,
        b_rows.data_ptr(),
        b_stride,
        b_transposed,
        0 if bias is None else bias.data_ptr(),
        c.data_ptr(),
        c.numel() // columns,
        columns,
        depth,
        DTYPE_CODES[c.dtype],
        torch.get_num_threads(),
    )
