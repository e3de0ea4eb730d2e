"""Attention in Triton, forward: the kernel, and what it shares with the backward ones.

A program holds BLOCK_M queries and walks over the tiles of keys that they see. Tiles that the
window, the causal triangle or the ends of a sequence rule out are not walked over, and only those
that they cut are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradsmith_kernels.ops.common.triton_math import LN2, LOG2E, power, tanh


@triton.jit
def sequence(cu_seqlens, b, rows, VARLEN: tl.constexpr):
    """Where sequence b begins, and its length; inside the tensor whatever cu_seqlens holds."""
    if VARLEN:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), begin), rows)
        return begin, end - begin
    else:
        return 0, rows


@triton.jit
def head_rows(source, batch, h, begin, batch_stride, row_stride, head_stride, TMA: tl.constexpr):
    """Where a sequence's first row is in one head: an address, or a descriptor and its indices."""
    if TMA:
        return source, batch, h, begin
    else:
        offset = tl.cast(batch, tl.int64) * batch_stride + tl.cast(begin, tl.int64) * row_stride
        return source + offset + tl.cast(h, tl.int64) * head_stride


@triton.jit
def contiguous_rows(pointer, batch, h, begin, rows, heads, HEAD: tl.constexpr):
    """That address in a contiguous (batch, rows, heads, HEAD)."""
    return pointer + ((tl.cast(batch, tl.int64) * rows + begin) * heads + h) * HEAD


@triton.jit
def statistics_rows(pointer, batch, h, begin, rows, heads):
    """The same in lse and delta, (batch, heads, rows)."""
    return pointer + (tl.cast(batch, tl.int64) * heads + h) * rows + begin


