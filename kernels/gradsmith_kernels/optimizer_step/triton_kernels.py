"""AdamW in Triton: one launch over many tensors, whose addresses the kernel reads from a table.

A launch per tensor would cost more than the work of a small tensor, so every program takes one
chunk of one tensor. Tensors that differ in dtype or alignment go into launches of their own: both
are fixed when a kernel is compiled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsmith_kernels.spec import CompileCase

BLOCK = 1024
CHUNK = 16 * BLOCK  # elements of one program
NUM_WARPS = 4
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def update(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    at,
    mask,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    decay,
    step_size,
    inverse_correction,
):
    p = tl.load(p_ptr + at, mask).to(tl.float32)
    g = tl.load(g_ptr + at, mask).to(tl.float32)
    m = tl.load(m_ptr + at, mask)
    v = tl.load(v_ptr + at, mask)
    m += (g - m) * one_minus_beta1
    v += (g * g - v) * one_minus_beta2
    denominator = tl.sqrt_rn(v) * inverse_correction + eps
    p = p - decay * p - step_size * tl.div_rn(m, denominator)
    tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask)
    tl.store(m_ptr + at, m, mask)
    tl.store(v_ptr + at, v, mask)


@triton.jit
def step_kernel(
    tensors_ptr,  # int64 [tensors, 5]: addresses of p, g, m and v, and the number of elements
    corrections_ptr,  # float32 [tensors, 2]: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    chunks_ptr,  # int64 [programs, 2]: tensor, first element
    one_minus_beta1,
    one_minus_beta2,
    eps,
    decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * program)
    first = tl.multiple_of(tl.load(chunks_ptr + 2 * program + 1), BLOCK)
    row = tensors_ptr + 5 * tensor
    p_ptr = tl.load(row).to(tl.pointer_type(PARAM))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(GRAD))
    m_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
    step_size = tl.load(corrections_ptr + 2 * tensor)
    inverse_correction = tl.load(corrections_ptr + 2 * tensor + 1)
    count = tl.minimum(tl.load(row + 4) - first, CHUNK)
    whole = count // BLOCK * BLOCK
    lanes = first + tl.arange(0, BLOCK)

    # Whole blocks have no mask: one that may end anywhere would make every access an element wide.
    for start in range(0, whole, BLOCK):
        update(
            p_ptr, g_ptr, m_ptr, v_ptr, lanes + start, None,
            one_minus_beta1, one_minus_beta2, eps, decay, step_size, inverse_correction,
        )  # fmt: skip
    if whole < count:
        at = lanes + whole
        update(
            p_ptr, g_ptr, m_ptr, v_ptr, at, at < first + count,
            one_minus_beta1, one_minus_beta2, eps, decay, step_size, inverse_correction,
        )  # fmt: skip


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    launches = defaultdict(list)
    keep = []  # contiguous copies, alive until the kernels are launched
    copies = []  # (original, contiguous copy) to write back
    for p, g, m, v, count in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        t = count.add_(1).item()
        if p.numel() == 0:
            continue
        g = g.contiguous()
        keep.append(g)
        written = [p, m, v]
        for i, tensor in enumerate(written):
            if not tensor.is_contiguous():
                written[i] = tensor.contiguous()
                copies.append((tensor, written[i]))
        p_at, g_at, m_at, v_at = (x.data_ptr() for x in (written[0], g, written[1], written[2]))
        aligned = (p_at | g_at | m_at | v_at) % 16 == 0
        corrections = (lr / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t))
        row = (p_at, g_at, m_at, v_at, p.numel())
        launches[p.dtype, g.dtype, aligned].append((row, corrections))

    for (p_dtype, g_dtype, aligned), tensors in launches.items():
        device = params[0].device
        rows = torch.tensor([row for row, _ in tensors])
        counts = (rows[:, 4] + CHUNK - 1) // CHUNK
        index = torch.repeat_interleave(counts)
        firsts = (torch.arange(len(index)) - (counts.cumsum(0) - counts)[index]) * CHUNK
        step_kernel[(len(index),)](
            rows.to(device),
            torch.tensor([pair for _, pair in tensors], dtype=torch.float32, device=device),
            torch.stack((index, firsts), 1).to(device),
            1 - beta1,
            1 - beta2,
            eps,
            lr * weight_decay,
            PARAM=TL_DTYPES[p_dtype],
            GRAD=TL_DTYPES[g_dtype],
            ALIGNED=aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    for original, copy in copies:
        original.copy_(copy)


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip."""
    types = {"tensors_ptr": "*i64", "corrections_ptr": "*fp32", "chunks_ptr": "*i64"}
    scalars = ("one_minus_beta1", "one_minus_beta2", "eps", "decay")
    types |= dict.fromkeys(scalars, "fp32")
    return [
        CompileCase(
            f"adamw {p} parameters, {g} gradients",
            step_kernel,
            types,
            {"PARAM": p, "GRAD": g, "ALIGNED": True, "CHUNK": CHUNK, "BLOCK": BLOCK},
            ("tensors_ptr", "corrections_ptr", "chunks_ptr"),
            NUM_WARPS,
        )
        for p, g in ((tl.float32, tl.float32), (tl.bfloat16, tl.bfloat16))
    ]
