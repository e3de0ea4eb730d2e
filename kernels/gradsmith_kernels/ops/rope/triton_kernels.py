"""Rotary embedding in Triton: one kernel over q and k, and its launcher.

A program is one position: it loads the angles once and walks through the heads, q's and then k's,
HEADS of them at a time. Launch options follow from the shape alone (no autotuning).

Shapes as in op.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsmith_kernels.ops.common.native import adjacent
from gradsmith_kernels.verify.spec import CompileCase


@triton.jit
def load_pairs(row, at, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both elements of the pairs in some rows, in float32; `at`: where the first ones are, or all
    of them."""
    if INTERLEAVED:
        both = tl.load(row + at, mask, 0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [both.shape[0], both.shape[1] // 2, 2]))
    else:
        a = tl.load(row + at, mask, 0.0).to(tl.float32)
        b = tl.load(row + HALF + at, mask, 0.0).to(tl.float32)
    return a, b


@triton.jit
def rotate_heads(
    x,
    y,
    x_head,
    heads,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
):
    """All heads of one tensor at one position, from x to y."""
    half: tl.constexpr = ROTATED // 2
    dtype = y.dtype.element_ty
    at = tl.arange(0, COLUMNS)[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        # 32 bits do for y, where a position's heads are adjacent; for x, heads may be far apart.
        x_row, y_row = x + head.to(tl.int64) * x_head, y + head * SIZE
        mask = (head < heads) & (at < (ROTATED if INTERLEAVED else half))
        a, b = load_pairs(x_row, at, mask, half, INTERLEAVED)
        turned_a = (a * cos_a - b * sin_a).to(dtype)
        turned_b = (b * cos_b + a * sin_b).to(dtype)
        if INTERLEAVED:
            tl.store(y_row + at, tl.reshape(tl.join(turned_a, turned_b), [HEADS, COLUMNS]), mask)
        else:
            tl.store(y_row + at, turned_a, mask)
            tl.store(y_row + half + at, turned_b, mask)
        if ROTATED < SIZE:
            rest = ROTATED + tl.arange(0, REST)[None, :]
            outside = (head < heads) & (rest < SIZE)
            tl.store(y_row + rest, tl.load(x_row + rest, outside), outside)


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    length,
    heads,
    key_heads,
    SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotates all heads of q and k at one position."""
    program = tl.program_id(0)
    batch, row = (program // length).to(tl.int64), (program % length).to(tl.int64)
    half: tl.constexpr = ROTATED // 2
    at = tl.arange(0, COLUMNS)[None, :]
    inside = at < (ROTATED if INTERLEAVED else half)
    cos = cos_ptr + batch * cos_batch + row * cos_row
    sin = sin_ptr + batch * sin_batch + row * sin_row
    cos_a, cos_b = load_pairs(cos, at, inside, half, INTERLEAVED)
    sin_a, sin_b = load_pairs(sin, at, inside, half, INTERLEAVED)
    if TRANSPOSED:
        sin_a, sin_b = -sin_b, -sin_a
    rotate_heads(
        q_ptr + batch * q_batch + row * q_row,
        q_out_ptr + program.to(tl.int64) * heads * SIZE,
        q_head,
        heads,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        SIZE,
        ROTATED,
        INTERLEAVED,
        HEADS,
        COLUMNS,
        REST,
    )
    rotate_heads(
        k_ptr + batch * k_batch + row * k_row,
        k_out_ptr + program.to(tl.int64) * key_heads * SIZE,
        k_head,
        key_heads,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        SIZE,
        ROTATED,
        INTERLEAVED,
        HEADS,
        COLUMNS,
        REST,
    )


def _tile(heads: int, size: int, rotated: int, interleaved: bool) -> tuple[dict[str, int], int]:
    """HEADS, COLUMNS, REST and num_warps: 16 pairs a thread of 32, in one or two warps.

    Where few heads do not fill that, some threads idle: with fewer pairs, loads were narrower.
    """
    half = triton.next_power_of_2(rotated // 2)
    pairs = min(1024, max(512, half * triton.next_power_of_2(heads)))
    constants = {
        "HEADS": max(1, pairs // half),
        "COLUMNS": 2 * half if interleaved else half,
        "REST": triton.next_power_of_2(max(1, size - rotated)),
    }
    return constants, pairs // 512


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Of batch, 0 where all sequences share one, and of rows."""
    return table.stride(0) if table.shape[0] > 1 else 0, table.stride(1)


def rotate(
    tensors: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> list[Tensor]:
    """The tensors (B, S, H, D) rotated by cos and sin (B or 1, S, R); contiguous."""
    y = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    q, k = adjacent(tensors[0]), adjacent(tensors[-1])
    cos, sin = adjacent(cos), adjacent(sin)
    batch, length, heads, size = q.shape
    # Of one tensor alone, k is the same again, and has no heads to rotate.
    key_heads = k.shape[2] if len(tensors) > 1 else 0
    if batch * length * (heads + key_heads) == 0:
        return y
    tile, num_warps = _tile(max(heads, key_heads), size, cos.shape[2], interleaved)
    rope_kernel[(batch * length,)](
        q,
        k,
        cos,
        sin,
        y[0],
        y[-1],
        *q.stride()[:3],
        *k.stride()[:3],
        *_table_strides(cos),
        *_table_strides(sin),
        length,
        heads,
        key_heads,
        SIZE=size,
        ROTATED=cos.shape[2],
        INTERLEAVED=interleaved,
        TRANSPOSED=transposed,
        num_warps=num_warps,
        enable_fp_fusion=True,
        **tile,
    )
    return y


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip: bfloat16, the shapes of training."""
    pointers = dict.fromkeys(
        ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr"), "*bf16"
    )
    strides = tuple(f"{x}_{of}" for x in "qk" for of in ("batch", "row", "head"))
    strides += ("cos_batch", "cos_row", "sin_batch", "sin_row")
    types = pointers | dict.fromkeys((*strides, "length", "heads", "key_heads"), "i32")
    cases = []
    for heads, key_heads, size, rotated, interleaved in (
        (6, 6, 64, 64, False),
        (32, 8, 128, 128, False),
        (32, 8, 128, 128, True),
        (32, 32, 96, 48, False),
    ):
        tile, num_warps = _tile(max(heads, key_heads), size, rotated, interleaved)
        for transposed in (False, True):
            constants = {"SIZE": size, "ROTATED": rotated, **tile}
            constants |= {"INTERLEAVED": interleaved, "TRANSPOSED": transposed}
            name = f"rope {'backward' if transposed else 'forward'} {heads}+{key_heads} heads"
            name += f", {rotated} of {size}" + ", interleaved" * interleaved
            cases.append(
                CompileCase(name, rope_kernel, types, constants, (*pointers, *strides), num_warps)
            )
    return cases
