"""Attention's Triton kernels in the interpreter, and what their budgets must show."""

import os
import re
import subprocess
import sys

import pytest

from gradsmith_kernels.ops.attention.spec import SPEC
from gradsmith_kernels.verify import compile_checks

pytest.importorskip("triton")

SHARED_MEMORY = {  # bytes that a program can have
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

# Runs in a process of its own: TRITON_INTERPRET must be set before triton is imported.
PRELUDE = """
import dataclasses, torch
from gradsmith_kernels.ops.attention import attention, attention_varlen, reference, triton_kernels
from gradsmith_kernels.ops.attention.spec import SPEC, Case, make_inputs, sample
from gradsmith_kernels.verify.testing import bits, parity, poisoned_memory
CPU = torch.device("cpu")

def small_tiles():
    # Of different sides, so that short sequences have whole tiles, cut ones and skipped ones.
    Tile = triton_kernels.Tile
    triton_kernels.TILES["interpreter"] = {
        "forward": (Tile(32, 16, 4, 2),),
        "query_gradient": (Tile(16, 32, 4, 2),),
        "key_gradient": (Tile(16, 32, 4, 2),),
    }

def check(*cases, dtypes=(torch.float32, torch.float16)):
    for case in cases:
        for dtype in dtypes:
            for verdict in parity(SPEC, sample(case, dtype), "triton", CPU):
                assert verdict.passed, str(verdict)
"""


def interpret(code):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", PRELUDE + code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize(
    "cases",
    [
        "Case(rows=40, cols=40, causal=True, size=40, lse_gradient=True),"
        "Case(rows=20, cols=40, causal=True, size=16),"
        "Case(rows=40, cols=20, causal=True, size=16),"
        "Case(rows=52, cols=52, window=(9, 21), size=16, lse_gradient=True),"
        "Case(rows=20, cols=40, window=(15, 0), size=80, sink=True, lse_gradient=True),"
        "Case(cols=0), Case(rows=0), Case(batch=0)",
        "Case(rows=20, cols=35, size=96, heads=4, key_heads=1, layout='heads'),"
        "Case(rows=18, cols=35, size=128, softcap=1.5, layout='fused', scale=-0.2),"
        "Case(rows=17, cols=33, size=16, scale=-0.4),"
        "Case(batch=2, rows=20, cols=20, dropout=0.3, sink=True, heads=4, key_heads=2)",
        "Case(lengths=((35, 35), (0, 7), (5, 0), (1, 1), (3, 40)), causal=True, size=16,"
        " heads=4, key_heads=1, padding=5, lse_gradient=True),"
        "Case(lengths=((33, 40), (40, 20)), window=(6, 4), dropout=0.2, size=16, heads=1,"
        " key_heads=1, layout='elements')",
    ],
)
def test_parity_with_float64(cases):
    interpret(f"small_tiles()\ncheck({cases})")


def test_parity_through_tensor_descriptors():
    """Which sm_90 and sm_100 take for the tiles; the next sequence's rows must not leak in."""
    interpret(
        """
small_tiles()
triton_kernels.uses_tma = lambda chip, dtype: True
made = []
descriptor = triton_kernels._descriptor
triton_kernels._descriptor = lambda *args: made.append(args) or descriptor(*args)
check(
    Case(rows=50, cols=67, size=80, causal=True, heads=4, key_heads=2),
    Case(rows=40, cols=40, size=16, window=(9, 3), layout="heads"),
    Case(lengths=((40, 40), (0, 7), (1, 1), (3, 35)), causal=True, size=16, padding=5),
)
assert made
count = len(made)
check(Case(size=17))  # rows that are no multiple of 16 bytes: by addresses
assert len(made) == count
"""
    )


