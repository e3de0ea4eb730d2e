"""Attention in Triton, backward: kernels for delta, for dq, and for dk and dv.

One program holds queries and walks over the keys that they see, for dq; another holds keys and
walks over the queries that see them, for dk and dv. Both compute the scores again, so no two
programs add to the same element: there are no atomics, and the order of every sum follows from the
shape. The price is seven matrix products where one walk with atomics needs five.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradsmith_kernels.ops.attention.triton_forward import (
    SIZES,
    contiguous_rows,
    head_rows,
    kept,
    keys_of,
    load_tile,
    sequence,
    spans,
    statistics_rows,
    store_tile,
    tile_count,
    tile_number,
    visible,
)
from gradsmith_kernels.ops.common.triton_math import LOG2E, power, tanh


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    out_batch,
    out_row,
    out_head,
    dout_batch,
    dout_row,
    dout_head,
    rows_q,
    heads,
    tiles,
    DLSE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta = sum over D of dout * out, less dlse; 0 for rows that see no key."""
    program = tl.program_id(0)
    tile, h, batch = program % tiles, program // tiles % heads, program // tiles // heads
    m = tile * BLOCK_M
    i = m + tl.arange(0, BLOCK_M)
    out = head_rows(out_ptr, batch, h, 0, out_batch, out_row, out_head, False)
    dout = head_rows(dout_ptr, batch, h, 0, dout_batch, dout_row, dout_head, False)
    out_tile = load_tile(out, m, rows_q, out_row, True, False, False, BLOCK_M, HEAD, BLOCK_D)
    dout_tile = load_tile(dout, m, rows_q, dout_row, True, False, False, BLOCK_M, HEAD, BLOCK_D)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    at = statistics_rows(0, batch, h, 0, rows_q, heads) + i
    if DLSE:
        delta -= tl.load(dlse_ptr + at, i < rows_q, 0.0)
    lse = tl.load(lse_ptr + at, i < rows_q, 0.0)
    tl.store(delta_ptr + at, tl.where(lse == -float("inf"), 0.0, delta), i < rows_q)


