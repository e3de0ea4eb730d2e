"""Newton-Schulz in Triton: the symmetric products, of which one half is computed; X P by torch.

A program computes one tile of the lower triangle of alpha A A^T + beta C and writes it twice, the
second time transposed. Programs of tiles above the diagonal end at once.

A (..., M, N), C and the result (..., M, M).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsmith_kernels.verify.spec import CompileCase

DEPTH_BYTES = 128  # of a tile's row of operands


@triton.jit
def symmetric_kernel(
    a_ptr,
    c_ptr,
    out_ptr,
    m,
    n,
    alpha,
    beta,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of the lower triangle of alpha A A^T + beta C, and its mirror image."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    if row_tile < column_tile:
        return
    matrix = tl.program_id(2).to(tl.int64)
    a_ptr += matrix * m * n
    out_ptr += matrix * m * m
    row = row_tile * TILE + tl.arange(0, TILE)
    column = column_tile * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    left = a_ptr + row.to(tl.int64)[:, None] * n + depth[None, :]
    right = a_ptr + column.to(tl.int64)[:, None] * n + depth[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, n, DEPTH):
        inside = start + depth[None, :] < n
        one = tl.load(left + start, (row[:, None] < m) & inside, 0.0)
        other = tl.load(right + start, (column[:, None] < m) & inside, 0.0)
        total = tl.dot(one, tl.trans(other), total, input_precision="ieee")
    total *= alpha
    at = row.to(tl.int64)[:, None] * m + column[None, :]
    inside = (row[:, None] < m) & (column[None, :] < m)
    if ADD:
        c = tl.load(c_ptr + matrix * m * m + at, inside, 0.0)
        total += beta * c.to(tl.float32)
    result = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, result, inside)
    if row_tile != column_tile:
        mirrored = column.to(tl.int64)[:, None] * m + row[None, :]
        tl.store(out_ptr + mirrored, tl.trans(result), (column[:, None] < m) & (row[None, :] < m))


def _launch(dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """TILE and DEPTH, and the number of warps."""
    if dtype == torch.float32:  # multiplied without tensor cores, from registers
        return {"TILE": 64, "DEPTH": 16}, 8
    return {"TILE": 128, "DEPTH": DEPTH_BYTES // 2}, 8


def symmetric_product(
    a: Tensor, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """alpha a @ a^T + beta c, (B, m, m), for contiguous a (B, m, n) and a symmetric c."""
    batch, m, n = a.shape
    out = torch.empty(batch, m, m, dtype=a.dtype, device=a.device)
    tile, num_warps = _launch(a.dtype)
    tiles = triton.cdiv(m, tile["TILE"])
    symmetric_kernel[(tiles, tiles, batch)](
        a,
        out if c is None else c,
        out,
        m,
        n,
        alpha,
        beta,
        ADD=c is not None,
        **tile,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return out


def newton_schulz(x: Tensor, steps: int, coefficients: Sequence[float], eps: float) -> Tensor:
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(torch.float32)
    y = (y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=eps)).to(x.dtype)
    y = y.reshape(-1, *y.shape[-2:]).contiguous()
    for _ in range(steps):
        gram = symmetric_product(y)
        y = torch.baddbmm(y, symmetric_product(gram, c, gram, b), y, beta=a)
    y = y.view(x.mT.shape if tall else x.shape)
    return (y.mT if tall else y).contiguous()


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip."""
    cases = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        pointers = {f"{p}_ptr": f"*{name}" for p in ("a", "c", "out")}
        types = pointers | {"m": "i32", "n": "i32", "alpha": "fp32", "beta": "fp32"}
        tile, num_warps = _launch(dtype)
        for add in (False, True):
            label = f"{'polynomial' if add else 'gram'}, {name}"
            constants = {"ADD": add, **tile}
            aligned = (*pointers, "m", "n")
            cases.append(CompileCase(label, symmetric_kernel, types, constants, aligned, num_warps))
    return cases