@pytest.mark.parametrize("tma", [False, True])
def test_sequences_do_not_see_each_other(tma):
    """NaN in one sequence, and in the rows after the last, stays there."""
    interpret(
        f"""
small_tiles()
triton_kernels.uses_tma = lambda chip, dtype: {tma}
torch.manual_seed(0)
q, k, v = (torch.randn(60, 2, 16) for _ in range(3))
ends = torch.tensor([0, 21, 30, 49], dtype=torch.int32)
for x in (q, k, v):
    x[21:30] = x[49:] = torch.nan
leaves = [x.clone().requires_grad_() for x in (q, k, v)]
with poisoned_memory():
    out, lse = attention_varlen(
        *leaves, ends, ends, 19 + 2, 19 + 2, causal=True, return_lse=True, backend="triton"
    )
    upstream = torch.randn_like(out), torch.randn_like(lse)
    upstream[0][49:] = upstream[1][:, 49:] = torch.nan
    gradients = torch.autograd.grad((out, lse), leaves, upstream)
for x in (out, *gradients):
    assert x[:21].isfinite().all() and x[30:49].isfinite().all()
    assert x[21:30].isnan().all()
    assert (x[49:] == 0).all()
assert (lse[:, 49:] == -torch.inf).all() and lse[:, :21].isfinite().all()
"""
    )


def test_rows_that_see_nothing_give_zero():
    interpret(
        """
small_tiles()
q, k, v = (torch.randn(1, n, 2, 16).requires_grad_() for n in (50, 20, 20))
with poisoned_memory():
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="triton")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
assert (out[:, :30] == 0).all() and (lse[..., :30] == -torch.inf).all()
assert (dq[:, :30] == 0).all() and lse[..., 30:].isfinite().all()
assert all(x.isfinite().all() for x in (out, dq, dk, dv))
"""
    )


def test_bad_ends_stay_inside_the_tensors():
    """On a GPU the values of cu_seqlens are not read on the host: what lies outside is cut off."""
    interpret(
        """
small_tiles()
q, k, v = (torch.randn(20, 1, 16) for _ in range(3))
good = torch.tensor([0, 8, 20], dtype=torch.int32)
bad = torch.tensor([-5, 8, 10**6], dtype=torch.int32)
options = reference.Options(0.25, -1, 0, 0.0, 0.0, 20, 20)
results = []
for ends in (good, bad):
    out, lse, rest = triton_kernels.forward(q, k, v, ends, ends, None, None, options)
    gradients = triton_kernels.backward(
        out, None, q, k, v, out, lse, rest, ends, ends, None, options
    )
    results.append((out, lse, *gradients))
for expected, found in zip(*results):
    assert torch.equal(bits(expected), bits(found))
falling = torch.tensor([0, 15, 3], dtype=torch.int32)
out, _, _ = triton_kernels.forward(q, k, v, falling, falling, None, None, options)
assert out.isfinite().all() and (out[15:] == 0).all()
"""
    )


def test_dropout_keeps_what_the_reference_keeps():
    """With v = 1 / p an entry of the output is a count of what is kept: exactly the mask."""
    interpret(
        """
small_tiles()
batch, rows, cols, heads, p = 2, 20, 48, 3, 0.35
seed = torch.tensor(-(2**50) + 12345)
q, k = torch.zeros(batch, rows, heads, 64), torch.zeros(batch, cols, heads, 64)
v = torch.eye(cols, 64)[None, :, None].expand(batch, -1, heads, -1) * cols * (1 - p)
out = attention(q, k, v, dropout_p=p, dropout_seed=seed, backend="triton")
for b in range(batch):
    mask = reference.kept(seed, p, b, heads, rows, cols)
    assert 0.5 < mask.float().mean() < 0.8
    assert torch.equal(out[b, ..., :cols].transpose(0, 1) > 0.5, mask)
    assert torch.allclose(out[b, ..., :cols].transpose(0, 1), mask.float(), atol=1e-5)
"""
    )


def budgets():
    return compile_checks.read_budgets(SPEC)[1]


def test_kernels_fit_into_shared_memory():
    assert budgets().keys() == SHARED_MEMORY.keys()
    for chip, kernels in budgets().items():
        for kernel, resources in kernels.items():
            assert resources["shared"] <= SHARED_MEMORY[chip], (chip, kernel)


def test_products_run_on_the_tensor_cores_without_spills():
    for chip, kernels in budgets().items():
        for kernel, resources in kernels.items():
            assert resources["stack"] == 0, (chip, kernel)
            if not re.search("delta|float32", kernel):
                assert resources["tensor_core"] > 0, (chip, kernel)


def test_tiles_are_loaded_wide():
    """By 128 bits, or whole through tensor descriptors."""
    for chip, kernels in budgets().items():
        for kernel, resources in kernels.items():
            assert resources["loads_128"] > 0, (chip, kernel)
