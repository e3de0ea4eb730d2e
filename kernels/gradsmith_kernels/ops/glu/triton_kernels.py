"""Gated linear units in Triton: kernels, launchers.

A program computes a tile of ROWS rows by BLOCK columns; tensors without gaps are one long row.
Launch options follow from the shape alone.

Shapes as in op.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsmith_kernels.ops.common.native import as_rows, shape_as_rows
from gradsmith_kernels.ops.glu.op import ACTIVATIONS
from gradsmith_kernels.verify.spec import CompileCase

TILE = 2048  # elements of a program: 16 bytes or more of each tensor for a thread, on every chip
NUM_WARPS = 4


@triton.jit
def power_of_e(x, COARSE: tl.constexpr):
    """e^x. The approximate power of two is exact enough for 16 bits only, and for [-1/2, 1/2]."""
    if COARSE:
        return tl.exp(x)
    x = tl.where(x < -200.0, -200.0, x)
    whole = tl.floor(tl.fma(x, 1.4426950216293335, 0.5))
    rest = tl.fma(x, 1.4426950216293335, -whole)
    rest = tl.fma(x, 1.925963033500e-08, rest)  # log2(e) in two parts
    return tl.exp2(rest) * tl.exp2(whole)


@triton.jit
def divide(x, y, COARSE: tl.constexpr):
    return x / y if COARSE else tl.div_rn(x, y)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, COARSE: tl.constexpr):
    """The activation of x and its derivative."""
    if ACTIVATION == "silu":
        below = 1.0 + power_of_e(-x, COARSE)
        sigmoid = divide(1.0, below, COARSE)
        value = x * sigmoid if COARSE else tl.div_rn(x, below)
        return value, tl.fma(value, 1.0 - sigmoid, sigmoid)
    # gelu is x times a symmetric distribution's share below x.
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        density = power_of_e(x * x * -0.5, COARSE) * 0.3989422804014327
    else:
        # (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), with u = sqrt(2 / pi) * (x + 0.044715 * x^3).
        size = tl.abs(x)
        a = tl.where(size > 20.0, 20.0, size)  # the tail is 0 there, and u is finite
        power = power_of_e(-a * tl.fma(a * a, 0.07135481627260025, 1.5957691216057308), COARSE)
        tail = divide(power, 1.0 + power, COARSE)
        share = tl.where(x < 0, tail, 1.0 - tail)
        slope = tl.fma(a * a, 0.21406444881780074, 1.5957691216057308)
        density = tail * (1.0 - tail) * slope
    return x * share, tl.fma(x, density, share)


@triton.jit
def tile_of_program(rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's rows and columns, with 64 bits, and which of them are inside."""
    blocks = tl.cdiv(cols, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < cols)


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask, 0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    rows,
    cols,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of y."""
    row, column, mask = tile_of_program(rows, cols, ROWS, BLOCK)
    dtype = y_ptr.dtype.element_ty
    gate = load(gate_ptr + row * gate_stride + column, mask)
    up = load(up_ptr + row * up_stride + column, mask)
    value, _ = activate(gate, ACTIVATION, dtype.primitive_bitwidth == 16)
    tl.store(y_ptr + row * cols + column, (value * up).to(dtype), mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    rows,
    cols,
    ACTIVATION: tl.constexpr,
    NEED_DGATE: tl.constexpr,
    NEED_DUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of dgate and of dup, of what is needed."""
    row, column, mask = tile_of_program(rows, cols, ROWS, BLOCK)
    dtype = gate_ptr.dtype.element_ty
    dy = load(dy_ptr + row * dy_stride + column, mask)
    gate = load(gate_ptr + row * gate_stride + column, mask)
    value, slope = activate(gate, ACTIVATION, dtype.primitive_bitwidth == 16)
    if NEED_DGATE:
        dgate = dy * load(up_ptr + row * up_stride + column, mask) * slope
        tl.store(dgate_ptr + row * cols + column, dgate.to(dtype), mask)
    if NEED_DUP:
        tl.store(dup_ptr + row * cols + column, (dy * value).to(dtype), mask)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y = activation(gate) * up, contiguous, of gate's shape."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    (gate_rows, gate_stride), (up_rows, up_stride) = as_rows(gate), as_rows(up)
    rows, cols = shape_as_rows(gate, up)
    tile_rows, block = _tile(cols)
    forward_kernel[(triton.cdiv(rows, tile_rows) * triton.cdiv(cols, block),)](
        gate_rows,
        up_rows,
        y,
        gate_stride,
        up_stride,
        rows,
        cols,
        ACTIVATION=activation,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
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
    rows, cols = shape_as_rows(dy, gate, up)
    tile_rows, block = _tile(cols)
    backward_kernel[(triton.cdiv(rows, tile_rows) * triton.cdiv(cols, block),)](
        dy_rows,
        gate_rows,
        up_rows,
        dgate,
        dup,
        dy_stride,
        gate_stride,
        up_stride,
        rows,
        cols,
        ACTIVATION=activation,
        NEED_DGATE=need_dgate,
        NEED_DUP=need_dup,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return dgate, dup


def _tile(cols: int) -> tuple[int, int]:
    """ROWS and BLOCK."""
    block = min(triton.next_power_of_2(cols), TILE)
    return TILE // block, block


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip: bfloat16, without gaps and with short rows."""
    pointers = dict.fromkeys(("gate_ptr", "up_ptr", "dy_ptr", "y_ptr"), "*bf16")
    pointers |= dict.fromkeys(("dgate_ptr", "dup_ptr"), "*bf16")
    integers = ("gate_stride", "up_stride", "dy_stride", "cols")
    types = pointers | dict.fromkeys((*integers, "rows"), "i32")
    aligned = (*pointers, *integers)
    cases = []
    for activation in ACTIVATIONS:
        for cols in (TILE, 128):
            rows, block = _tile(cols)
            tile = {"ACTIVATION": activation, "ROWS": rows, "BLOCK": block}
            both = {"NEED_DGATE": True, "NEED_DUP": True}
            for name, kernel, constants in (
                ("forward", forward_kernel, tile),
                ("backward", backward_kernel, tile | both),
            ):
                name = f"glu {name} {activation} {cols}"
                cases.append(CompileCase(name, kernel, types, constants, aligned, NUM_WARPS))
    return cases
