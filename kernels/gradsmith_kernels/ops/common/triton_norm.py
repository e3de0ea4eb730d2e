"""What the norms' Triton kernels share: tiles, and the sum over rows of a weight's gradient.

R rows of N columns. A program of a forward kernel holds a tile of ROWS rows by BLOCK columns. A
program of a backward kernel takes its share of the rows, a tile at a time, and leaves one row of
partial sums in `partial` (programs, N) float32, which `dweight_kernel` adds up. Launch options
follow from the shape alone (no autotuning), and so do the order of every sum and the bits of the
result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradsmith_kernels.backends import triton_before

MAX_BLOCK = 4096 if triton_before(3, 7) else 8192
MAX_PROGRAMS = 256  # of the backward pass, each with one row of partial sums for dweight


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask, 0.0).to(tl.float32)


@triton.jit
def sum_rows(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over a tile's rows, as a row; in two levels, so that no long chain of sums rounds."""
    if ROWS > 4:
        tile = tl.sum(tl.reshape(tile, [4, ROWS // 4, BLOCK]), 0)
    return tl.sum(tile, 0, keep_dims=True)


@triton.jit
def load_h(
    x_ptr, residual_ptr, h_ptr, x_offset, residual_offset, h_offset, mask, ADD: tl.constexpr
):
    """What is normalised: x, or the sum of x and the residual, which is stored as well."""
    h = load(x_ptr + x_offset, mask)
    if ADD:
        # Rounded before it is normalised: h is what the next layer reads.
        rounded = (h + load(residual_ptr + residual_offset, mask)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + h_offset, rounded, mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def dweight_kernel(
    partial_ptr, dweight_ptr, programs, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dweight: the sum of the programs' partial sums, always in the same order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < programs) & (column < cols)
        total += tl.load(partial_ptr + row.to(tl.int64) * cols + column, mask, 0.0)
    dweight = sum_rows(total, ROWS, BLOCK).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + column, dweight, column < cols)


def tile(cols: int) -> tuple[int, int, int]:
    """ROWS, BLOCK and num_warps: 16 elements a thread, and 2048 in a tile at least."""
    block = min(triton.next_power_of_2(cols), MAX_BLOCK)
    rows = max(1, 2048 // block)
    # Triton 3.6 spills those of longer rows: there, 8 elements a thread.
    return rows, block, rows * block // (256 if cols > block and triton_before(3, 7) else 512)
