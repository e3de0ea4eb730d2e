"""Attention in Triton: launchers, and the tiles that each chip gets.

The kernels are in triton_forward.py and triton_backward.py.

Shapes as in op.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gradsmith_kernels.backends import interpreting, triton_before
from gradsmith_kernels.ops.attention.reference import Options, lse_remainder_shape, statistics_shape
from gradsmith_kernels.ops.attention.triton_backward import (
    delta_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from gradsmith_kernels.ops.attention.triton_forward import forward_kernel
from gradsmith_kernels.verify.spec import CompileCase


class Tile(NamedTuple):
    """BLOCK_M queries, BLOCK_N keys, and the launch options."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


DELTA = Tile(32, 0, 4, 1)
QUERY_ROWS, KEY_ROWS = ("q_ptr", "dout_ptr"), ("k_ptr", "v_ptr")
CHIPS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
HEADS = (64, 128, 256)  # the columns of TILES: head sizes up to these

# The largest tiles whose sums and scores stay in registers (none is spilled) and whose operands fit
# into shared memory, for the compiler's code; chosen by reading it (budgets.json), not yet by time.
# Softcap and dropout take registers for each score, so BUSY has fewer scores to a tile.
_AMPERE = {
    "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
    "query_gradient": (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 8, 2)),
    "key_gradient": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 1)),
}
TILES = {
    "sm_80": _AMPERE,
    "sm_90": {
        "forward": (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        "query_gradient": (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(64, 32, 8, 2)),
        "key_gradient": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 64, 8, 1)),
    },
    "sm_100": {
        "forward": (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        "query_gradient": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        "key_gradient": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 64, 8, 1)),
    },
    "sm_120": _AMPERE | {"forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2))},
    "gfx942": {
        "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), Tile(64, 32, 8, 1)),
        "query_gradient": (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 16, 8, 1)),
        "key_gradient": (Tile(64, 64, 4, 1), Tile(32, 64, 8, 1), Tile(16, 32, 8, 1)),
    },
    "interpreter": {
        "forward": (Tile(64, 32, 4, 2),) * 3,
        "query_gradient": (Tile(32, 64, 4, 2),) * 3,
        "key_gradient": (Tile(64, 32, 4, 2),) * 3,
    },
}
BUSY = {
    "sm_80": (Tile(128, 64, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
    "sm_90": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 8, 1)),
    "sm_100": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    "sm_120": (Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    "gfx942": (Tile(128, 32, 8, 1), Tile(64, 32, 4, 1), Tile(32, 64, 8, 1)),
}
FLOAT32 = {
    "forward": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
    "query_gradient": (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    "key_gradient": (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
}


# Instead of those, where their sums spill in the code of Triton 3.6, 3.7 or 3.8.
BEFORE_3_9 = {
    ("forward", "sm_80", "busy"): Tile(128, 32, 8, 3),
    ("forward", "sm_80", "128"): Tile(128, 32, 8, 3),
    ("forward", "sm_100", "busy"): Tile(128, 32, 8, 2),
    ("query_gradient", "sm_90", "128"): Tile(128, 64, 8, 2),
    ("query_gradient", "sm_100", "128"): Tile(128, 32, 8, 2),
    ("key_gradient", "sm_80", "busy"): Tile(16, 64, 8, 2),
    ("key_gradient", "sm_90", "busy"): Tile(16, 64, 8, 1),
    ("key_gradient", "sm_90", "128"): Tile(64, 64, 8, 2),
    ("key_gradient", "gfx942", "busy"): Tile(16, 64, 8, 1),
    ("key_gradient", "gfx942", "128"): Tile(16, 64, 8, 1),
} | {("forward", chip, "128 float32"): Tile(32, 16, 8, 1) for chip in CHIPS}


def tile_of(kernel: str, chip: str, head: int, dtype: torch.dtype, busy: bool) -> Tile:
    """The tile for a head size; `busy` with softcap or dropout."""
    if chip == "interpreter":
        return TILES[chip][kernel][0]
    if triton_before(3, 9):
        size = str(next(size for size in HEADS if head <= size))
        kind = f"{size} float32" if dtype == torch.float32 else size
        kind = "busy" if busy and head <= HEADS[1] and dtype != torch.float32 else kind
        if (kernel, chip, kind) in BEFORE_3_9:
            return BEFORE_3_9[kernel, chip, kind]
    if dtype == torch.float32:
        return FLOAT32[kernel][sum(head > size for size in HEADS)]
    if busy and head <= HEADS[1]:
        return BUSY[chip][list(TILES[chip]).index(kernel)]
    return TILES[chip][kernel][sum(head > size for size in HEADS)]


def uses_tma(chip: str, dtype: torch.dtype) -> bool:
    """Whether tiles come through tensor descriptors, where these fit."""
    return chip in ("sm_90", "sm_100") and dtype != torch.float32


def _chip(device: torch.device) -> str:
    """The column of the table that fits a device."""
    if interpreting():
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9 or major == 10:
        return f"sm_{major}0"
    # The others are told apart by their shared memory: A100 has 163 KB, all the rest 99 KB.
    return "sm_80" if (major, minor) == (8, 0) else "sm_120"


def _readable(x: Tensor) -> Tensor:
    """x, or a copy: the elements of a head adjacent, and a tile's within 32 bits."""
    adjacent = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if adjacent and x.stride(-3) < 2**23 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """Of batch, row and head, as the kernels call them; (N, H, D) is one batch."""
    batch, row, head = x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])
    return {f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}


def _padded(head: int) -> int:
    """BLOCK_D: tiles have sides of powers of two, and products 16 at least."""
    return max(16, int(triton.next_power_of_2(head)))


def _shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> dict[str, Any]:
    """The arguments that the kernels of one call share, by name."""
    rows_q, rows_k = q.shape[-3], k.shape[-3]
    unit = 1.0 if q.dtype == torch.float32 else math.log2(math.e)
    arguments: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "seed_ptr": seed}
    arguments |= {
        "cu_q_ptr": None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        "cu_k_ptr": None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        "rows_q": rows_q,
        "rows_k": rows_k,
        "heads": q.shape[-2],
        "repeats": q.shape[-2] * (len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1),
        "group": q.shape[-2] // k.shape[-2],
        "scale": options.scale,
        "factor": (options.softcap or options.scale) * unit,
        "inner": options.scale / options.softcap if options.softcap else 0.0,
        "left": options.left,
        "right": options.right,
        "threshold": int(options.dropout_p * 2**32),
        "keep_scale": 1 / (1 - options.dropout_p),
        "VARLEN": cu_seqlens_q is not None,
        # A side that reaches past every key of the longest possible sequence is no window.
        "LEFT": 0 <= options.left < rows_k,
        "RIGHT": 0 <= options.right < rows_q,
        "SOFTCAP": options.softcap > 0,
        "DROPOUT": seed is not None,
        "HEAD": q.shape[-1],
        "BLOCK_D": _padded(q.shape[-1]),
    }
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments |= _strides(name, x)
    return arguments


