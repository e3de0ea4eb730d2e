"""Adafactor in Triton: each pass is one launch over all tensors, whose addresses come from a table.

A program takes one tile of one matrix and stores its sums; the next launch adds them up in an order
that follows from the shapes. Nothing comes back to the host between the passes. Tensors that differ
in dtype, alignment or in having factors go into launches of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsmith_kernels.backends import triton_before
from gradsmith_kernels.ops.adafactor_step.tensors import Options, Tensors, matrices_of
from gradsmith_kernels.ops.common.tensor_lists import Contiguous, address_of
from gradsmith_kernels.verify.spec import CompileCase

TILE_ROWS, ROW_STEP, TILE_COLS = 64, 4, 512  # of a matrix: rows in all, rows at a time, columns
VECTOR = 2048  # a tile of what has no factors
FACTORS = 256  # factors that a program moves
TOTALS = 1024  # sums that a program adds at a time
NUM_WARPS = 8 if triton_before(3, 9) else 4  # with four, Triton 3.7 spills in two kernels
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The table's columns: addresses; the shape; the number of tiles along rows and columns; where in
# the scratch memory the tensor's sums, factors' inverse roots and factors' block sums begin; its
# first tile and how many it has.
COLUMNS = ("params", "grads", "row_vars", "col_vars", "masters", "compensations")
ROWS, COLS = tl.constexpr(6), tl.constexpr(7)
ROW_TILES, COL_TILES = tl.constexpr(8), tl.constexpr(9)
ROW_SUMS, COL_SUMS, ROW_ROOTS, COL_ROOTS, MEANS = (tl.constexpr(i) for i in range(10, 15))
FIRST, COUNT = tl.constexpr(15), tl.constexpr(16)
WIDTH = tl.constexpr(17)
# The coefficients' columns: Options.coefficients, then the limit of 1 / sqrt(second moment).
SHARE, RATE, EPS1, EPS2, CLIP, DECAY, THRESHOLD, LIMIT = (tl.constexpr(i) for i in range(8))


@triton.jit
def tile_of(tensors_ptr, tiles_ptr, ALIGNED: tl.constexpr):
    """This program's tensor, its row in the table, the matrix, the tile's row and column there."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tiles_ptr + 2 * program)
    number = tl.load(tiles_ptr + 2 * program + 1)
    table = tensors_ptr + WIDTH * tensor
    cols = tl.load(table + COLS)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    col_tiles = tl.load(table + COL_TILES)
    each = tl.load(table + ROW_TILES) * col_tiles
    matrix = number // each
    return tensor, table, matrix, number % each // col_tiles, number % col_tiles, cols


