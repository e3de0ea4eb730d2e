"""Attention on the CPU: csrc/attention."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.attention.reference import Options, lse_remainder_shape, statistics_shape
from gradsmith_kernels.ops.common.native import DTYPE_CODES

View = tuple[int, int, int, int]


def _adjacent(x: Tensor) -> Tensor:
    """x with the elements of a head next to each other; a copy only where they are not.

    The caller keeps it for as long as its address is in use.
    """
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: Tensor) -> View:
    """Address, and the strides of batch (0 for packed sequences), row and head."""
    *batch, row, head, _ = x.stride()
    return x.data_ptr(), batch[0] if batch else 0, row, head


def _shapes(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int, int, int]:
    """Sequences, their queries and keys (0 where cu_seqlens says them), heads, key heads, size."""
    heads, key_heads, size = q.shape[-2], k.shape[-2], q.shape[-1]
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1, 0, 0, heads, key_heads, size
    return q.shape[0], q.shape[1], k.shape[1], heads, key_heads, size


def _options(options: Options, seed: Tensor | None) -> tuple[float, int, int, float, float, int]:
    """scale, left, right, softcap, dropout_p, seed."""
    key = 0 if seed is None else int(seed.item()) & (2**64 - 1)
    dropout_p = 0.0 if seed is None else options.dropout_p
    return options.scale, options.left, options.right, options.softcap, dropout_p, key


def _addresses(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[int, int]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return 0, 0
    return cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr()


def _statistics_strides(lse: Tensor) -> tuple[int, int]:
    """Of batch and head in lse, which is contiguous."""
    return (lse.stride(0), lse.stride(1)) if lse.dim() == 3 else (0, lse.stride(0))


def _empty(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Like x and contiguous; rows of no sequence, which no kernel writes, are 0."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    if cu_seqlens is not None:
        result[int(cu_seqlens[-1]) :] = 0
    return result


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
    """out (q's shape), lse and lse_remainder; see `reference.forward`."""
    q, k, v = _adjacent(q), _adjacent(k), _adjacent(v)
    out = _empty(q, cu_seqlens_q)
    lse = torch.empty(statistics_shape(q), dtype=torch.float32)
    lse_remainder = torch.empty(lse_remainder_shape(q), dtype=torch.float32)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        after = int(cu_seqlens_q[-1])
        lse[:, after:] = -torch.inf
        lse_remainder[..., after:] = 0
    wide_sink = None if sink is None else sink.float().contiguous()
    _native.attention_forward(
        _view(q),
        _view(k),
        _view(v),
        *_shapes(q, k, cu_seqlens_q),
        *_options(options, seed),
        *_addresses(cu_seqlens_q, cu_seqlens_k),
        *_statistics_strides(lse),
        0 if wide_sink is None else wide_sink.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        lse_remainder.data_ptr() if lse_remainder.numel() else 0,
        DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
    )
    return out, lse, lse_remainder


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
    """dq, dk, dv (contiguous) and delta (lse's shape, float32); see `reference.backward`."""
    dout, q, k, v, out = (_adjacent(x) for x in (dout, q, k, v, out))
    dq, dk, dv = _empty(q, cu_seqlens_q), _empty(k, cu_seqlens_k), _empty(v, cu_seqlens_k)
    lse, lse_remainder = lse.contiguous(), lse_remainder.contiguous()
    delta = torch.empty_like(lse)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        delta[:, int(cu_seqlens_q[-1]) :] = 0
    if dlse is not None:
        dlse = dlse.contiguous()
    _native.attention_backward(
        _view(q),
        _view(k),
        _view(v),
        _view(out),
        _view(dout),
        *_shapes(q, k, cu_seqlens_q),
        *_options(options, seed),
        *_addresses(cu_seqlens_q, cu_seqlens_k),
        *_statistics_strides(lse),
        lse.data_ptr(),
        lse_remainder.data_ptr() if lse_remainder.numel() else 0,
        0 if dlse is None else dlse.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        delta.data_ptr(),
        DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
    )
    return dq, dk, dv, delta
