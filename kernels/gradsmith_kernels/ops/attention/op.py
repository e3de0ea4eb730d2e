"""gradsmith::attention: schemas, checks, fakes, autograd, backends.

q, out (B, Sq, H, D) and k, v (B, Sk, Hk, D), or packed (Nq, H, D) and (Nk, Hk, D) with cu_seqlens
(sequences + 1,) int32; lse, lse_remainder, delta (B, H, Sq) or (H, Nq) float32; sink (H,).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.attention.reference import Options, lse_remainder_shape, statistics_shape
from gradsmith_kernels.ops.common.registration import FLOATS, differentiable

MAX_HEAD_SIZE = 256
OP = Op(
    "attention",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

# left and right are the window with causal in it, -1 for unlimited; dropout_p is 0 without a seed.
_OPTIONS = (
    "float scale, int left, int right, float softcap, float dropout_p,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, str? backend=None"
)
torch.library.define(
    "gradsmith::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sink,"
    f" Tensor? seed, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor lse_remainder)",
)
torch.library.define(
    "gradsmith::attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" Tensor lse_remainder, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor delta)",
)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    sink: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The public functions' common half: their options as the operator takes them."""
    dimensions = 4 if cu_seqlens_q is None else 3
    if not isinstance(q, Tensor):
        raise TypeError(f"attention: q is {type(q).__name__}; it must be a tensor")
    if q.dim() != dimensions:
        shape = "(B, S, H, D)" if dimensions == 4 else "(N, H, D)"
        raise ValueError(f"attention: q must be {shape}; it is {tuple(q.shape)}")
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"attention: window_size is {window_size}; it must be (left, right)")
    if min(window_size) < -1:
        raise ValueError(
            f"attention: window_size is {window_size}; it must be (left, right), each at least 0, "
            "or -1 for unlimited"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p is {dropout_p}; it must be in [0, 1)")
    left, right = window_size
    if causal:
        right = 0
    seed = None
    if dropout_p:
        if dropout_seed is None:
            # The device's own generator, so that activation checkpointing replays it.
            seed = torch.randint(2**62, (), device=q.device)
        elif isinstance(dropout_seed, Tensor):
            seed = dropout_seed
        else:
            seed = torch.tensor(dropout_seed, dtype=torch.int64, device=q.device)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    out, lse, _ = ATTENTION(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        sink,
        seed,
        scale,
        left,
        right,
        float(softcap),
        float(dropout_p),
        max_seqlen_q,
        max_seqlen_k,
        backend,
    )
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> None:
    """What can be said without reading a tensor's values."""
    dimensions = 4 if cu_seqlens_q is None else 3
    shape = "(B, S, H, D)" if dimensions == 4 else "(N, H, D)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dimensions:
            raise ValueError(f"attention: {name} must be {shape}; it is {tuple(x.shape)}")
        if x.dtype not in (*FLOATS, torch.float64):
            raise TypeError(
                f"attention: {name} is {x.dtype}; it must be float32, bfloat16, float16 or float64"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"attention: {name} is {x.dtype}, q is {q.dtype}; they must agree")
        if x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device}, q on {q.device}")
    if k.shape != v.shape:
        raise ValueError(
            f"attention: k and v must have one shape: {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"attention: q and k must have one head size: {q.shape[-1]} and {k.shape[-1]}"
        )
    if not 1 <= q.shape[-1] <= MAX_HEAD_SIZE:
        raise ValueError(
            f"attention: the head size is {q.shape[-1]}; it must be in 1 to {MAX_HEAD_SIZE}"
        )
    if dimensions == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: q has {q.shape[0]} sequences, k has {k.shape[0]}")
    heads, key_heads = q.shape[-2], k.shape[-2]
    if key_heads < 1 or heads < 1 or heads % key_heads:
        raise ValueError(
            f"attention: q has {heads} heads, k and v have {key_heads}: it must be a multiple"
        )
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("attention: cu_seqlens_q and cu_seqlens_k must be given both or neither")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cu_seqlens.dtype != torch.int32:
                raise TypeError(f"attention: {name} is {cu_seqlens.dtype}; it must be int32")
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
                raise ValueError(
                    f"attention: {name} must be (sequences + 1,); it is {tuple(cu_seqlens.shape)}"
                )
            if cu_seqlens.device != q.device:
                raise ValueError(f"attention: {name} is on {cu_seqlens.device}, q on {q.device}")
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"attention: cu_seqlens_q counts {cu_seqlens_q.shape[0] - 1} sequences, "
                f"cu_seqlens_k {cu_seqlens_k.shape[0] - 1}"
            )
    if sink is not None:
        if sink.shape != (heads,):
            raise ValueError(
                f"attention: sink must be ({heads},), one logit a head of q; it is "
                f"{tuple(sink.shape)}"
            )
        if sink.dtype not in (*FLOATS, torch.float64):
            raise TypeError(f"attention: sink is {sink.dtype}; it must be a floating dtype")
        if (sink.dtype == torch.float64) != (q.dtype == torch.float64):
            raise TypeError(f"attention: float64 does not mix: sink is {sink.dtype}, q {q.dtype}")
        if sink.device != q.device:
            raise ValueError(f"attention: sink is on {sink.device}, q on {q.device}")
    if seed is not None:
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"attention: dropout_seed must be one int64; it is {seed.dtype} of shape "
                f"{tuple(seed.shape)}"
            )
        if seed.device != q.device:
            raise ValueError(f"attention: dropout_seed is on {seed.device}, q on {q.device}")
    if not math.isfinite(options.scale):
        raise ValueError(f"attention: softmax_scale is {options.scale}; it must be finite")
    if not (options.softcap >= 0 and math.isfinite(options.softcap)):
        raise ValueError(f"attention: softcap is {options.softcap}; it must be >= 0, 0 for none")


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, rows: int, longest: int) -> None:
    """The values of cu_seqlens, where reading them costs nothing: on the CPU."""
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"attention: {name}[0] is {values[0]}; it must be 0")
    for i, (begin, end) in enumerate(itertools.pairwise(values)):
        if end < begin:
            raise ValueError(
                f"attention: {name} falls from {begin} to {end} at position {i + 1}; it must never"
            )
        if end - begin > longest:
            raise ValueError(
                f"attention: sequence {i} of {name} has {end - begin} tokens, but max_seqlen"
                f"{name.removeprefix('cu_seqlens')} is {longest}"
            )
    if values[-1] > rows:
        raise ValueError(f"attention: {name}[-1] is {values[-1]}, but there are {rows} tokens")


