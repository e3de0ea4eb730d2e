"""LayerNorm in Triton: forward kernel, backward kernel, launchers.

Tiles, launch options and the sum over programs are RMSNorm's: rows of up to 8192 elements fit into
one tile and are read once; longer rows are walked through three times forward and twice backward,
after the first time out of the cache.

Shapes as in op.py; partial (1 or 2, programs, N) float32.
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
from gradsmith_kernels.ops.layer_norm.op import empty_gradients
from gradsmith_kernels.verify.spec import CompileCase


@triton.jit
def parameter(pointers, mask, GIVEN: tl.constexpr, otherwise: tl.constexpr):
    """weight or bias; a constant where there is none."""
    if GIVEN:
        return load(pointers, mask)
    else:
        return tl.full(mask.shape, otherwise, tl.float32)


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    statistics_ptr,
    x_stride,
    residual_stride,
    rows,
    cols,
    eps,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile's rows of y, h (where there is a residual) and statistics."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x_row, residual_row, out_row = row * x_stride, row * residual_stride, row * cols
    dtype = y_ptr.dtype.element_ty
    size = cols.to(tl.float32)

    if ONE_BLOCK:
        mask = (row < rows) & (column < cols)
        x_at, residual_at, out_at = x_row + column, residual_row + column, out_row + column
        h = load_h(x_ptr, residual_ptr, h_ptr, x_at, residual_at, out_at, mask, ADD)
        sums = h
    else:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            at = start + column
            mask = (row < rows) & (at < cols)
            x_at, residual_at, out_at = x_row + at, residual_row + at, out_row + at
            sums += load_h(x_ptr, residual_ptr, h_ptr, x_at, residual_at, out_at, mask, ADD)
        if ADD:
            tl.debug_barrier()  # h is read back by other threads than those that stored it
    mean = tl.sum(sums, 1, keep_dims=True) / size

    # The mean that is left after that one, and the squares.
    if ONE_BLOCK:
        centred = tl.where(mask, h - mean, 0.0)
        left, squares = centred, centred * centred
    else:
        left = tl.zeros([ROWS, BLOCK], tl.float32)
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            at = start + column
            mask = (row < rows) & (at < cols)
            h = load(h_ptr + out_row + at, mask) if ADD else load(x_ptr + x_row + at, mask)
            centred = tl.where(mask, h - mean, 0.0)
            left += centred
            squares += centred * centred
    rest = tl.sum(left, 1, keep_dims=True) / size
    # Correctly rounded: an error here would scale the whole row.
    variance = tl.div_rn(tl.sum(squares, 1, keep_dims=True), tl.zeros([ROWS, 1], tl.float32) + size)
    variance = tl.maximum(variance - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    tl.store(statistics_ptr + row * 3, mean, row < rows)
    tl.store(statistics_ptr + row * 3 + 1, rest, row < rows)
    tl.store(statistics_ptr + row * 3 + 2, rstd, row < rows)

    if ONE_BLOCK:
        weight = parameter(weight_ptr + column, column < cols, WEIGHT, 1.0)
        bias = parameter(bias_ptr + column, column < cols, BIAS, 0.0)
        y = (centred * rstd - rest * rstd) * weight + bias
        tl.store(y_ptr + out_row + column, y.to(dtype), mask)
    else:
        for start in range(0, cols, BLOCK):
            at = start + column
            mask = (row < rows) & (at < cols)
            h = load(h_ptr + out_row + at, mask) if ADD else load(x_ptr + x_row + at, mask)
            weight = parameter(weight_ptr + at, at < cols, WEIGHT, 1.0)
            bias = parameter(bias_ptr + at, at < cols, BIAS, 0.0)
            y = ((h - mean) * rstd - rest * rstd) * weight + bias
            tl.store(y_ptr + out_row + at, y.to(dtype), mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    statistics_ptr,
    dx_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    dy_stride,
    dh_stride,
    h_stride,
    rows,
    cols,
    rows_per_program,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of this program's rows; dweight and dbias summed over them into its partial sums."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    partial_weight_row = partial_weight_ptr + program * cols
    partial_bias_row = partial_bias_ptr + program * cols
    dtype = h_ptr.dtype.element_ty
    size = cols.to(tl.float32)
    if ONE_BLOCK:
        weight = parameter(weight_ptr + column, column < cols, WEIGHT, 1.0)
        dweight = tl.zeros([ROWS, BLOCK], tl.float32)
        dbias = tl.zeros([ROWS, BLOCK], tl.float32)

    for step in range(0, rows_per_program, ROWS):
        row = program * rows_per_program + step + tl.arange(0, ROWS)[:, None]
        inside = row < rows
        dy_row, dh_row, h_row, dx_row = row * dy_stride, row * dh_stride, row * h_stride, row * cols
        mean = load(statistics_ptr + row * 3, inside)
        rstd = load(statistics_ptr + row * 3 + 2, inside)
        shift = load(statistics_ptr + row * 3 + 1, inside) * rstd
        if ONE_BLOCK:
            mask = inside & (column < cols)
            dy = load(dy_ptr + dy_row + column, mask)
            # Past the row's end dy is 0, and so is all that this is multiplied with.
            normalised = (load(h_ptr + h_row + column, mask) - mean) * rstd - shift
            if NEED_DX:
                g = dy * weight
                g_mean = tl.sum(g, 1, keep_dims=True) / size
                gn_mean = tl.sum(g * normalised, 1, keep_dims=True) / size
                dx = (g - g_mean - normalised * gn_mean) * rstd
                if ADD:
                    dx += load(dh_ptr + dh_row + column, mask)
                tl.store(dx_ptr + dx_row + column, dx.to(dtype), mask)
            if NEED_DWEIGHT:
                dweight += dy * normalised
            if NEED_DBIAS:
                dbias += dy
        else:
            g_sums = tl.zeros([ROWS, BLOCK], tl.float32)
            gn_sums = tl.zeros([ROWS, BLOCK], tl.float32)
            if NEED_DX:
                for start in range(0, cols, BLOCK):
                    at = start + column
                    mask = inside & (at < cols)
                    g = load(dy_ptr + dy_row + at, mask)
                    g *= parameter(weight_ptr + at, at < cols, WEIGHT, 1.0)
                    g_sums += g
                    gn_sums += g * ((load(h_ptr + h_row + at, mask) - mean) * rstd - shift)
            g_mean = tl.sum(g_sums, 1, keep_dims=True) / size
            gn_mean = tl.sum(gn_sums, 1, keep_dims=True) / size
            for start in range(0, cols, BLOCK):
                at = start + column
                mask = inside & (at < cols)
                dy = load(dy_ptr + dy_row + at, mask)
                normalised = (load(h_ptr + h_row + at, mask) - mean) * rstd - shift
                if NEED_DX:
                    g = dy * parameter(weight_ptr + at, at < cols, WEIGHT, 1.0)
                    dx = (g - g_mean - normalised * gn_mean) * rstd
                    if ADD:
                        dx += load(dh_ptr + dh_row + at, mask)
                    tl.store(dx_ptr + dx_row + at, dx.to(dtype), mask)
                # The sums do not fit into registers; they live in this program's own rows.
                if NEED_DWEIGHT:
                    so_far = tl.load(partial_weight_row + at, (at < cols) & (step > 0), 0.0)
                    total = so_far + sum_rows(dy * normalised, ROWS, BLOCK)
                    tl.store(partial_weight_row + at, total, at < cols)
                if NEED_DBIAS:
                    so_far = tl.load(partial_bias_row + at, (at < cols) & (step > 0), 0.0)
                    tl.store(partial_bias_row + at, so_far + sum_rows(dy, ROWS, BLOCK), at < cols)
            tl.debug_barrier()  # those sums are read back by other threads than stored them

    if ONE_BLOCK:
        if NEED_DWEIGHT:
            tl.store(partial_weight_row + column, sum_rows(dweight, ROWS, BLOCK), column < cols)
        if NEED_DBIAS:
            tl.store(partial_bias_row + column, sum_rows(dbias, ROWS, BLOCK), column < cols)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (x without a residual) and statistics (..., 3): mean, its remainder, rstd."""
    cols = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x if residual is None else torch.empty_like(y)
    statistics = torch.empty((*x.shape[:-1], 3), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, h, statistics.zero_()
    x_rows, x_stride = as_rows(x)
    residual_rows, residual_stride = (x_rows, 0) if residual is None else as_rows(residual)
    tile_rows, block, num_warps = tile(cols)
    rows = statistics.numel() // 3
    forward_kernel[(triton.cdiv(rows, tile_rows),)](
        x_rows,
        residual_rows,
        x_rows if weight is None else weight.contiguous(),
        x_rows if bias is None else bias.contiguous(),
        y,
        h,
        statistics,
        x_stride,
        residual_stride,
        rows,
        cols,
        eps,
        ADD=residual is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ONE_BLOCK=cols <= block,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=True,
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
    sums = [gradient for gradient in (dweight, dbias) if gradient.numel()]
    dy_rows, dy_stride = as_rows(dy)
    h_rows, h_stride = as_rows(h)
    dh_rows, dh_stride = (h_rows, 0) if dh is None else as_rows(dh)
    tile_rows, block, num_warps = tile(cols)
    rows_per_program = tile_rows * triton.cdiv(rows, tile_rows * MAX_PROGRAMS)
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty((len(sums), programs, cols), dtype=torch.float32, device=h.device)
    backward_kernel[(programs,)](
        dy_rows,
        dh_rows,
        h_rows,
        h_rows if weight is None else weight.contiguous(),
        statistics.contiguous(),
        dx,
        partial[0] if sums else partial,
        partial[-1] if sums else partial,
        dy_stride,
        dh_stride,
        h_stride,
        rows,
        cols,
        rows_per_program,
        ADD=dh is not None,
        WEIGHT=weight is not None,
        NEED_DX=needed[0],
        NEED_DWEIGHT=dweight.numel() > 0,
        NEED_DBIAS=dbias.numel() > 0,
        ONE_BLOCK=cols <= block,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    for own, gradient in zip(partial, sums, strict=True):
        dweight_kernel[(triton.cdiv(cols, 64),)](
            own, gradient, programs, cols, ROWS=32, BLOCK=64, num_warps=4, enable_fp_fusion=True
        )
    return dx, dweight, dbias


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip: bfloat16, the shapes of training."""
    tensors = ("x", "residual", "weight", "bias", "y", "h", "dy", "dh", "dx")
    pointers = dict.fromkeys((f"{name}_ptr" for name in tensors), "*bf16")
    sums = ("statistics_ptr", "partial_weight_ptr", "partial_bias_ptr")
    pointers |= dict.fromkeys(sums, "*fp32")
    integers = ("x_stride", "residual_stride", "dy_stride", "dh_stride", "h_stride", "cols")
    types = pointers | dict.fromkeys(integers, "i32")
    types |= {"rows": "i32", "rows_per_program": "i32", "eps": "fp32"}
    aligned = (*pointers, *integers)
    cases = []
    for cols in (128, 768, 4096, 16384):
        rows, block, num_warps = tile(cols)
        shape = {"WEIGHT": True, "ONE_BLOCK": cols <= block, "ROWS": rows, "BLOCK": block}
        for residual in (False, True):
            name = f"{'add_' if residual else ''}layer_norm"
            own = {"ADD": residual, **shape}
            needs = dict.fromkeys(("NEED_DX", "NEED_DWEIGHT", "NEED_DBIAS"), True)
            for kernel, label, constants in (
                (forward_kernel, "forward", {"BIAS": True}),
                (backward_kernel, "backward", needs),
            ):
                case = CompileCase(
                    f"{name} {label} {cols}", kernel, types, own | constants, aligned, num_warps
                )
                cases.append(case)
    return cases