@triton.jit
def weigh(
    products,
    dp,
    i,
    j,
    h,
    b,
    seed,
    lse,
    lse_remainder,
    inside,
    shift,
    factor,
    inner,
    left,
    right,
    threshold,
    keep_scale,
    MASKED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """From q.k and dout.v: p; p as it met v (but for keep_scale); its gradient; softcap's slope."""
    x = tanh(products * inner, EXACT) if SOFTCAP else products
    if EXACT:
        # score - lse is larger than any score - peak of the forward pass: so with what it loses.
        score = x * factor
        exponent = score - lse
        back = exponent - score
        lost = (score - (exponent - back)) - (lse + back)
        p = power(exponent, EXACT) * (1 + (lost - lse_remainder))
    else:
        p = power(x * factor - lse * LOG2E, EXACT)
    if MASKED:
        p = tl.where(visible(inside, i, j, shift, left, right, LEFT, RIGHT), p, 0.0)
    dropped = p
    if DROPOUT:
        keep = kept(seed, i, j, h, b, threshold)
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    slope = 1 - x * x if SOFTCAP else 1.0
    return p, dropped, dp, slope


@triton.jit
def load_row(pointer, i, queries, MASKED: tl.constexpr):
    return tl.load(pointer + i, i < queries, 0.0) if MASKED else tl.load(pointer + i)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    lse_remainder_ptr,
    dlse_ptr,
    delta_ptr,
    dq_ptr,
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
    dout_batch,
    dout_row,
    dout_head,
    rows_q,
    rows_k,
    heads,
    group,
    tiles,
    scale,
    factor,
    inner,
    left,
    right,
    threshold,
    keep_scale,
    DLSE: tl.constexpr,
    TMA: tl.constexpr,
    VARLEN: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq of BLOCK_M queries of one head of one sequence; the walk of `forward_kernel`.

    Launched before `key_gradient_kernel`, because it replaces delta where few keys are seen.
    """
    EXACT: tl.constexpr = dq_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    tile, h, b = program % tiles, program // tiles % heads, program // tiles // heads
    if RIGHT:
        tile = tiles - 1 - tile
    begin_q, queries = sequence(cu_q_ptr, b, rows_q, VARLEN)
    begin_k, keys = sequence(cu_k_ptr, b, rows_k, VARLEN)
    m = tile * BLOCK_M
    if m >= queries:
        return
    batch = 0 if VARLEN else b
    q = head_rows(q_ptr, batch, h, begin_q, q_batch, q_row, q_head, TMA)
    k = head_rows(k_ptr, batch, h // group, begin_k, k_batch, k_row, k_head, TMA)
    v = head_rows(v_ptr, batch, h // group, begin_k, v_batch, v_row, v_head, TMA)
    dout = head_rows(dout_ptr, batch, h, begin_q, dout_batch, dout_row, dout_head, TMA)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    i = m + tl.arange(0, BLOCK_M)

    q_tile = load_tile(q, m, queries, q_row, True, VARLEN, TMA, BLOCK_M, HEAD, BLOCK_D)
    dout_tile = load_tile(dout, m, queries, dout_row, True, VARLEN, TMA, BLOCK_M, HEAD, BLOCK_D)
    at = statistics_rows(0, batch, h, begin_q, rows_q, heads) + i
    lse = tl.load(lse_ptr + at, i < queries, 0.0)[:, None]
    lse_remainder = tl.load(lse_remainder_ptr + at, i < queries, 0.0)[:, None] if EXACT else 0.0
    delta = tl.load(delta_ptr + at, i < queries, 0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    lo, full_lo, full_hi, hi = keys_of(m, queries, keys, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    if (hi - lo) * BLOCK_N <= BLOCK_M + BLOCK_N:
        # Where a query sees few keys, dp - delta is small, and shows that out was rounded. The sum
        # of p * dp is delta, too.
        delta = tl.zeros([BLOCK_M], tl.float32)
        for t in range(lo, hi):
            n = t * BLOCK_N
            k_tile = load_tile(k, n, keys, k_row, True, VARLEN, TMA, BLOCK_N, HEAD, BLOCK_D)
            v_tile = load_tile(v, n, keys, v_row, True, VARLEN, TMA, BLOCK_N, HEAD, BLOCK_D)
            p, _, dp, _ = weigh(
                tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"),
                tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee"),
                i[:, None],
                n + tl.arange(0, BLOCK_N)[None, :],
                h,
                b,
                seed,
                lse,
                lse_remainder,
                n + tl.arange(0, BLOCK_N)[None, :] < keys,
                keys - queries,
                factor,
                inner,
                left,
                right,
                threshold,
                keep_scale,
                True,
                LEFT,
                RIGHT,
                SOFTCAP,
                DROPOUT,
                EXACT,
            )
            delta += tl.sum(p * dp, 1)
        if DLSE:
            delta -= tl.load(dlse_ptr + at, i < queries, 0.0)
        tl.store(delta_ptr + at, delta, i < queries)

    for WHOLE in tl.static_range(2):
        for t in range(tile_count(lo, full_lo, full_hi, hi, WHOLE == 0)):
            n = tile_number(t, lo, full_lo, full_hi, WHOLE == 0) * BLOCK_N
            k_tile = load_tile(k, n, keys, k_row, WHOLE == 0, VARLEN, TMA, BLOCK_N, HEAD, BLOCK_D)
            v_tile = load_tile(v, n, keys, v_row, WHOLE == 0, VARLEN, TMA, BLOCK_N, HEAD, BLOCK_D)
            p, _, dp, slope = weigh(
                tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"),
                tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee"),
                i[:, None],
                n + tl.arange(0, BLOCK_N)[None, :],
                h,
                b,
                seed,
                lse,
                lse_remainder,
                n + tl.arange(0, BLOCK_N)[None, :] < keys,
                keys - queries,
                factor,
                inner,
                left,
                right,
                threshold,
                keep_scale,
                WHOLE == 0,
                LEFT,
                RIGHT,
                SOFTCAP,
                DROPOUT,
                EXACT,
            )
            ds = p * (dp - delta[:, None]) * slope
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")

    out = contiguous_rows(dq_ptr, batch, h, begin_q, rows_q, heads, HEAD)
    store_tile(out, m, queries, heads * HEAD, dq * scale, BLOCK_M, HEAD, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    lse_remainder_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    dout_batch,
    dout_row,
    dout_head,
    rows_q,
    rows_k,
    heads,
    group,
    tiles,
    scale,
    factor,
    inner,
    left,
    right,
    threshold,
    keep_scale,
    TMA: tl.constexpr,
    VARLEN: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one key head, over the query heads of its group in order."""
    EXACT: tl.constexpr = dk_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    key_heads = heads // group
    tile, b = program % tiles, program // tiles // key_heads
    key_head = program // tiles % key_heads
    begin_q, queries = sequence(cu_q_ptr, b, rows_q, VARLEN)
    begin_k, keys = sequence(cu_k_ptr, b, rows_k, VARLEN)
    n = tile * BLOCK_N
    if n >= keys:
        return
    batch = 0 if VARLEN else b
    k = head_rows(k_ptr, batch, key_head, begin_k, k_batch, k_row, k_head, TMA)
    v = head_rows(v_ptr, batch, key_head, begin_k, v_batch, v_row, v_head, TMA)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    j = n + tl.arange(0, BLOCK_N)

    k_tile = load_tile(k, n, keys, k_row, True, VARLEN, TMA, BLOCK_N, HEAD, BLOCK_D)
    v_tile = load_tile(v, n, keys, v_row, True, VARLEN, TMA, BLOCK_N, HEAD, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    shift = keys - queries  # query i is aligned with key i + shift
    last = tl.minimum(n + BLOCK_N, keys) - 1
    first = n - shift - right if RIGHT else 0
    first_full = last - shift - right if RIGHT else 0
    end_full = tl.minimum(queries, n - shift + left + 1) if LEFT else queries
    end = tl.minimum(queries, last - shift + left + 1) if LEFT else queries
    lo, full_lo, full_hi, hi = spans(first, first_full, end_full, end, BLOCK_M)
    # Without disable_licm the addresses of both loops wait in registers that the sums need.
    for h in tl.range(key_head * group, key_head * group + group, disable_licm=True):
        q = head_rows(q_ptr, batch, h, begin_q, q_batch, q_row, q_head, TMA)
        dout = head_rows(dout_ptr, batch, h, begin_q, dout_batch, dout_row, dout_head, TMA)
        statistics = statistics_rows(0, batch, h, begin_q, rows_q, heads)
        for WHOLE in tl.static_range(2):
            tiles_here = tile_count(lo, full_lo, full_hi, hi, WHOLE == 0)
            for t in tl.range(tiles_here, disable_licm=True):
                m = tile_number(t, lo, full_lo, full_hi, WHOLE == 0) * BLOCK_M
                q_tile = load_tile(
                    q, m, queries, q_row, WHOLE == 0, VARLEN, TMA, BLOCK_M, HEAD, BLOCK_D
                )
                dout_tile = load_tile(
                    dout, m, queries, dout_row, WHOLE == 0, VARLEN, TMA, BLOCK_M, HEAD, BLOCK_D
                )
                i = m + tl.arange(0, BLOCK_M)
                lse = load_row(lse_ptr + statistics, i, queries, WHOLE == 0)
                delta = load_row(delta_ptr + statistics, i, queries, WHOLE == 0)
                if EXACT:
                    lse_remainder = load_row(lse_remainder_ptr + statistics, i, queries, WHOLE == 0)
                else:
                    lse_remainder = tl.zeros([BLOCK_M], tl.float32)
                # Transposed, so that p and ds are the left operands, which need no copy.
                p, dropped, dp, slope = weigh(
                    tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee"),
                    tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee"),
                    i[None, :],
                    j[:, None],
                    h,
                    b,
                    seed,
                    lse[None, :],
                    lse_remainder[None, :],
                    i[None, :] < queries,
                    shift,
                    factor,
                    inner,
                    left,
                    right,
                    threshold,
                    keep_scale,
                    WHOLE == 0,
                    LEFT,
                    RIGHT,
                    SOFTCAP,
                    DROPOUT,
                    EXACT,
                )
                ds = p * (dp - delta[None, :]) * slope
                dv = tl.dot(dropped.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
                dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")

    out = contiguous_rows(dk_ptr, batch, key_head, begin_k, rows_k, key_heads, HEAD)
    store_tile(out, n, keys, key_heads * HEAD, dk * scale, BLOCK_N, HEAD, BLOCK_D)
    out = contiguous_rows(dv_ptr, batch, key_head, begin_k, rows_k, key_heads, HEAD)
    store_tile(out, n, keys, key_heads * HEAD, dv * keep_scale, BLOCK_N, HEAD, BLOCK_D)