def _options_and_backend(rest: tuple[Any, ...]) -> tuple[Options, str | None]:
    """The operators' last arguments; the backend may be left out."""
    return Options(*rest[:7]), rest[7] if len(rest) > 7 else None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (q's shape), lse and lse_remainder; see `reference.forward`."""
    options, backend = _options_and_backend(rest)
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, seed, options)
    if cu_seqlens_q is not None and cu_seqlens_k is not None and q.device.type == "cpu":
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], options.max_seqlen_q)
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], options.max_seqlen_k)
    result: tuple[Tensor, Tensor, Tensor] = OP.choose(backend, q.device, q.dtype).forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, sink, seed, options
    )
    return result


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, seed, _options_and_backend(rest)[0])
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty(q.shape), q.new_empty(statistics_shape(q), dtype=wide)
    return out, lse, lse.new_empty(lse_remainder_shape(q))


def _attention_backward(
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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and delta, of which the sink's gradient is made; see `reference.backward`."""
    options, backend = _options_and_backend(rest)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = OP.choose(backend, q.device, q.dtype).backward(
        dout, dlse, q, k, v, out, lse, lse_remainder, cu_seqlens_q, cu_seqlens_k, seed, options
    )
    return result


def _attention_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(lse.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, sink, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, sink, seed)
    ctx.mark_non_differentiable(output[2])


def _of_attention(
    ctx: Any, saved: tuple[Any, ...], dout: Tensor | None, dlse: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, lse_remainder, cu_seqlens_q, cu_seqlens_k, sink, seed = saved
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, delta = BACKWARD(
        dout, dlse, q, k, v, out, lse, lse_remainder, cu_seqlens_q, cu_seqlens_k, seed, *ctx.options
    )
    dsink = None
    if sink is not None and ctx.needs_input_grad[5]:
        dsink = _sink_gradient(sink, lse, lse_remainder, delta)
    return dq, dk, dv, None, None, dsink, None, *[None] * len(ctx.options)


def _sink_gradient(sink: Tensor, lse: Tensor, lse_remainder: Tensor, delta: Tensor) -> Tensor:
    """- sum over queries of p_sink * delta, in float64: the order of the sum is then no matter."""
    exponent = sink[:, None].double() - lse.double()
    if lse_remainder.numel():
        exponent = exponent - lse_remainder
    # Rows of no sequence have lse = -inf, and their p is 0, not infinite.
    p = torch.exp(exponent).masked_fill(lse == -torch.inf, 0)
    terms = -p * delta
    return (terms.sum((0, 2)) if terms.dim() == 3 else terms.sum(1)).to(sink.dtype)


ATTENTION = differentiable("attention", _attention, _attention_fake, _setup, _of_attention)
BACKWARD = differentiable("attention_backward", _attention_backward, _attention_backward_fake)
