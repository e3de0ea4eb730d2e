"""Attention's samples, naive computation, benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradsmith_kernels.ops.attention import attention, attention_varlen
from gradsmith_kernels.ops.attention.op import OP
from gradsmith_kernels.ops.attention.reference import allowed, kept
from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.verify.spec import (
    BenchCase,
    CompileCase,
    Inputs,
    OpCheck,
    Outputs,
    Sample,
    Spec,
    seeded,
)
from gradsmith_kernels.verify.testing import check_parity


@dataclass(frozen=True)
class Case:
    """One call of attention.

    lengths: of the packed sequences, (queries, keys) each; None for a dense batch.
    layout: of q, k, v: "contiguous"; "heads" ((B, H, S, D) transposed); "fused" (slices of one
    projection); "elements" (elements of a head not adjacent).
    """

    batch: int = 1
    rows: int = 30
    cols: int = 30
    heads: int = 2
    key_heads: int = 2
    size: int = 64
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink: bool = False
    dropout: float = 0.0
    lengths: tuple[tuple[int, int], ...] | None = None
    padding: int = 0
    layout: str = "contiguous"
    scale: float | None = None
    lse_gradient: bool = False

    def __str__(self) -> str:
        changed = [
            f"{name} {getattr(self, name)}"
            for name, default in vars(Case()).items()
            if getattr(self, name) != default
        ]
        return ", ".join(changed) or "plain"


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """q, k, v, sink, cu_seqlens, and the upstream gradients dout and dlse (not uniform)."""
    generator = seeded(case.rows * 1009 + case.cols * 31 + case.size)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def tensor(rows: int, heads: int) -> Tensor:
        lead = (case.batch, rows) if case.lengths is None else (rows,)
        if case.layout == "heads":
            turned = (*lead[:-1], heads, rows, case.size)
            return normal(*turned).to(dtype).to(device).transpose(-3, -2)
        if case.layout == "fused":
            return normal(*lead, heads, 3 * case.size).to(dtype).to(device)[..., : case.size]
        if case.layout == "elements":
            return normal(*lead, heads, 2 * case.size).to(dtype).to(device)[..., ::2]
        return normal(*lead, heads, case.size).to(dtype).to(device)

    rows, cols = case.rows, case.cols
    ends: tuple[Tensor | None, Tensor | None] = (None, None)
    if case.lengths is not None:
        queries = torch.tensor([0, *(n for n, _ in case.lengths)]).cumsum(0)
        keys = torch.tensor([0, *(n for _, n in case.lengths)]).cumsum(0)
        rows, cols = int(queries[-1]) + case.padding, int(keys[-1]) + case.padding
        ends = (queries.to(device, torch.int32), keys.to(device, torch.int32))
    inputs: Inputs = {"case": case, "cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    inputs |= {"q": tensor(rows, case.heads), "k": tensor(cols, case.key_heads)}
    inputs["v"] = tensor(cols, case.key_heads)
    inputs["sink"] = normal(case.heads).to(dtype).to(device) if case.sink else None
    inputs["dout"] = normal(*inputs["q"].shape).to(dtype).to(device)
    lead = (case.batch,) if case.lengths is None else ()
    inputs["dlse"] = normal(*lead, case.heads, rows).to(device) if case.lse_gradient else None
    inputs["seed"] = torch.tensor(2**40 + 11, device=device) if case.dropout else None
    return inputs


def sample(case: Case, dtype: torch.dtype) -> Sample:
    label = f"{case}, {str(dtype).removeprefix('torch.')}"
    # Triton's interpreter takes seconds for each: float16, which the float32 samples cover but for
    # the rounding of p and ds, only where all the features meet.
    interpret = dtype == torch.float32 or (case.dropout > 0 and case.size == 64)
    # A few rows show each row's own error, and the kernel's exponent is only exact with a fused
    # multiply-add, which the interpreter has not.
    interpret &= not (0 < case.rows < 5 and case.cols > 100)
    return Sample(label, dtype, partial(make_inputs, case, dtype), interpret)


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    case: Case,
    seed: Tensor | None,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """One sequence (S, H, D) as models in transformers compute it eagerly: (out, lse)."""
    heads = q.shape[1]
    q, k, v = (
        q.transpose(0, 1),
        *(x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1) for x in (k, v)),
    )
    scores = q @ k.transpose(1, 2) * (case.size**-0.5 if case.scale is None else case.scale)
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    rows, cols = scores.shape[1:]
    left, right = case.window
    mask = allowed(rows, cols, left, 0 if case.causal else right, q.device)
    sighted = mask.any(1, keepdim=True)
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = scores.to(wide).masked_fill(~mask & sighted, -torch.inf)
    if sink is not None:
        column = sink.to(wide)[:, None, None].expand(-1, rows, 1)
        logits = torch.cat([logits.masked_fill(~sighted, -torch.inf), column], -1)
    lse = torch.logsumexp(logits, -1) if logits.shape[-1] else logits.sum(-1)
    if sink is None:
        lse = lse.masked_fill(~sighted[:, 0], -torch.inf)
    p = torch.softmax(logits, -1).to(q.dtype)[..., :cols] * sighted
    if seed is not None:
        keep = kept(seed, case.dropout, batch, heads, rows, cols)
        p = p * keep / (1 - case.dropout)
    return (p @ v).transpose(0, 1), lse


def whole_naive(inputs: Inputs, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    case, seed, sink = inputs["case"], inputs["seed"], leaves.get("sink")
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    if case.lengths is None:
        each = [naive_attention(q[b], k[b], v[b], sink, case, seed, b) for b in range(case.batch)]
        if not each:
            return q * 1, q.sum(-1).transpose(1, 2).to(torch.promote_types(q.dtype, torch.float32))
        return torch.stack([out for out, _ in each]), torch.stack([lse for _, lse in each])
    queries, keys = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    pieces, lse = [], []
    for b in range(len(queries) - 1):
        mine, theirs = slice(queries[b], queries[b + 1]), slice(keys[b], keys[b + 1])
        piece, row = naive_attention(q[mine], k[theirs], v[theirs], sink, case, seed, b)
        pieces.append(piece)
        lse.append(row)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse.append(q[queries[-1] :].sum(-1).to(wide).transpose(0, 1) * 0 - torch.inf)
    out = torch.cat([*pieces, q[queries[-1] :] * 0])
    return out, torch.cat(lse, 1)


def run_ours(
    inputs: Inputs, leaves: dict[str, Tensor], backend: str | None
) -> tuple[Tensor, Tensor]:
    case = inputs["case"]
    options: dict[str, Any] = {
        "causal": case.causal,
        "softmax_scale": case.scale,
        "window_size": case.window,
        "softcap": case.softcap,
        "sink": leaves.get("sink"),
        "dropout_p": case.dropout,
        "dropout_seed": inputs["seed"],
        "return_lse": True,
        "backend": backend,
    }
    qkv = (leaves["q"], leaves["k"], leaves["v"])
    if case.lengths is None:
        out, lse = attention(*qkv, **options)
    else:
        ends = (inputs["cu_seqlens_q"], inputs["cu_seqlens_k"])
        longest = [max((pair[i] for pair in case.lengths), default=0) for i in (0, 1)]
        out, lse = attention_varlen(*qkv, *ends, *longest, **options)
    return out, lse


def outputs_and_gradients(
    function: Callable[[Inputs, dict[str, Tensor]], tuple[Tensor, Tensor]], inputs: Inputs
) -> Outputs:
    names = [name for name in ("q", "k", "v", "sink") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    out, lse = function(inputs, leaves)
    dlse = torch.zeros_like(lse) if inputs["dlse"] is None else inputs["dlse"].to(lse.dtype)
    # Rows that see nothing have lse = -inf on both sides, which no error can be taken of. That they
    # are the same rows is the business of tests/kernels/test_attention.py.
    lse = torch.where(lse == -torch.inf, 0, lse)
    upstream = (inputs["dout"], dlse)
    gradients = torch.autograd.grad(
        (out, lse), list(leaves.values()), upstream, materialize_grads=True
    )
    return {"out": out.detach(), "lse": lse.detach()} | {
        f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)
    }


PACKED = ((70, 70), (1, 1), (0, 0), (131, 131), (16, 16))
CASES = (
    Case(),
    Case(causal=True, lse_gradient=True),
    Case(rows=1, cols=2),
    Case(rows=0),
    Case(cols=0),
    Case(batch=0),
    Case(batch=4, rows=3, cols=200, heads=8, key_heads=2, causal=True),
    Case(rows=77, cols=77, causal=True, size=16),
    Case(batch=2, rows=130, cols=130, causal=True, heads=4, key_heads=2, size=80),
    Case(rows=65, cols=65, heads=4, key_heads=1, size=96, layout="heads"),
    Case(rows=200, cols=331, causal=True, size=128),
    Case(rows=331, cols=200, causal=True, size=128, layout="fused"),
    Case(rows=100, cols=100, size=256, causal=True),
    Case(rows=40, cols=40, size=17, causal=True),
    Case(rows=90, cols=90, size=1),
    Case(rows=50, cols=70, size=40, layout="elements"),
    Case(rows=300, cols=300, causal=True, window=(20, -1)),
    Case(rows=300, cols=300, window=(7, 30), lse_gradient=True),
    Case(rows=90, cols=300, window=(100, 0)),
    Case(rows=300, cols=90, window=(3, 3), sink=True, lse_gradient=True),
    Case(rows=150, cols=150, causal=True, softcap=1.5),
    Case(rows=150, cols=150, causal=True, sink=True, scale=0.5),
    Case(rows=9, cols=20, causal=True, sink=True, heads=32, key_heads=4, size=8),
    Case(rows=150, cols=150, causal=True, dropout=0.3, heads=4, key_heads=2),
    Case(
        batch=2,
        rows=30,
        cols=90,
        dropout=0.1,
        softcap=2.0,
        sink=True,
        window=(25, 5),
        lse_gradient=True,
    ),
    Case(lengths=PACKED, causal=True, heads=4, key_heads=2),
    Case(lengths=PACKED, window=(10, 10), padding=9, lse_gradient=True),
    Case(
        lengths=((5, 90), (90, 5), (0, 3), (3, 0), (64, 64)),
        causal=True,
        sink=True,
        padding=3,
        heads=8,
    ),
    Case(lengths=PACKED, causal=True, dropout=0.2, layout="heads", size=128),
    Case(lengths=(), padding=4),
)


# What a benchmark compares with; None is our own op on one thread.
Peer = Callable[[Inputs, dict[str, Tensor]], Tensor]
Peers = dict[str, Peer | None]


class AttentionSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        return [sample(case, dtype) for dtype in FLOATS for case in CASES]

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        return outputs_and_gradients(partial(run_ours, backend=backend), inputs)

    def naive(self, inputs: Inputs) -> Outputs:
        return outputs_and_gradients(whole_naive, inputs)

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        ops = torch.ops.gradsmith
        checks = []
        for case in (
            Case(rows=20, cols=30, causal=True, heads=4, sink=True),
            Case(lengths=((9, 9), (20, 20)), dropout=0.1, heads=4),
        ):
            x = make_inputs(case, torch.float32, device)
            q, k, v = (x[name].requires_grad_() for name in ("q", "k", "v"))
            sink = None if x["sink"] is None else x["sink"].requires_grad_()
            options = (0.125, -1, 0 if case.causal else -1, 0.0, case.dropout, 30, 30)
            ends = (x["cu_seqlens_q"], x["cu_seqlens_k"])
            checks.append(
                OpCheck(ops.attention.default, (q, k, v, *ends, sink, x["seed"], *options))
            )
            detached = [tensor.detach() for tensor in (q, k, v)]
            with torch.no_grad():
                out, lse, lse_remainder = ops.attention.default(
                    *detached, *ends, sink, x["seed"], *options
                )
            saved = (x["dout"], x["dlse"], *detached, out, lse, lse_remainder)
            checks.append(
                OpCheck(ops.attention_backward.default, (*saved, *ends, x["seed"], *options))
            )
        return checks

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.ops.attention import triton_kernels

        return triton_kernels.compile_cases()

    def bench_cases(self) -> list[BenchCase]:
        cases = []
        for size in (64, 128):
            for length in (1024, 2048, 4096, 8192):
                # 8192 rows in all: a head of 8192, or eight of 1024.
                heads = max(1, 8192 // length)
                case = Case(
                    rows=length, cols=length, heads=heads, key_heads=heads, size=size, causal=True
                )
                peers: Peers = {"torch": torch_causal}
                if length <= 2048:
                    peers["torch float32"] = torch_causal
                cases.append(self._bench(case, torch.bfloat16, False, peers))
                if heads == 1 and size == 128:
                    peers = {**peers, "gradsmith on one thread": None}
                cases.append(self._bench(case, torch.bfloat16, True, peers))
            plain = Case(rows=2048, cols=2048, heads=4, key_heads=4, size=size, causal=True)
            for backward in (False, True):
                cases.append(self._bench(plain, torch.float32, backward, {"torch": torch_causal}))
        window = replace(plain, rows=8192, cols=8192, heads=1, key_heads=1, window=(511, 0))
        cases.append(self._bench(window, torch.bfloat16, True, {"torch": torch_masked}))
        lengths = tuple((n, n) for n in document_lengths(8192))
        packed = Case(lengths=lengths, heads=2, key_heads=2, size=128, causal=True)
        cases.append(self._bench(packed, torch.bfloat16, True, {"torch": torch_masked}))
        return cases

    def _bench(
        self,
        case: Case,
        dtype: torch.dtype,
        backward: bool,
        peers: Peers,
    ) -> BenchCase:
        def timed(function: Callable[[Inputs, dict[str, Tensor]], Any], inputs: Inputs) -> None:
            if not backward:
                with torch.no_grad():
                    function(inputs, {name: inputs[name] for name in ("q", "k", "v")})
                return
            leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v")}
            out = function(inputs, leaves)
            torch.autograd.grad(out, list(leaves.values()), inputs["dout"])

        def ours(inputs: Inputs, backend: str | None) -> None:
            timed(lambda inputs, leaves: run_ours(inputs, leaves, backend)[0], inputs)

        def of(name: str, peer: Peer) -> Callable[[Inputs], None]:
            if name == "torch float32":
                return lambda inputs: timed(peer, inputs["float32"])
            return partial(timed, peer)

        def make(device: torch.device) -> Inputs:
            inputs = make_inputs(case, dtype, device)
            if "torch float32" in peers:  # the same numbers for it
                wide = {name: inputs[name].float() for name in ("q", "k", "v", "dout")}
                inputs = {**inputs, "float32": wide}
            return inputs

        def on_one_thread(inputs: Inputs) -> None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            ours(inputs, None)
            torch.set_num_threads(threads)

        lengths = case.lengths or ((case.rows, case.cols),) * case.batch
        left, right = case.window[0], 0 if case.causal else case.window[1]
        pairs = sum(count_allowed(rows, cols, left, right) for rows, cols in lengths)
        tokens = sum(rows for rows, _ in lengths)
        moved = (2 * case.heads + 2 * case.key_heads) * tokens * case.size * dtype.itemsize
        kind = f"packed, {len(lengths)} documents" if case.lengths else f"S {case.rows}"
        kind += f", window {left + 1}" if left >= 0 else ""
        short = str(dtype).removeprefix("torch.")
        small = replace(case, rows=200, cols=200, window=(left // 4 if left > 0 else left, right))
        if case.lengths:
            small = replace(case, lengths=PACKED)
        return BenchCase(
            f"attention {'forward+backward' if backward else 'forward'} causal, {kind}, "
            f"H {case.heads}, D {case.size}, {short}",
            make,
            ours,
            {name: of(name, peer) if peer else on_one_thread for name, peer in peers.items()},
            moved * (3 if backward else 1),
            (14 if backward else 4) * case.heads * case.size * pairs,
            partial(check_parity, self, sample(small, dtype), None),
        )


def count_allowed(rows: int, cols: int, left: int, right: int) -> int:
    """How many pairs of query and key a mask allows."""
    total = 0
    for i in range(rows):
        middle = i + cols - rows
        low = max(0, middle - left) if left >= 0 else 0
        high = min(cols - 1, middle + right) if right >= 0 else cols - 1
        total += max(0, high - low + 1)
    return total


def document_lengths(total: int) -> list[int]:
    """Lengths of 200 to 2,000 tokens that add up to `total`."""
    lengths: list[int] = []
    step = 0
    while sum(lengths) < total:
        lengths.append(200 + (step * 619) % 1801)
        step += 1
    lengths[-1] -= sum(lengths) - total
    return lengths


def torch_causal(inputs: Inputs, leaves: dict[str, Tensor]) -> Tensor:
    q, k, v = (leaves[name].transpose(1, 2) for name in ("q", "k", "v"))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


def torch_masked(inputs: Inputs, leaves: dict[str, Tensor]) -> Tensor:
    """With the boolean mask that windows and documents need there."""
    case: Case = inputs["case"]
    q, k, v = (leaves[name] for name in ("q", "k", "v"))
    if "mask" not in inputs:
        lengths = case.lengths or ((case.rows, case.cols),)
        blocks = [allowed(n, m, case.window[0], 0, q.device) for n, m in lengths]
        inputs["mask"] = torch.block_diag(*blocks)
    if case.lengths:
        q, k, v = (x[None] for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=inputs["mask"]).transpose(1, 2)
    return out[0] if case.lengths else out


SPEC = AttentionSpec()
