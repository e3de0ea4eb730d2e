"""LayerNorm on the CPU: csrc/layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.common.native import DTYPE_CODES, as_rows
from gradsmith_kernels.ops.layer_norm.op import empty_gradients


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (x without a residual) and statistics (..., 3): mean, its remainder, rstd."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = torch.empty((*x.shape[:-1], 3), dtype=torch.float32)
    h = x if residual is None else torch.empty_like(y)
    if x.numel() == 0:
        return y, h, statistics.zero_()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    x_rows, x_stride = as_rows(x)
    residual_rows, residual_stride = (x_rows, 0) if residual is None else as_rows(residual)
    _native.layer_norm_forward(
        x_rows.data_ptr(),
        x_stride,
        0 if residual is None else residual_rows.data_ptr(),
        residual_stride,
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if residual is None else h.data_ptr(),
        statistics.data_ptr(),
        statistics.numel() // 3,
        x.shape[-1],
        eps,
        DTYPE_CODES[x.dtype],
        0 if weight is None else DTYPE_CODES[weight.dtype],
        0 if bias is None else DTYPE_CODES[bias.dtype],
        torch.get_num_threads(),
    )
    return y, h, statistics


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (..., N), dweight and dbias (N,); empty for what is not needed."""
    cols, rows = h.shape[-1], statistics.numel() // 3
    dx, dweight, dbias = empty_gradients(h, weight, bias, needed)
    if h.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    weight_sums, bias_sums = (_native.block_count(rows) * g.numel() for g in (dweight, dbias))
    partial = torch.empty(weight_sums + bias_sums, dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    statistics = statistics.contiguous()
    dy_rows, dy_stride = as_rows(dy)
    h_rows, h_stride = as_rows(h)
    dh_rows, dh_stride = (h_rows, 0) if dh is None else as_rows(dh)
    _native.layer_norm_backward(
        dy_rows.data_ptr(),
        dy_stride,
        0 if dh is None else dh_rows.data_ptr(),
        dh_stride,
        h_rows.data_ptr(),
        h_stride,
        0 if weight is None else weight.data_ptr(),
        statistics.data_ptr(),
        dx.data_ptr(),
        partial.data_ptr() if weight_sums else 0,
        partial.data_ptr() + weight_sums * partial.itemsize if bias_sums else 0,
        dweight.data_ptr(),
        dbias.data_ptr(),
        rows,
        cols,
        DTYPE_CODES[h.dtype],
        0 if weight is None else DTYPE_CODES[weight.dtype],
        0 if bias is None else DTYPE_CODES[bias.dtype],
        torch.get_num_threads(),
    )
    return dx, dweight, dbias