def _fits_tma(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe x."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 and stride for stride in strides)
    return aligned and x.numel() > 0 and x.stride(-1) == 1


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of (B, H, S, D), in tiles of one head."""
    x = (x if x.dim() == 4 else x[None]).transpose(1, 2)
    return TensorDescriptor.from_tensor(x, [1, 1, rows, columns])


def _launch(kernel: Any, length: int, block: int, tile: Tile, arguments: dict[str, Any]) -> None:
    """A program for each block of `length` rows of every head of every sequence."""
    tiles = triton.cdiv(length, block)
    programs = tiles * arguments["repeats"]
    if programs:
        arguments = arguments | {"tiles": tiles, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
        if arguments["TMA"]:
            rows = dict.fromkeys(QUERY_ROWS, tile.queries) | dict.fromkeys(KEY_ROWS, tile.keys)
            for name in rows.keys() & set(kernel.arg_names):
                arguments[name] = _descriptor(arguments[name], rows[name], arguments["BLOCK_D"])
        kernel[(programs,)](
            **{name: arguments[name] for name in kernel.arg_names},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )


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
    if options.scale < 0 and not options.softcap:  # the kernel takes the largest q.k for the peak
        q, options = -q, replace(options, scale=-options.scale)
    q, k, v = (_readable(x) for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(statistics_shape(q), dtype=torch.float32, device=q.device)
    lse_remainder = torch.empty(lse_remainder_shape(q), dtype=torch.float32, device=q.device)
    if cu_seqlens_q is not None:  # there may be rows in no sequence
        out.zero_()
        lse.fill_(-math.inf)
        lse_remainder.zero_()
    chip = _chip(q.device)
    arguments = _shared(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options)
    busy = arguments["SOFTCAP"] or arguments["DROPOUT"]
    arguments["TMA"] = uses_tma(chip, q.dtype) and all(_fits_tma(x) for x in (q, k, v))
    arguments |= {
        "out_ptr": out,
        "lse_ptr": lse,
        "lse_remainder_ptr": lse_remainder,
        "SINK": sink is not None,
    }
    arguments["sink_ptr"] = None if sink is None else sink.contiguous()
    tile = tile_of("forward", chip, q.shape[-1], q.dtype, busy)
    _launch(forward_kernel, min(options.max_seqlen_q, q.shape[-3]), tile.queries, tile, arguments)
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
    q, k, v, out, dout = (_readable(x) for x in (q, k, v, out, dout))
    lse = lse.contiguous()
    like = torch.empty_like if cu_seqlens_q is None else torch.zeros_like  # rows in no sequence
    dq, dk, dv = (like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    arguments = _shared(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options)
    chip = _chip(q.device)
    busy = arguments["SOFTCAP"] or arguments["DROPOUT"]
    arguments["TMA"] = uses_tma(chip, q.dtype) and all(_fits_tma(x) for x in (q, k, v, dout))
    arguments |= _strides("out", out) | _strides("dout", dout)
    arguments |= {
        "out_ptr": out,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "lse_remainder_ptr": lse_remainder.contiguous(),
    }
    arguments |= {"dlse_ptr": None if dlse is None else dlse.contiguous(), "DLSE": dlse is not None}
    arguments |= {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "delta_ptr": delta}
    rows_q, rows_k, heads = q.shape[-3], k.shape[-3], q.shape[-2]

    batch = q.shape[0] if q.dim() == 4 else 1
    _launch(
        delta_kernel,
        rows_q,
        DELTA.queries,
        DELTA,
        arguments | {"repeats": batch * heads, "TMA": False},
    )
    tile = tile_of("query_gradient", chip, q.shape[-1], q.dtype, busy)
    longest = min(options.max_seqlen_q, rows_q)
    _launch(query_gradient_kernel, longest, tile.queries, tile, arguments)
    tile = tile_of("key_gradient", chip, q.shape[-1], q.dtype, busy)
    longest = min(options.max_seqlen_k, rows_k)
    arguments["repeats"] //= arguments["group"]
    _launch(key_gradient_kernel, longest, tile.keys, tile, arguments)
    return dq, dk, dv, delta


_TYPES = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr"), "*bf16"),
    **dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr", "sink_ptr"), "*bf16"),
    **dict.fromkeys(("lse_ptr", "lse_remainder_ptr", "dlse_ptr", "delta_ptr"), "*fp32"),
    **dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32"),
    **dict.fromkeys(("rows_q", "rows_k", "heads", "group", "tiles", "left", "right"), "i32"),
    **dict.fromkeys(("scale", "factor", "inner", "keep_scale"), "fp32"),
    "seed_ptr": "*i64",
    "threshold": "i64",
}


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip: bfloat16 with plain causal attention, and all
    features at once; float32."""
    plain = {"VARLEN": False, "SINK": False, "DLSE": False}
    plain |= {"LEFT": False, "RIGHT": True, "SOFTCAP": False, "DROPOUT": False}
    kinds = [
        ("causal 64", 64, torch.bfloat16, plain),
        ("causal 128", 128, torch.bfloat16, plain),
        ("causal 256", 256, torch.bfloat16, plain),
        ("with everything 80", 80, torch.bfloat16, dict.fromkeys(plain, True)),
        ("causal 128 float32", 128, torch.float32, plain),
    ]
    tensors = ("q", "k", "v", "out", "dout")
    strides = [f"{name}_{part}" for name in tensors for part in ("batch", "row", "head")]
    types = _TYPES | dict.fromkeys(strides, "i32")
    aligned = (*(name for name, kind in types.items() if kind.startswith("*")), *strides)
    kernels = {
        "forward": forward_kernel,
        "delta": delta_kernel,
        "query_gradient": query_gradient_kernel,
        "key_gradient": key_gradient_kernel,
    }
    cases = []
    for label, head, dtype, features in kinds:
        busy = features["SOFTCAP"] or features["DROPOUT"]
        for name, kernel in kernels.items():
            if name == "delta" and label != "causal 128":
                continue  # it hangs on the head size alone
            for chip in CHIPS:
                tile = DELTA if name == "delta" else tile_of(name, chip, head, dtype, busy)
                constants = features | {"HEAD": head, "BLOCK_D": _padded(head)}
                constants |= {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
                constants["TMA"] = uses_tma(chip, dtype)
                kind = "fp32" if dtype == torch.float32 else "bf16"
                mine = {n: t.replace("bf16", kind) for n, t in types.items()}
                if constants["TMA"] and name != "delta":
                    for rows, names in ((tile.queries, QUERY_ROWS), (tile.keys, KEY_ROWS)):
                        block = [1, 1, rows, constants["BLOCK_D"]]
                        mine |= dict.fromkeys(names, f"tensordesc<{kind}{block}>")
                cases.append(
                    CompileCase(
                        f"{name} {label}",
                        kernel,
                        mine,
                        {n: v for n, v in constants.items() if n in kernel.arg_names},
                        tuple(n for n in aligned if not mine[n].startswith("tensordesc")),
                        tile.num_warps,
                        tile.num_stages,
                        (chip,),
                    )
                )
    return cases
