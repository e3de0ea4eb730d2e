"""RMSNorm on the CPU: csrc/rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.common.native import DTYPE_CODES, as_rows


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (x without a residual) and rstd (...,) float32."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    h = x if residual is None else torch.empty_like(y)
    if x.numel() == 0:
        return y, h, rstd.fill_(eps**-0.5)
    weight = weight.contiguous()
    x_rows, x_stride = as_rows(x)
    residual_rows, residual_stride = (x_rows, 0) if residual is None else as_rows(residual)
    _native.rms_norm_forward(
        x_rows.data_ptr(),
        x_stride,
        0 if residual is None else residual_rows.data_ptr(),
        residual_stride,
        weight.data_ptr(),
        y.data_ptr(),
        0 if residual is None else h.data_ptr(),
        rstd.data_ptr(),
        rstd.numel(),
        x.shape[-1],
        eps,
        offset,
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
    return y, h, rstd


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dx (..., N), and dweight (N,), or (0,) where it is not needed."""
    cols = h.shape[-1]
    rows = rstd.numel()
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dweight = torch.empty(cols if need_dweight else 0, dtype=weight.dtype)
    if h.numel() == 0:
        return dx, dweight.zero_()
    partial = None
    if need_dweight:
        partial = torch.empty(_native.block_count(rows) * cols, dtype=torch.float32)
    weight = weight.contiguous()
    rstd = rstd.contiguous()
    dy_rows, dy_stride = as_rows(dy)
    h_rows, h_stride = as_rows(h)
    dh_rows, dh_stride = (h_rows, 0) if dh is None else as_rows(dh)
    _native.rms_norm_backward(
        dy_rows.data_ptr(),
        dy_stride,
        0 if dh is None else dh_rows.data_ptr(),
        dh_stride,
        h_rows.data_ptr(),
        h_stride,
        weight.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        dweight.data_ptr() if need_dweight else 0,
        rows,
        cols,
        offset,
        DTYPE_CODES[h.dtype],
        DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
    return dx, dweight