@triton.jit
def tile_addresses(base, row, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # 64 bits to the tile, 32 bits inside it: the launcher copies what has larger strides.
    at = tl.arange(0, ROWS)[:, None] * tl.cast(stride, tl.int32) + tl.arange(0, BLOCK_D)[None, :]
    return base + tl.cast(row, tl.int64) * stride + at


@triton.jit
def tile_mask(row, end, ROWS: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    return (row + tl.arange(0, ROWS)[:, None] < end) & (tl.arange(0, BLOCK_D)[None, :] < HEAD)


@triton.jit
def load_tile(
    base,
    row,
    end,
    stride,
    MASKED: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(ROWS, BLOCK_D) from `row` on; 0 from row `end` (if MASKED) and column HEAD on."""
    if TMA:
        tile = base[0].load([base[1], base[2], base[3] + row, 0]).reshape(ROWS, BLOCK_D)
        if MASKED and VARLEN:  # the rows of the next sequence, which might be NaN
            tile = tl.where(row + tl.arange(0, ROWS)[:, None] < end, tile, 0.0)
        return tile
    else:
        addresses = tile_addresses(base, row, stride, ROWS, BLOCK_D)
        if MASKED:
            return tl.load(addresses, tile_mask(row, end, ROWS, HEAD, BLOCK_D), 0.0)
        elif HEAD < BLOCK_D:
            return tl.load(addresses, tl.arange(0, BLOCK_D)[None, :] < HEAD, 0.0)
        else:
            return tl.load(addresses)


@triton.jit
def store_tile(
    base, row, end, stride, tile, ROWS: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr
):
    addresses = tile_addresses(base, row, stride, ROWS, BLOCK_D)
    mask = tile_mask(row, end, ROWS, HEAD, BLOCK_D)
    tl.store(addresses, tile.to(base.dtype.element_ty), mask)


@triton.jit
def spans(first, first_full, end_full, end, BLOCK: tl.constexpr):
    """Tiles from lo to full_lo and from full_hi to hi are cut by a border, the others are not."""
    lo = tl.maximum(first, 0) // BLOCK
    hi = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK), lo)
    full_lo = tl.minimum(tl.cdiv(tl.maximum(first_full, 0), BLOCK), hi)
    full_hi = tl.maximum(tl.maximum(end_full, 0) // BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def tile_count(lo, full_lo, full_hi, hi, CUT: tl.constexpr):
    return (full_lo - lo) + (hi - full_hi) if CUT else full_hi - full_lo


@triton.jit
def tile_number(t, lo, full_lo, full_hi, CUT: tl.constexpr):
    """The t-th of the tiles that a border cuts, or of those that none cuts."""
    if CUT:
        return tl.where(lo + t < full_lo, lo + t, lo + t + full_hi - full_lo)
    else:
        return full_lo + t


@triton.jit
def keys_of(
    m,
    queries,
    keys,
    left,
    right,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The `spans` of keys for the tile of queries at m."""
    shift = keys - queries  # query i is aligned with key i + shift
    last = tl.minimum(m + BLOCK_M, queries) - 1
    first = m + shift - left if LEFT else 0
    first_full = last + shift - left if LEFT else 0
    end_full = tl.minimum(keys, m + shift + right + 1) if RIGHT else keys
    end = tl.minimum(keys, last + shift + right + 1) if RIGHT else keys
    return spans(first, first_full, end_full, end, BLOCK_N)


@triton.jit
def visible(inside, i, j, shift, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which of the pairs that are inside the sequence the window allows.

    i and j are a row and a column, or the other way round; of what the program holds, rows after
    the sequence's end may be anything, because they are not stored.
    """
    distance = j - i - shift
    if LEFT:
        inside &= distance >= -left
    if RIGHT:
        inside &= distance <= right
    return inside


@triton.jit
def kept(seed, i, j, h, b, threshold):
    """What dropout keeps; the counter is that of reference.py."""
    return tl.philox(seed, j, i, h, b, n_rounds=7)[0] >= tl.cast(threshold, tl.uint32)


# Sizes that change from call to call, and no vector's width hangs on: one compilation for all.
SIZES = ["rows_q", "rows_k", "heads", "group", "tiles", "left", "right", "threshold"]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    lse_remainder_ptr,
    sink_ptr,
    seed_ptr,
    cu_q_ptr,
    cu_k_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    rows_q,
    rows_k,
    heads,
    group,
    tiles,
    factor,
    inner,
    left,
    right,
    threshold,
    keep_scale,
    TMA: tl.constexpr,
    VARLEN: tl.constexpr,
    SINK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse of BLOCK_M queries of one head of one sequence."""
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    tile, h, b = program % tiles, program // tiles % heads, program // tiles // heads
    if RIGHT:
        tile = tiles - 1 - tile  # the last queries see most keys: the longest programs first
    begin_q, queries = sequence(cu_q_ptr, b, rows_q, VARLEN)
    begin_k, keys = sequence(cu_k_ptr, b, rows_k, VARLEN)
    m = tile * BLOCK_M
    if m >= queries:
        return
    batch = 0 if VARLEN else b
    q = head_rows(q_ptr, batch, h, begin_q, q_batch, q_row, q_head, TMA)
    k = head_rows(k_ptr, batch, h // group, begin_k, k_batch, k_row, k_head, TMA)
    v = head_rows(v_ptr, batch, h // group, begin_k, v_batch, v_row, v_head, TMA)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    i = m + tl.arange(0, BLOCK_M)

    q_tile = load_tile(q, m, queries, q_row, True, VARLEN, TMA, BLOCK_M, HEAD, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SINK:
        sink = tl.load(sink_ptr + h).to(tl.float32)
        peak = tl.full([BLOCK_M], 1.0, tl.float32) * (sink if EXACT else sink * LOG2E)
        total = tl.where(peak == -float("inf"), 0.0, 1.0)
    else:
        peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

    lo, full_lo, full_hi, hi = keys_of(m, queries, keys, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    for WHOLE in tl.static_range(2):
        for t in range(tile_count(lo, full_lo, full_hi, hi, WHOLE == 0)):
            n = tile_number(t, lo, full_lo, full_hi, WHOLE == 0) * BLOCK_N
            k_tile = load_tile(k, n, keys, k_row, WHOLE == 0, VARLEN, TMA, BLOCK_N, HEAD, BLOCK_D)
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if SOFTCAP:
                x = tanh(x * inner, EXACT)
            j = n + tl.arange(0, BLOCK_N)[None, :]
            if WHOLE == 1:
                new_peak = tl.maximum(peak, tl.max(x, 1) * factor)
                base = new_peak
                p = power(x * factor - base[:, None], EXACT)
            else:
                mask = visible(j < keys, i[:, None], j, keys - queries, left, right, LEFT, RIGHT)
                x = tl.where(mask, x * factor, -float("inf"))
                new_peak = tl.maximum(peak, tl.max(x, 1))
                base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # saw no key yet
                p = power(x - base[:, None], EXACT)
            rescale = power(peak - base, EXACT)
            peak = new_peak
            total = total * rescale + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(kept(seed, i[:, None], j, h, b, threshold), p, 0.0)
            v_tile = load_tile(v, n, keys, v_row, WHOLE == 0, VARLEN, TMA, BLOCK_N, HEAD, BLOCK_D)
            acc = acc * rescale[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")

    normalizer = tl.where(total > 0, keep_scale / total, 0.0)
    out = contiguous_rows(out_ptr, batch, h, begin_q, rows_q, heads, HEAD)
    store_tile(out, m, queries, heads * HEAD, acc * normalizer[:, None], BLOCK_M, HEAD, BLOCK_D)
    at = statistics_rows(0, batch, h, begin_q, rows_q, heads) + i
    if EXACT:
        exact = peak.to(tl.float64) + tl.log(tl.where(total > 0, total, 1.0).to(tl.float64))
        lse = tl.where(total > 0, exact, -float("inf")).to(tl.float32)
        lse_remainder = tl.where(total > 0, exact - lse, 0.0).to(tl.float32)
        tl.store(lse_remainder_ptr + at, lse_remainder, i < queries)
    else:
        lse = tl.where(total > 0, (peak + tl.log2(total)) * LN2, -float("inf"))
    tl.store(lse_ptr + at, lse, i < queries)
