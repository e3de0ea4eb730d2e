"""Attention in plain PyTorch: the definition. Computes in float32, or in float64 for float64.

Every backend of this op has `forward` and `backward` with these arguments. `Options` holds what is
not a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """What is not a tensor.

    left, right: the window, -1 for unlimited; causal is right = 0.
    softcap: 0 for none. dropout_p: 0 for none.
    max_seqlen_q, max_seqlen_k: the longest sequence, or more.
    """

    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Sequence:
    """One sequence: its number, and where its queries and keys are.

    Query head h of a dense batch is `q[query]`, which is (Sq, H, D); keys likewise.
    `statistics` finds its (H, Sq) in lse and delta.
    """

    index: int
    query: tuple[int | slice, ...]
    key: tuple[int | slice, ...]
    statistics: tuple[int | slice, ...]


def sequences(
    q: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[Sequence]:
    """Every sequence of a dense batch, or of packed ones."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [Sequence(b, (b,), (b,), (b,)) for b in range(q.shape[0])]
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [
        Sequence(
            b,
            (slice(q_ends[b], q_ends[b + 1]),),
            (slice(k_ends[b], k_ends[b + 1]),),
            (slice(None), slice(q_ends[b], q_ends[b + 1])),
        )
        for b in range(len(q_ends) - 1)
    ]


