"""RMSNorm in Triton: forward kernel, backward kernels, launchers.

A program holds a tile of ROWS rows by BLOCK columns. Rows of up to 8192 elements fit into one tile
and are read once; longer rows are walked through twice in blocks, the second time out of the cache.
Launch options follow from the shape alone (no autotuning), and so do the order of every sum and the
bits of the result.

Shapes as in op.py; partial (programs, N) float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsmith_kernels.ops.common.native import as_rows
from gradsmith_kernels.ops.common.triton_norm import (
    MAX_PROGRAMS,
    dweight_kernel,
    load,
    load_h,
    sum_rows,
    tile,
)
from gradsmith_kernels.verify.spec import CompileCase


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    rows,
    cols,
    eps,
    offset,
    ADD: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile's rows of y, h (where there is a residual) and rstd."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x_row, residual_row, out_row = row * x_stride, row * residual_stride, row * cols
    dtype = y_ptr.dtype.element_ty

    if ONE_BLOCK:
        mask = (row < rows) & (column < cols)
        x_at, residual_at, out_at = x_row + column, residual_row + column, out_row + column
        h = load_h(x_ptr, residual_ptr, h_ptr, x_at, residual_at, out_at, mask, ADD)
        squares = h * h
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            at = start + column
            mask = (row < rows) & (at < cols)
            x_at, residual_at, out_at = x_row + at, residual_row + at, out_row + at
            h = load_h(x_ptr, residual_ptr, h_ptr, x_at, residual_at, out_at, mask, ADD)
            squares += h * h
    # Correctly rounded: an error here would scale the whole row.
    mean = tl.sum(squares, 1, keep_dims=True) / cols
    rstd = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, row < rows)

    if ONE_BLOCK:
        y = h * rstd * (load(weight_ptr + column, column < cols) + offset)
        tl.store(y_ptr + out_row + column, y.to(dtype), mask)
    else:
        if ADD:
            tl.debug_barrier()  # h is read back by other threads than those that stored it
        for start in range(0, cols, BLOCK):
            at = start + column
            mask = (row < rows) & (at < cols)
            h = load(h_ptr + out_row + at, mask) if ADD else load(x_ptr + x_row + at, mask)
            y = h * rstd * (load(weight_ptr + at, at < cols) + offset)
            tl.store(y_ptr + out_row + at, y.to(dtype), mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    dh_stride,
    h_stride,
    rows,
    cols,
    rows_per_program,
    offset,
    ADD: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of this program's rows, and dweight summed over them into its row of `partial`."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    partial_row = partial_ptr + program * cols
    dtype = dx_ptr.dtype.element_ty
    if ONE_BLOCK:
        weight = load(weight_ptr + column, column < cols) + offset
        dweight = tl.zeros([ROWS, BLOCK], tl.float32)

    for step in range(0, rows_per_program, ROWS):
        row = program * rows_per_program + step + tl.arange(0, ROWS)[:, None]
        inside = row < rows
        dy_row, dh_row, h_row, dx_row = row * dy_stride, row * dh_stride, row * h_stride, row * cols
        rstd = load(rstd_ptr + row, inside)
        scale = rstd * rstd * rstd / cols
        if ONE_BLOCK:
            mask = inside & (column < cols)
            dy = load(dy_ptr + dy_row + column, mask)
            h = load(h_ptr + h_row + column, mask)
            c = scale * tl.sum(dy * weight * h, 1, keep_dims=True)
            dx = dy * rstd * weight - h * c
            if ADD:
                dx += load(dh_ptr + dh_row + column, mask)
            tl.store(dx_ptr + dx_row + column, dx.to(dtype), mask)
            dweight += dy * rstd * h
        else:
            products = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, cols, BLOCK):
                at = start + column
                mask = inside & (at < cols)
                weight = load(weight_ptr + at, at < cols) + offset
                dy = load(dy_ptr + dy_row + at, mask)
                products += dy * weight * load(h_ptr + h_row + at, mask)
            c = scale * tl.sum(products, 1, keep_dims=True)
            for start in range(0, cols, BLOCK):
                at = start + column
                mask = inside & (at < cols)
                dy = load(dy_ptr + dy_row + at, mask)
                h = load(h_ptr + h_row + at, mask)
                weight = load(weight_ptr + at, at < cols) + offset
                dx = dy * rstd * weight - h * c
                if ADD:
                    dx += load(dh_ptr + dh_row + at, mask)
                tl.store(dx_ptr + dx_row + at, dx.to(dtype), mask)
                if NEED_DWEIGHT:
                    # The sum does not fit into registers; it lives in this program's own row.
                    so_far = tl.load(partial_row + at, (at < cols) & (step > 0), 0.0)
                    total = so_far + sum_rows(dy * rstd * h, ROWS, BLOCK)
                    tl.store(partial_row + at, total, at < cols)
            tl.debug_barrier()  # those sums are read back by other threads than stored them

    if NEED_DWEIGHT and ONE_BLOCK:
        tl.store(partial_row + column, sum_rows(dweight, ROWS, BLOCK), column < cols)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (x without a residual) and rstd (...,) float32."""
    cols = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, h, rstd.fill_(eps**-0.5)
    x_rows, x_stride = as_rows(x)
    residual_rows, residual_stride = (x_rows, 0) if residual is None else as_rows(residual)
    tile_rows, block, num_warps = tile(cols)
    rows = rstd.numel()
    forward_kernel[(triton.cdiv(rows, tile_rows),)](
        x_rows,
        residual_rows,
        weight.contiguous(),
        y,
        h,
        rstd,
        x_stride,
        residual_stride,
        rows,
        cols,
        eps,
        offset,
        ADD=residual is not None,
        ONE_BLOCK=cols <= block,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=True,
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
    cols, rows = h.shape[-1], rstd.numel()
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dweight = torch.empty(cols if need_dweight else 0, dtype=weight.dtype, device=h.device)
    if h.numel() == 0:
        return dx, dweight.zero_()
    dy_rows, dy_stride = as_rows(dy)
    h_rows, h_stride = as_rows(h)
    dh_rows, dh_stride = (h_rows, 0) if dh is None else as_rows(dh)
    tile_rows, block, num_warps = tile(cols)
    rows_per_program = tile_rows * triton.cdiv(rows, tile_rows * MAX_PROGRAMS)
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty(
        (programs, cols) if need_dweight else 0, dtype=torch.float32, device=h.device
    )
    backward_kernel[(programs,)](
        dy_rows,
        dh_rows,
        h_rows,
        weight.contiguous(),
        rstd.contiguous(),
        dx,
        partial,
        dy_stride,
        dh_stride,
        h_stride,
        rows,
        cols,
        rows_per_program,
        offset,
        ADD=dh is not None,
        NEED_DWEIGHT=need_dweight,
        ONE_BLOCK=cols <= block,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    if need_dweight:
        dweight_kernel[(triton.cdiv(cols, 64),)](
            partial, dweight, programs, cols, ROWS=32, BLOCK=64, num_warps=4, enable_fp_fusion=True
        )
    return dx, dweight


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip: bfloat16, the shapes of training."""
    pointers = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16"}
    pointers |= {"h_ptr": "*bf16", "rstd_ptr": "*fp32", "dy_ptr": "*bf16", "dh_ptr": "*bf16"}
    pointers |= {"dx_ptr": "*bf16", "partial_ptr": "*fp32", "dweight_ptr": "*bf16"}
    integers = ("x_stride", "residual_stride", "dy_stride", "dh_stride", "h_stride", "cols")
    types = pointers | dict.fromkeys(integers, "i32")
    types |= {
        "rows": "i32",
        "rows_per_program": "i32",
        "programs": "i32",
        "eps": "fp32",
        "offset": "fp32",
    }
    aligned = (*pointers, *integers)
    cases = []
    for cols in (128, 4096, 16384):
        rows, block, num_warps = tile(cols)
        shape = {"ONE_BLOCK": cols <= block, "ROWS": rows, "BLOCK": block}
        for residual in (False, True):
            name = f"{'add_' if residual else ''}rms_norm"
            cases += [
                CompileCase(
                    f"{name} forward {cols}",
                    forward_kernel,
                    types,
                    {"ADD": residual, **shape},
                    aligned,
                    num_warps,
                ),
                CompileCase(
                    f"{name} backward {cols}",
                    backward_kernel,
                    types,
                    {"ADD": residual, "NEED_DWEIGHT": True, **shape},
                    aligned,
                    num_warps,
                ),
            ]
    constants = {"ROWS": 32, "BLOCK": 64}
    return [*cases, CompileCase("rms_norm dweight", dweight_kernel, types, constants, aligned, 4)]