@triton.jit
def pointer(table, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def sums_kernel(
    tensors_ptr,  # int64 [tensors, WIDTH]
    tiles_ptr,  # int64 [programs, 2]: tensor, number of the tile in it
    scratch_ptr,  # float32
    scale,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROW_STEP: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    """Sums of the gradients' squares by rows and by columns of a tile."""
    _, table, matrix, row_tile, col_tile, cols = tile_of(tensors_ptr, tiles_ptr, ALIGNED)
    rows = tl.load(table + ROWS)
    g_ptr = pointer(table, 1, GRAD, ALIGNED)
    c = col_tile * TILE_COLS + tl.arange(0, TILE_COLS)
    columns = tl.zeros((ROW_STEP, TILE_COLS), tl.float32)
    row_sums = scratch_ptr + tl.load(table + ROW_SUMS)
    for start in range(0, tl.minimum(rows - row_tile * TILE_ROWS, TILE_ROWS), ROW_STEP):
        r = row_tile * TILE_ROWS + start + tl.arange(0, ROW_STEP)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        at = (matrix * rows + r)[:, None] * cols + c[None, :]
        g = tl.load(g_ptr + at, mask, other=0.0).to(tl.float32) * scale
        columns += g * g
        place = (matrix * rows + r) * tl.load(table + COL_TILES) + col_tile
        tl.store(row_sums + place, tl.sum(g * g, 1), r < rows)
    place = (matrix * tl.load(table + ROW_TILES) + row_tile) * cols + c
    tl.store(scratch_ptr + tl.load(table + COL_SUMS) + place, tl.sum(columns, 0), c < cols)


@triton.jit
def factors_kernel(
    tensors_ptr,
    blocks_ptr,  # int64 [programs, 2]: tensor, number of the block of factors in it
    scratch_ptr,
    coefficients_ptr,  # float32 [tensors, 8]
    OF_ROWS: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Moves factors to the means of the squares; their inverse roots; for rows, their sum."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks_ptr + 2 * program)
    number = tl.load(blocks_ptr + 2 * program + 1)
    table = tensors_ptr + WIDTH * tensor
    rows = tl.load(table + ROWS)
    cols = tl.load(table + COLS)
    if OF_ROWS:
        size, count, parts = rows, cols, tl.load(table + COL_TILES)
        stride, part_stride = parts, parts * 0 + 1
        sums = scratch_ptr + tl.load(table + ROW_SUMS)
        roots = scratch_ptr + tl.load(table + ROW_ROOTS)
        factors = tl.load(table + 2).to(tl.pointer_type(tl.float32))
    else:
        size, count, parts = cols, rows, tl.load(table + ROW_TILES)
        stride, part_stride = parts * 0 + 1, cols
        sums = scratch_ptr + tl.load(table + COL_SUMS)
        roots = scratch_ptr + tl.load(table + COL_ROOTS)
        factors = tl.load(table + 3).to(tl.pointer_type(tl.float32))
    blocks = (size + FACTORS - 1) // FACTORS
    matrix = number // blocks
    j = number % blocks * FACTORS + tl.arange(0, FACTORS)
    mask = j < size
    sums += matrix * size * parts
    total = tl.zeros((FACTORS,), tl.float32)
    for part in range(0, parts):
        total += tl.load(sums + j * stride + part * part_stride, mask, other=0.0)
    old = tl.load(factors + matrix * size + j, mask, other=0.0)
    share = tl.load(coefficients_ptr + 8 * tensor + SHARE)
    new = old + share * (tl.div_rn(total, count.to(tl.float32)) - old)
    tl.store(factors + matrix * size + j, new, mask)
    tl.store(roots + matrix * size + j, tl.div_rn(1.0, tl.sqrt_rn(new)), mask)
    if OF_ROWS:
        means = scratch_ptr + tl.load(table + MEANS)
        tl.store(means + number, tl.sum(tl.where(mask, new, 0.0)))


@triton.jit
def mean_root(table, scratch_ptr, matrix, eps1, FACTORS: tl.constexpr, TOTALS: tl.constexpr):
    """The root of the mean of a matrix' row factors."""
    rows = tl.load(table + ROWS)
    blocks = (rows + FACTORS - 1) // FACTORS
    means = scratch_ptr + tl.load(table + MEANS) + matrix * blocks
    lanes = tl.arange(0, TOTALS)
    total = tl.zeros((TOTALS,), tl.float32)
    for start in range(0, blocks, TOTALS):
        total += tl.load(means + start + lanes, start + lanes < blocks, other=0.0)
    mean = tl.div_rn(tl.sum(total), rows.to(tl.float32))
    return tl.sqrt_rn(tl.maximum(mean, eps1))


@triton.jit
def load_weight(
    p_ptr, master_ptr, remainder_ptr, at, mask, MASTER: tl.constexpr, REMAINDER: tl.constexpr
):
    if MASTER:
        return tl.load(master_ptr + at, mask, other=0.0)
    x = tl.load(p_ptr + at, mask, other=0.0).to(tl.float32)
    if REMAINDER:
        x += tl.load(remainder_ptr + at, mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def squares_kernel(
    tensors_ptr,
    tiles_ptr,
    scratch_ptr,
    squares_ptr,  # float32 [programs, 2]: of the update, of the weights
    coefficients_ptr,
    scale,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    REMAINDER: tl.constexpr,
    FACTORED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROW_STEP: tl.constexpr,
    TILE_COLS: tl.constexpr,
    FACTORS: tl.constexpr,
    TOTALS: tl.constexpr,
):
    """Sums of squares of the update and of the weights; moves the variance."""
    tensor, table, matrix, row_tile, col_tile, cols = tile_of(tensors_ptr, tiles_ptr, ALIGNED)
    rows = tl.load(table + ROWS)
    p_ptr = pointer(table, 0, PARAM, ALIGNED)
    g_ptr = pointer(table, 1, GRAD, ALIGNED)
    v_ptr = pointer(table, 2, tl.float32, ALIGNED)
    master_ptr = pointer(table, 4, tl.float32, ALIGNED)
    remainder_ptr = pointer(table, 5, tl.bfloat16, ALIGNED)
    of_tensor = coefficients_ptr + 8 * tensor
    share = tl.load(of_tensor + SHARE)
    limit = tl.load(of_tensor + LIMIT)
    c = col_tile * TILE_COLS + tl.arange(0, TILE_COLS)
    row_roots = scratch_ptr + tl.load(table + ROW_ROOTS) + matrix * rows
    if FACTORED:
        above = mean_root(table, scratch_ptr, matrix, tl.load(of_tensor + EPS1), FACTORS, TOTALS)
        col_roots = scratch_ptr + tl.load(table + COL_ROOTS) + matrix * cols
        of_col = tl.load(col_roots + c, c < cols, other=0.0)
    updates = tl.zeros((ROW_STEP, TILE_COLS), tl.float32)
    weights = tl.zeros((ROW_STEP, TILE_COLS), tl.float32)
    for start in range(0, tl.minimum(rows - row_tile * TILE_ROWS, TILE_ROWS), ROW_STEP):
        r = row_tile * TILE_ROWS + start + tl.arange(0, ROW_STEP)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        at = (matrix * rows + r)[:, None] * cols + c[None, :]
        g = tl.load(g_ptr + at, mask, other=0.0).to(tl.float32) * scale
        x = load_weight(p_ptr, master_ptr, remainder_ptr, at, mask, MASTER, REMAINDER)
        if FACTORED:
            of_row = tl.load(row_roots + r, r < rows, other=0.0) * above
            inverse = of_row[:, None] * of_col[None, :]
        else:
            v = tl.load(v_ptr + at, mask, other=1.0)
            v += share * (g * g - v)
            tl.store(v_ptr + at, v, mask)
            inverse = tl.div_rn(1.0, tl.sqrt_rn(v))
        u = g * tl.minimum(inverse, limit)
        updates += u * u
        weights += x * x
    program = tl.program_id(0).to(tl.int64)
    tl.store(squares_ptr + 2 * program, tl.sum(updates))
    tl.store(squares_ptr + 2 * program + 1, tl.sum(weights))


@triton.jit
def scale_kernel(
    tensors_ptr,
    squares_ptr,
    coefficients_ptr,
    rates_ptr,  # float32 [tensors]: what the update is multiplied with
    numels_ptr,  # int64 [tensors]
    TOTALS: tl.constexpr,
):
    """rates: what each tensor's update is multiplied with, from its tiles' sums of squares."""
    tensor = tl.program_id(0).to(tl.int64)
    table = tensors_ptr + WIDTH * tensor
    first, count = tl.load(table + FIRST), tl.load(table + COUNT)
    lanes = tl.arange(0, TOTALS)
    updates = tl.zeros((TOTALS,), tl.float64)
    weights = tl.zeros((TOTALS,), tl.float64)
    for start in range(0, count, TOTALS):
        mask = start + lanes < count
        at = squares_ptr + 2 * (first + start + lanes)
        updates += tl.load(at, mask, other=0.0).to(tl.float64)
        weights += tl.load(at + 1, mask, other=0.0).to(tl.float64)
    numel = tl.load(numels_ptr + tensor).to(tl.float64)
    c_ptr = coefficients_ptr + 8 * tensor
    update = tl.sqrt_rn((tl.sum(updates) / numel).to(tl.float32))
    weight = tl.sqrt_rn((tl.sum(weights) / numel).to(tl.float32))
    size = tl.maximum(weight, tl.load(c_ptr + EPS2))
    over = tl.div_rn(update, tl.load(c_ptr + CLIP))
    # Not tl.maximum, which would drop a NaN.
    over = tl.where(over <= 1.0, 1.0, over)
    tl.store(rates_ptr + tensor, tl.div_rn(tl.load(c_ptr + RATE) * size, over))


@triton.jit
def apply_kernel(
    tensors_ptr,
    tiles_ptr,
    scratch_ptr,
    coefficients_ptr,
    rates_ptr,
    scale,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    REMAINDER: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    FACTORED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROW_STEP: tl.constexpr,
    TILE_COLS: tl.constexpr,
    FACTORS: tl.constexpr,
    TOTALS: tl.constexpr,
):
    """One tile's new weights; the gradient is set to zero where that was asked for."""
    tensor, table, matrix, row_tile, col_tile, cols = tile_of(tensors_ptr, tiles_ptr, ALIGNED)
    rows = tl.load(table + ROWS)
    p_ptr = pointer(table, 0, PARAM, ALIGNED)
    g_ptr = pointer(table, 1, GRAD, ALIGNED)
    v_ptr = pointer(table, 2, tl.float32, ALIGNED)
    master_ptr = pointer(table, 4, tl.float32, ALIGNED)
    remainder_ptr = pointer(table, 5, tl.bfloat16, ALIGNED)
    of_tensor = coefficients_ptr + 8 * tensor
    decay = tl.load(of_tensor + DECAY)
    threshold = tl.load(of_tensor + THRESHOLD)
    limit = tl.load(of_tensor + LIMIT)
    rate = tl.load(rates_ptr + tensor)
    c = col_tile * TILE_COLS + tl.arange(0, TILE_COLS)
    row_roots = scratch_ptr + tl.load(table + ROW_ROOTS) + matrix * rows
    if FACTORED:
        above = mean_root(table, scratch_ptr, matrix, tl.load(of_tensor + EPS1), FACTORS, TOTALS)
        col_roots = scratch_ptr + tl.load(table + COL_ROOTS) + matrix * cols
        of_col = tl.load(col_roots + c, c < cols, other=0.0)
    for start in range(0, tl.minimum(rows - row_tile * TILE_ROWS, TILE_ROWS), ROW_STEP):
        r = row_tile * TILE_ROWS + start + tl.arange(0, ROW_STEP)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        at = (matrix * rows + r)[:, None] * cols + c[None, :]
        g = tl.load(g_ptr + at, mask, other=0.0).to(tl.float32) * scale
        x = load_weight(p_ptr, master_ptr, remainder_ptr, at, mask, MASTER, REMAINDER)
        if FACTORED:
            of_row = tl.load(row_roots + r, r < rows, other=0.0) * above
            inverse = of_row[:, None] * of_col[None, :]
        else:
            inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(v_ptr + at, mask, other=1.0)))
        x = x - decay * x - rate * (g * tl.minimum(inverse, limit))
        x = tl.where(x > threshold, x - threshold, tl.where(x < -threshold, x + threshold, x * 0))
        if MASTER:
            tl.store(master_ptr + at, x, mask)
        rounded = x.to(PARAM)
        tl.store(p_ptr + at, rounded, mask)
        if REMAINDER:
            tl.store(remainder_ptr + at, (x - rounded.to(tl.float32)).to(tl.bfloat16), mask)
        if ZERO_GRADS:
            tl.store(g_ptr + at, tl.zeros((ROW_STEP, TILE_COLS), GRAD), mask)


@dataclass(frozen=True)
class _Kind:
    """What is fixed when a kernel is compiled."""

    param: torch.dtype
    grad: torch.dtype
    factored: bool
    aligned: bool  # addresses of 16 bytes, columns in multiples of 16


@dataclass(frozen=True)
class _Launch:
    """Tensors of the same kind: their numbers, tables, scratch memory."""

    indices: list[int]
    table: Tensor  # int64 [tensors, WIDTH]
    numels: Tensor  # int64 [tensors]
    tiles: Tensor  # int64 [programs, 2]: tensor, number in it
    blocks: tuple[Tensor, Tensor]  # the same of blocks of row and column factors
    scratch: Tensor
    squares: Tensor  # float32 [programs, 2]
    constants: dict[str, Any]

    @property
    def shape(self) -> dict[str, int]:
        if not self.constants["FACTORED"]:
            return {"TILE_ROWS": 1, "ROW_STEP": 1, "TILE_COLS": VECTOR}
        return {"TILE_ROWS": TILE_ROWS, "ROW_STEP": ROW_STEP, "TILE_COLS": TILE_COLS}


class Plan:
    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._contiguous = Contiguous(tensors)
        self._columns = [self._contiguous.column(name) for name in COLUMNS if name != "grads"]
        self._launches: list[_Launch] = []
        self._made_for: list[tuple[int, torch.dtype]] = []

    def step(self, grads: list[Tensor], options: Options, scale: float, zero_grads: bool) -> None:
        with self._contiguous.step(grads, zero_grads) as used:
            made_for = [(g.data_ptr(), g.dtype) for g in used]
            if made_for != self._made_for:
                self._launches, self._made_for = self._make(used), made_for
            counts = [step.add_(1).item() for step in self._tensors.steps]
            numbers = {t: options.coefficients(t) for t in set(counts)}
            for launch in self._launches:
                rows = [numbers[counts[i]] for i in launch.indices]
                table = torch.tensor([[*row, _limit(row[2])] for row in rows], dtype=torch.float32)
                _run(launch, table.to(launch.table.device), scale, zero_grads)

    def _make(self, grads: Sequence[Tensor]) -> list[_Launch]:
        groups: dict[_Kind, list[tuple[int, list[int]]]] = defaultdict(list)
        for i, (p, g) in enumerate(zip(self._tensors.params, grads, strict=True)):
            if g.numel() == 0:
                continue
            row = [address_of(column[i]) for column in self._columns]
            row.insert(1, g.data_ptr())
            aligned = all(address % 16 == 0 for address in row) and p.shape[-1:].numel() % 16 == 0
            groups[_Kind(p.dtype, g.dtype, p.ndim >= 2, aligned)].append((i, row))
        return [self._launch(kind, members) for kind, members in groups.items()]

    def _launch(self, kind: _Kind, members: list[tuple[int, list[int]]]) -> _Launch:
        """The tables that the kernels of one kind of tensors read, on the device."""
        device = self._tensors.params[0].device
        indices = [i for i, _ in members]
        shapes = torch.tensor([matrices_of(self._tensors.params[i].shape) for i in indices])
        matrices, rows, cols = shapes.unbind(1)
        row_tiles = _blocks(rows, TILE_ROWS if kind.factored else 1)
        col_tiles = _blocks(cols, TILE_COLS if kind.factored else VECTOR)
        tiles = matrices * row_tiles * col_tiles
        row_blocks = matrices * _blocks(rows, FACTORS)
        col_blocks = matrices * _blocks(cols, FACTORS)
        sums = [matrices * rows * col_tiles, matrices * cols * row_tiles]
        roots = [matrices * rows, matrices * cols]
        sizes = torch.stack([*sums, *roots, row_blocks], 1) * kind.factored
        sizes = _blocks(sizes, 4) * 4  # so that each begins on 16 bytes
        ends = sizes.flatten().cumsum(0)
        places = (ends - sizes.flatten()).view_as(sizes)
        extra = torch.stack([tiles.cumsum(0) - tiles, tiles], 1)
        geometry = torch.stack([rows, cols, row_tiles, col_tiles], 1)
        addresses = torch.tensor([row for _, row in members])
        return _Launch(
            indices,
            torch.cat([addresses, geometry, places, extra], 1).to(device),
            shapes.prod(1).to(device),
            _numbered(tiles).to(device),
            (_numbered(row_blocks).to(device), _numbered(col_blocks).to(device)),
            torch.empty(int(ends[-1]), device=device),
            torch.empty(int(tiles.sum()), 2, device=device),
            {
                "PARAM": TL_DTYPES[kind.param],
                "GRAD": TL_DTYPES[kind.grad],
                "MASTER": bool(self._tensors.masters),
                "REMAINDER": bool(self._tensors.compensations),
                "FACTORED": kind.factored,
                "ALIGNED": kind.aligned,
            },
        )


def _blocks(size: Tensor, block: int) -> Tensor:
    return (size + block - 1) // block


def _numbered(counts: Tensor) -> Tensor:
    """int64 [programs, 2]: for each tensor its number and 0, 1, ... up to its count."""
    index = torch.repeat_interleave(counts)
    return torch.stack((index, torch.arange(len(index)) - (counts.cumsum(0) - counts)[index]), 1)


def _limit(eps1: float) -> float:
    """The limit of 1 / sqrt(second moment): finite, so that a gradient of 0 moves no weight."""
    return min(1 / eps1, 2.0**127) if eps1 else 2.0**127


def _run(launch: _Launch, coefficients: Tensor, scale: float, zero_grads: bool) -> None:
    """The passes of one step over the tensors of a launch, one after the other on the device."""
    tables = (launch.table, launch.tiles, launch.scratch)
    tiles = (len(launch.tiles),)
    constants = launch.constants | launch.shape
    of_sums = {name: constants[name] for name in ("GRAD", "ALIGNED", *launch.shape)}
    totals = {"FACTORS": FACTORS, "TOTALS": TOTALS}
    if constants["FACTORED"]:
        sums_kernel[tiles](*tables, scale, **of_sums, num_warps=NUM_WARPS)
        for of_rows, blocks in zip((True, False), launch.blocks, strict=True):
            factors_kernel[(len(blocks),)](
                launch.table,
                blocks,
                launch.scratch,
                coefficients,
                OF_ROWS=of_rows,
                FACTORS=FACTORS,
                num_warps=NUM_WARPS,
            )
    squares_kernel[tiles](
        *tables, launch.squares, coefficients, scale, **constants, **totals, num_warps=NUM_WARPS
    )
    rates = torch.empty(len(launch.indices), device=coefficients.device)
    scale_kernel[(len(launch.indices),)](
        launch.table,
        launch.squares,
        coefficients,
        rates,
        launch.numels,
        TOTALS=TOTALS,
        num_warps=NUM_WARPS,
    )
    apply_kernel[tiles](
        *tables,
        coefficients,
        rates,
        scale,
        **constants,
        **totals,
        ZERO_GRADS=zero_grads,
        num_warps=NUM_WARPS,
    )


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip."""
    types = {"tensors_ptr": "*i64", "tiles_ptr": "*i64", "blocks_ptr": "*i64"}
    types |= {"scratch_ptr": "*fp32", "squares_ptr": "*fp32", "coefficients_ptr": "*fp32"}
    types |= {"rates_ptr": "*fp32", "numels_ptr": "*i64", "scale": "fp32"}
    aligned = tuple(name for name in types if name != "scale")
    cases = []

    def add(name: str, kernel: Any, **constants: Any) -> None:
        used = {k: v for k, v in constants.items() if k in kernel.arg_names}
        cases.append(CompileCase(name, kernel, types, used, aligned, NUM_WARPS))

    f32, bf16 = tl.float32, tl.bfloat16
    matrix = {"TILE_ROWS": TILE_ROWS, "ROW_STEP": ROW_STEP, "TILE_COLS": TILE_COLS}
    vector = {"TILE_ROWS": 1, "ROW_STEP": 1, "TILE_COLS": VECTOR}
    common = {"ALIGNED": True, "FACTORS": FACTORS, "TOTALS": TOTALS, "ZERO_GRADS": True}
    for what, dtype, master in (("float32", f32, False), ("bfloat16 with masters", bf16, True)):
        kinds = common | {"PARAM": dtype, "GRAD": dtype, "MASTER": master, "REMAINDER": False}
        add(f"sums, {what}", sums_kernel, **kinds, **matrix)
        for kind, shape in (("matrix", matrix), ("vector", vector)):
            factored = {"FACTORED": kind == "matrix"}
            add(f"squares, {kind}, {what}", squares_kernel, **kinds, **factored, **shape)
            add(f"apply, {kind}, {what}", apply_kernel, **kinds, **factored, **shape)
    add("row factors", factors_kernel, **common, OF_ROWS=True)
    add("column factors", factors_kernel, **common, OF_ROWS=False)
    add("scale", scale_kernel, **common)
    return cases