def allowed(rows: int, cols: int, left: int, right: int, device: torch.device) -> Tensor:
    """(rows, cols) bool: which keys each query sees."""
    distance = torch.arange(cols, device=device) - torch.arange(rows, device=device)[:, None]
    distance = distance - (cols - rows)
    mask = torch.ones(rows, cols, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def philox(counter: list[Tensor], key: list[int], rounds: int = 7) -> list[Tensor]:
    """Philox4x32 (Salmon et al. 2011): four words of 32 bits, in int64 tensors."""
    for _ in range(rounds):
        high0, low0 = _multiply(counter[0], 0xD2511F53)
        high1, low1 = _multiply(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low word of a 32 x 32 bit product; int64 cannot hold its top bit."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def kept(seed: Tensor, dropout_p: float, batch: int, heads: int, rows: int, cols: int) -> Tensor:
    """(heads, rows, cols) bool: the entries that dropout keeps in sequence `batch`."""
    device, value = seed.device, int(seed.item())

    def count(n: int, *shape: int) -> Tensor:
        return torch.arange(n, device=device).view(shape).expand(heads, rows, cols)

    counter = [count(cols, 1, 1, -1), count(rows, 1, -1, 1), count(heads, -1, 1, 1)]
    counter.append(torch.full_like(counter[0], batch))
    key = [value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF]
    return philox(counter, key)[0] >= int(dropout_p * 2**32)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(S, Hk, D) as (H, S, D) in the dtype of the computation."""
    return _wide(x).repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)


@dataclass
class _Scores:
    scores: Tensor  # (H, Sq, Sk), -inf where not allowed
    slope: Tensor | None  # d scores / d (scale * q . k) with softcap
    keep: Tensor | None  # what dropout multiplies with: 0 or 1 / (1 - p)


def _scores(
    q: Tensor, k: Tensor, seed: Tensor | None, options: Options, sequence: Sequence
) -> _Scores:
    heads, rows, cols = q.shape[0], q.shape[1], k.shape[1]
    scores, slope, keep = q @ k.transpose(1, 2) * options.scale, None, None
    if options.softcap:
        tanh = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * tanh, 1 - tanh * tanh
    mask = allowed(rows, cols, options.left, options.right, q.device)
    if seed is not None:
        keep = kept(seed, options.dropout_p, sequence.index, heads, rows, cols)
        keep = keep.to(q.dtype) / (1 - options.dropout_p)
    return _Scores(scores.masked_fill(~mask, -torch.inf), slope, keep)


def _each(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[Sequence, Tensor, Tensor]]:
    heads = q.shape[-2]
    for sequence in sequences(q, cu_seqlens_q, cu_seqlens_k):
        yield sequence, _by_head(q[sequence.query], heads), _by_head(k[sequence.key], heads)


def statistics_shape(q: Tensor) -> tuple[int, ...]:
    """Of lse and delta: (B, H, Sq), or (H, N)."""
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def lse_remainder_shape(q: Tensor) -> tuple[int, ...]:
    """Of lse_remainder: like lse for float32, empty for other dtypes, whose rounding hides it."""
    return statistics_shape(q) if q.dtype == torch.float32 else (0,)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, lse_remainder. seed is None without dropout.

    out: like q, contiguous. lse: float32, see `statistics_shape`. lse_remainder: what lse lost when
    it was rounded, log(denominator) - lse, see `lse_remainder_shape`. With lse alone the backward's
    p = exp(s - lse) would scale a row by up to 2^-25 * |lse|: four times float32's roundoff for
    lse = 8. 0 where lse is -inf.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = _wide(q).new_full(statistics_shape(q), -torch.inf)
    lse_remainder = lse.new_zeros(lse_remainder_shape(q))
    for sequence, query, key in _each(q, k, cu_seqlens_q, cu_seqlens_k):
        s = _scores(query, key, seed, options, sequence)
        logits = s.scores
        if sink is not None:
            logits = torch.cat([logits, _sink_column(sink, logits)], -1)
        if not logits.shape[-1]:
            continue
        highest = logits.amax(-1, keepdim=True)
        highest = highest.masked_fill(highest == -torch.inf, 0)
        denominator = torch.exp(logits - highest).sum(-1, keepdim=True)
        p = torch.exp(s.scores - highest) / denominator.masked_fill(denominator == 0, 1)
        if s.keep is not None:
            p = p * s.keep
        result = p @ _by_head(v[sequence.key], q.shape[-2])
        out[sequence.query] = result.transpose(0, 1).to(q.dtype)
        exact = denominator.double().log() + highest
        lse[sequence.statistics] = exact[..., 0].to(lse.dtype)
        if lse_remainder.numel():
            lost = exact[..., 0] - lse[sequence.statistics]
            lse_remainder[sequence.statistics] = lost.nan_to_num(0).to(lse_remainder.dtype)
    return out, lse, lse_remainder


def _sink_column(sink: Tensor, scores: Tensor) -> Tensor:
    return sink.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_remainder: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous; and delta, like lse.

    delta_i = dout_i . out_i - dlse_i, with which ds_ij = p_ij * (dp_ij - delta_i); the sink's
    gradient follows from it alone (op.py). Here it is summed from p and dp, which is the same
    number and needs no `out`.
    """
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.zeros_like(lse)
    heads, key_heads = q.shape[-2], k.shape[-2]
    for sequence, query, key in _each(q, k, cu_seqlens_q, cu_seqlens_k):
        value = _by_head(v[sequence.key], heads)
        s = _scores(query, key, seed, options, sequence)
        # In float64: s - lse, several times larger than s - max, would be rounded accordingly.
        row_lse = lse[sequence.statistics][..., None].double()
        if lse_remainder.numel():
            row_lse = row_lse + lse_remainder[sequence.statistics][..., None]
        p = torch.exp(s.scores - row_lse.masked_fill(row_lse == -torch.inf, 0)).to(query.dtype)
        dy = _by_head(dout[sequence.query], heads)
        dropped, dp = p, dy @ value.transpose(1, 2)
        if s.keep is not None:
            dropped, dp = p * s.keep, dp * s.keep
        d = (p.double() * dp).sum(-1)  # in float64: dp - d cancels
        if dlse is not None:
            d = d - dlse[sequence.statistics]
        ds = (p * (dp - d[..., None])).to(p.dtype) * options.scale
        if s.slope is not None:
            ds = ds * s.slope
        cols = key.shape[1]

        def by_key_head(x: Tensor, cols: int = cols) -> Tensor:
            return x.view(key_heads, heads // key_heads, cols, x.shape[-1]).sum(1).transpose(0, 1)

        dq[sequence.query] = (ds @ key).transpose(0, 1).to(q.dtype)
        dk[sequence.key] = by_key_head(ds.transpose(1, 2) @ query).to(k.dtype)
        dv[sequence.key] = by_key_head(dropped.transpose(1, 2) @ dy).to(v.dtype)
        delta[sequence.statistics] = d.to(delta.dtype)
    return dq, dk, dv, delta
