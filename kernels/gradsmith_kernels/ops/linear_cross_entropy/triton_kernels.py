"""Linear cross-entropy in Triton: two kernels on a slice of the logits, products by torch.

The vocabulary is cut into slices. All tokens' logits of one slice are a product; the forward pass
carries each row's maximum and sum from slice to slice, and the backward pass computes the slice
again, turns it into its gradient in place, and has all of that slice's dweight from one product,
with nothing to add up but dhidden. So a call holds SLICE_BYTES of logits and, backward, four bytes
an element of hidden.

hidden (N, C), weight (V, C), bias (V,), target (N,): the tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsmith_kernels.ops.common.triton_math import power, tanh
from gradsmith_kernels.ops.linear_cross_entropy.reference import Options
from gradsmith_kernels.verify.spec import CompileCase

GRADIENTS_IN_FORWARD = False
SLICE_BYTES = 2**26
BLOCK = 2048  # columns of a row that a program holds
NUM_WARPS = 8


@triton.jit
def load_logits(z_row, bias_ptr, column, cols, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    z = tl.load(z_row + column, column < cols, 0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + column, column < cols, 0.0).to(tl.float32)
    if SOFTCAP:
        z = softcap * tanh(z / softcap, True)
    return z


@triton.jit
def statistics_kernel(
    z_ptr,
    bias_ptr,
    target_ptr,
    top_ptr,
    sum_ptr,
    total_ptr,
    at_target_ptr,
    z_stride,
    cols,
    first,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds columns [first, first + cols) to a row's maximum, sum of exp(z - maximum), sum of z."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    z_row = z_ptr + row * z_stride
    # A column of lanes each, so that the loop has no sum across threads.
    top = tl.full([BLOCK], -3.4e38, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        at = start + column
        z = load_logits(z_row, bias_ptr, at, cols, softcap, BIAS, SOFTCAP)
        if TOTAL:
            total += tl.where(at < cols, z, 0.0)
        z = tl.where(at < cols, z, -float("inf"))
        higher = tl.maximum(top, z)
        sums = sums * power(top - higher, True) + power(z - higher, True)
        top = higher
    before = tl.load(top_ptr + row)
    higher = tl.maximum(tl.max(top, 0), before)
    here = tl.sum(sums * power(top - higher, True), 0)
    so_far = tl.load(sum_ptr + row) * power(before - higher, True)
    tl.store(top_ptr + row, higher)
    tl.store(sum_ptr + row, so_far + here)
    if TOTAL:
        tl.store(total_ptr + row, tl.load(total_ptr + row) + tl.sum(total, 0))
    target = tl.load(target_ptr + row) - first
    if (target >= 0) & (target < cols):
        z = load_logits(z_row, bias_ptr, target, cols, softcap, BIAS, SOFTCAP)
        tl.store(at_target_ptr + row, z)


@triton.jit
def dlogits_kernel(
    z_ptr,
    bias_ptr,
    target_ptr,
    upstream_ptr,
    lse_ptr,
    factor_ptr,
    z_stride,
    cols,
    first,
    softcap,
    on_target,
    even,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z becomes g (p factor - on_target [target] - even) (1 - (z / softcap)^2)."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    target = tl.load(target_ptr + row) - first
    upstream, lse = tl.load(upstream_ptr + row), tl.load(lse_ptr + row)
    factor = tl.load(factor_ptr + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = load_logits(z_row, bias_ptr, at, cols, softcap, BIAS, SOFTCAP)
    d = power(z - lse, True) * factor - even - tl.where(at == target, on_target, 0.0)
    d *= upstream
    if SOFTCAP:
        capped = z / softcap
        d *= 1 - capped * capped
    tl.store(z_row + at, d.to(z_ptr.dtype.element_ty), at < cols)


def _chunks(rows: int, options: Options) -> Iterator[slice]:
    step = options.chunk or max(rows, 1)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _slices(rows: int, vocabulary: int, itemsize: int) -> Iterator[slice]:
    step = max(256, SLICE_BYTES // (rows * itemsize) // 256 * 256)
    for begin in range(0, vocabulary, step):
        yield slice(begin, min(begin + step, vocabulary))


def _logits(hidden: Tensor, weight: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """A slice's logits, and the memory to hand in for the next one."""
    if memory is None:  # the first slice is the widest
        memory = hidden.new_empty(len(hidden) * len(weight))
    z = memory[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    return torch.mm(hidden, weight.T, out=z), memory


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Each token's loss and lse, (N,) float64."""
    loss, lse = (hidden.new_empty(len(hidden), dtype=torch.float64) for _ in range(2))
    bias = None if bias is None else bias.contiguous()
    s = options.label_smoothing
    for chunk in _chunks(len(hidden), options):
        rows, targets, memory = hidden[chunk], target[chunk], None
        top = torch.full((len(rows),), -3.4e38, dtype=torch.float32, device=hidden.device)
        sums, total, at_target = (torch.zeros_like(top) for _ in range(3))
        for part in _slices(len(rows), len(weight), hidden.itemsize):
            z, memory = _logits(rows, weight[part], memory)
            statistics_kernel[(len(rows),)](
                z,
                z if bias is None else bias[part],
                targets,
                top,
                sums,
                total,
                at_target,
                z.stride(0),
                z.shape[1],
                part.start,
                options.softcap,
                BIAS=bias is not None,
                SOFTCAP=options.softcap > 0,
                TOTAL=s > 0,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        lse[chunk] = top.double() + sums.double().log()
        smooth = s * (lse[chunk] - total.double() / len(weight)) if s > 0 else 0.0
        loss[chunk] = (1 - s) * (lse[chunk] - at_target.double()) + smooth
    return loss + options.z_loss * lse.square(), lse


def backward(
    upstream: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden (N, C), dweight (V, C) and dbias (V,); empty for what is not needed."""
    dtype, s = hidden.dtype, options.label_smoothing
    bias = None if bias is None else bias.contiguous()
    chunks = list(_chunks(len(hidden), options))
    # One chunk leaves nothing to be added up over chunks.
    wide = dtype if len(chunks) == 1 else torch.float32
    make = torch.empty_like if len(chunks) == 1 else torch.zeros_like
    none = hidden.new_zeros(0)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dweight = make(weight, dtype=wide, memory_format=torch.contiguous_format) if needs[1] else none
    dbias = hidden.new_zeros(len(weight), dtype=torch.float32) if needs[2] else none
    # The kernel takes lse in float32, and what rounding took from it as a factor.
    shift = lse.float()
    factor = ((1 + 2 * options.z_loss * lse) * (shift.double() - lse).exp()).float()
    upstream = upstream.float().contiguous()
    for chunk in chunks:
        rows, targets, memory = hidden[chunk], target[chunk], None
        sums = torch.zeros(rows.shape, dtype=torch.float32, device=hidden.device)
        for part in _slices(len(rows), len(weight), hidden.itemsize):
            z, memory = _logits(rows, weight[part], memory)
            dlogits_kernel[(len(rows), triton.cdiv(z.shape[1], BLOCK))](
                z,
                z if bias is None else bias[part],
                targets,
                upstream[chunk],
                shift[chunk],
                factor[chunk],
                z.stride(0),
                z.shape[1],
                part.start,
                options.softcap,
                1 - s,
                s / len(weight),
                BIAS=bias is not None,
                SOFTCAP=options.softcap > 0,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
            if needs[0]:
                sums += _wide_product(z, weight[part])
            if needs[1] and len(chunks) == 1:
                torch.mm(z.T, rows, out=dweight[part])
            elif needs[1]:
                dweight[part] += _wide_product(z.T, rows)
            if needs[2]:
                dbias[part] += z.sum(0, dtype=torch.float32)
        dhidden[chunk] = sums
    if not chunks:
        dweight.zero_()
    return dhidden if needs[0] else none, dweight.to(dtype), dbias.to(dtype)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, not rounded to their dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # the interpreter, whose tensors are on the CPU


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip: bfloat16, whole slices."""
    types = {"z_ptr": "*bf16", "bias_ptr": "*bf16", "target_ptr": "*i64"}
    names = ("top_ptr", "sum_ptr", "total_ptr", "at_target_ptr")
    types |= dict.fromkeys((*names, "upstream_ptr", "lse_ptr", "factor_ptr"), "*fp32")
    types |= dict.fromkeys(("z_stride", "cols", "first"), "i32")
    aligned = tuple(types)
    types |= dict.fromkeys(("softcap", "on_target", "even"), "fp32")
    cases = []
    for extra in (False, True):
        constants = {"BIAS": extra, "SOFTCAP": extra, "BLOCK": BLOCK}
        label = ", bias, softcap" if extra else ""
        for name, kernel in (("statistics", statistics_kernel), ("dlogits", dlogits_kernel)):
            more = {"TOTAL": extra} if name == "statistics" else {}
            cases.append(
                CompileCase(
                    f"linear_cross_entropy {name}{label}",
                    kernel,
                    types,
                    constants | more,
                    aligned,
                    NUM_WARPS,
                )
            )
    return cases
