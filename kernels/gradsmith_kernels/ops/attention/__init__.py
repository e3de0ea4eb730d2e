"""Exact attention, dense and over packed documents, with flash-attention's names and semantics."""

from __future__ import annotations

from torch import Tensor

import gradsmith_kernels.ops.attention.op as _op

__all__ = ["attention", "attention_varlen"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention (Vaswani et al. 2017; computed as in Dao 2023, arXiv:2307.08691).

        s_ij = softmax_scale * q_i . k_j,  or  softcap * tanh(softmax_scale * q_i . k_j / softcap)
        p_ij = exp(s_ij) / (sum over allowed j of exp(s_ij) + exp(sink))
        out_i = sum over allowed j of p_ij * v_j

    Query i may see key j where  i + Sk - Sq - left <= j <= i + Sk - Sq + right: the sequences are
    aligned at their ends (bottom-right). Sums and the softmax are computed in float32; nothing of
    size Sq x Sk is kept.

    Args:
        q: (B, Sq, H, D); float32, bfloat16 or float16 (float64: reference backend only). Any
            strides; where the elements of a head are not adjacent, it is copied.
        k, v: (B, Sk, Hk, D), of q's dtype. Hk divides H: query head h reads key head h // (H / Hk).
        causal: query i does not see keys after it: right = 0.
        softmax_scale: 1 / sqrt(D) if None.
        window_size: (left, right), both inclusive; -1 is unlimited.
        softcap: bound of the scores' magnitude, by tanh; 0 is none.
        sink: (H,), a learnt logit that joins each row's denominator and has no value (gpt-oss).
        dropout_p: probability with which an entry of p is zeroed, in [0, 1); the others are
            divided by 1 - dropout_p.
        dropout_seed: an int, or a tensor with one int64 on q's device. The same seed gives the same
            mask on every backend, forward and backward: entry (b, h, i, j) is kept where the first
            word of Philox4x32-7 (Salmon et al. 2011) of counter (j, i, h, b) and this key is at
            least dropout_p * 2^32. None draws one from torch's generator.
        return_lse: return (out, lse).
        backend: reference, cpu or triton; None chooses by device, see `backends`.

    Returns:
        out: (B, Sq, H, D), of q's dtype. 0 where a query sees no key.
        lse: (B, H, Sq), float32 (float64 for float64): the natural logarithm of p's denominator;
            -inf where a query sees no key and there is no sink. Differentiable.

    The same inputs give the same bits, forward and backward, for any number of threads. There is
    no second derivative.

    Raises:
        ValueError: shapes, devices or options do not fit.
        TypeError: a dtype does not fit.
        BackendError: the backend cannot run here.
    """
    out, lse = _op.call(
        q,
        k,
        v,
        None,
        None,
        max_seqlen_q=q.shape[1] if isinstance(q, Tensor) and q.dim() == 4 else 0,
        max_seqlen_k=k.shape[1] if isinstance(k, Tensor) and k.dim() == 4 else 0,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        sink=sink,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences that lie one after the other; none sees another.

    Args:
        q: (N, H, D): the queries of all sequences. k, v: (Nk, Hk, D).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32: where each begins, and where the last
            ends: from 0, never falling, at most N and Nk. Rows after the last belong to no
            sequence: their output and gradients are 0. On a GPU the values are not read on the
            host: what lies outside the tensors is cut off.
        max_seqlen_q, max_seqlen_k: the longest sequences, or more.
        others: as for `attention`; b counts the sequences in dropout's counter, and i and j from
            the beginning of theirs.

    Returns:
        out: (N, H, D). lse: (H, N).

    Raises:
        As `attention`.
    """
    out, lse = _op.call(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        softcap=softcap,
        sink=sink,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )
    return (out, lse) if return_lse else out
