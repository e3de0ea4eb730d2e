"""Optimizer steps in Triton: one launch over many tensors, whose addresses come from a table.

A launch per tensor would cost more than the work of a small tensor, so every program takes one
chunk of one tensor. Tensors that differ in dtype or alignment go into launches of their own: both
are fixed when a kernel is compiled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsmith_kernels.backends import triton_before
from gradsmith_kernels.ops.common.tensor_lists import Contiguous, address_of, contiguous
from gradsmith_kernels.ops.optimizer_step.quantize import dynamic_map
from gradsmith_kernels.ops.optimizer_step.rules import (
    LAMB_APPLY,
    Options,
    Rule,
    seed_of_step,
    trust_ratio,
)
from gradsmith_kernels.ops.optimizer_step.tensors import STATE_BLOCK, Tensors
from gradsmith_kernels.verify.spec import CompileCase

BLOCK = 1024
CHUNK = 16 * BLOCK  # elements of one program
WIDE_BLOCK = 2048  # 16 bytes of bfloat16 for each of a block's threads, on AMD too
NUM_WARPS = 4
# Of 8-bit states: on NVIDIA one of the two spills; on AMD a warp is twice as wide.
WARPS_8BIT = 4 if triton_before(3, 9) else 8
TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}

# The table's columns: addresses, then the number of elements and the key of the random bits.
COLUMNS = (
    "params",
    "grads",
    "states1",
    "states2",
    "states3",
    "absmax1",
    "absmax2",
    "masters",
    "compensations",
)
COUNT, KEY = tl.constexpr(len(COLUMNS)), tl.constexpr(len(COLUMNS) + 1)
WIDTH = tl.constexpr(len(COLUMNS) + 2)
GROUP = tl.constexpr(STATE_BLOCK)


@triton.jit
def random_bits(key, at):
    x = (at & 0xFFFFFFFF).to(tl.uint32)
    x ^= key + (at >> 32).to(tl.uint32) * 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def load_state(state_ptr, absmax_ptr, map_ptr, at, mask, STATE: tl.constexpr):
    if STATE == tl.uint8:  # noqa: SIM300
        codes = tl.load(state_ptr + at, mask).to(tl.int32)
        if mask is None:
            return tl.load(map_ptr + codes) * tl.load(absmax_ptr + at // GROUP)
        return tl.load(map_ptr + codes, mask) * tl.load(absmax_ptr + at // GROUP, mask)
    return tl.load(state_ptr + at, mask).to(tl.float32)


@triton.jit
def nearest(map_ptr, x, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """The last code from LOW on whose value is not above x."""
    low = tl.full((BLOCK,), LOW, tl.int32)
    high = tl.full((BLOCK,), 255, tl.int32)
    for _ in range(8):
        middle = (low + high + 1) // 2
        above = tl.load(map_ptr + middle) > x
        high = tl.where(above, middle - 1, high)
        low = tl.where(above, low, middle)
    return low


@triton.jit
def store_state(
    state_ptr, absmax_ptr, map_ptr, at, mask, value, random,
    ZERO: tl.constexpr, STATE: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a block of a state; in 8 bits as codes, with a scale for each GROUP of elements."""
    if STATE == tl.uint8:  # noqa: SIM300
        size = tl.abs(value)
        if mask is not None:
            size = tl.where(mask, size, 0.0)
        groups = tl.reshape(size, (BLOCK // GROUP, GROUP))
        most = tl.max(groups, 1)
        inverse = tl.where(most > 0, 1 / most, 0.0)
        x = tl.reshape(groups * inverse[:, None], (BLOCK,))
        scale = tl.reshape(tl.broadcast_to(most[:, None], (BLOCK // GROUP, GROUP)), (BLOCK,))
        low = nearest(map_ptr, x, ZERO, BLOCK)
        high = tl.minimum(low + 1, 255)
        below = tl.load(map_ptr + low)
        gap = tl.load(map_ptr + high) - below
        share = 0.5
        if RANDOM:
            share = 1 - (random.to(tl.float32) + 0.5) * 0.0000152587890625
        count = tl.where(share * gap < x - below, high, low) - ZERO
        code = tl.where(value < 0, ZERO - tl.minimum(count, 127), ZERO + count)
        tl.store(state_ptr + at, code.to(tl.uint8), mask)
        first = at % GROUP == 0
        if mask is not None:
            first = first & mask
        tl.store(absmax_ptr + at // GROUP, scale, first)
    else:
        if RANDOM and STATE == tl.bfloat16:  # noqa: SIM300
            bits = value.to(tl.uint32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            raised = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
            value = tl.where(finite, raised, value)
        tl.store(state_ptr + at, value.to(STATE), mask)


@triton.jit
def average(old, value, share, SMALL: tl.constexpr):
    """beta * old + (1 - beta) * value; `share` as rules._share has it, and whether one is of a
    small beta. The choice costs registers, so the usual kernel does not have it."""
    if SMALL:
        base = tl.where(share.to(tl.int32, bitcast=True) < 0, value, old)
        return base + (value - old) * share
    return old + (value - old) * share


@triton.jit
def lamb_direction(x, m, v, c2, c3, c5, c7):
    return c3 * x + tl.div_rn(m * c7, tl.sqrt_rn(v) * c5 + c2)


@triton.jit
def update(
    p_ptr, g_ptr, s1_ptr, s2_ptr, s3_ptr, a1_ptr, a2_ptr, master_ptr, remainder_ptr,
    c0, c1, c2, c3, c4, c5, c6, c7, signed_map, unsigned_map, key, at, mask, scale,
    RULE: tl.constexpr, STATES: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr,
    REMAINDER: tl.constexpr, RANDOM: tl.constexpr, ZERO_GRADS: tl.constexpr, SMALL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps one block of a tensor. Returns the sums of squares that Lamb needs."""
    g = tl.load(g_ptr + at, mask).to(tl.float32) * scale
    if MASTER:
        x = tl.load(master_ptr + at, mask)
    else:
        x = tl.load(p_ptr + at, mask).to(tl.float32)
        if REMAINDER:
            x += tl.load(remainder_ptr + at, mask).to(tl.float32)
    s1 = x
    s2 = x
    if STATES >= 1:
        s1 = load_state(s1_ptr, a1_ptr, signed_map, at, mask, STATE)
    if STATES >= 2:
        s2 = load_state(s2_ptr, a2_ptr, unsigned_map, at, mask, STATE)
    if RULE != 5:
        g += c6 * x
    sums = 0.0, 0.0
    if RULE == 0:  # adam
        s1 = average(s1, g, c0, SMALL)
        s2 = average(s2, g * g, c1, SMALL)
        if STATE == tl.uint8:  # noqa: SIM300 - the exact root and quotient are calls, which spill
            x = x - c3 * x - c4 * (s1 / (tl.sqrt(s2) * c5 + c2))
        else:
            x = x - c3 * x - c4 * tl.div_rn(s1, tl.sqrt_rn(s2) * c5 + c2)
    elif RULE == 9:  # amsgrad
        s1 = average(s1, g, c0, SMALL)
        s2 = average(s2, g * g, c1, SMALL)
        most = tl.load(s3_ptr + at, mask).to(tl.float32)
        most = tl.where(most > s2, most, s2)
        tl.store(s3_ptr + at, most.to(STATE), mask)
        x = x - c3 * x - c4 * tl.div_rn(s1, tl.sqrt_rn(most) * c5 + c2)
    elif RULE == 1:  # lion
        direction = average(s1, g, c0, SMALL)
        s1 = average(s1, g, c1, SMALL)
        sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))
        x = x - c3 * x - c4 * sign
    elif RULE == 2:  # sgd
        x = x - c3 * x - c4 * g
    elif RULE == 3:  # momentum
        s1 = c0 * s1 + c1 * g
        x = x - c3 * x - c4 * (c2 * g + c5 * s1)
    elif RULE == 4:  # adagrad
        s1 += g * g
        x = x - c3 * x - c4 * tl.div_rn(g, tl.sqrt_rn(s1) + c2)
    elif RULE == 5:  # schedule_free
        s2 = average(s2, g * g, c1, SMALL)
        direction = c3 * x + tl.div_rn(g, tl.sqrt_rn(s2) * c5 + c2)
        x = x + c0 * (s1 - x) - c4 * (1 - c6 * (1 - c0)) * direction
        s1 -= c4 * direction
    elif RULE == 6:  # lamb: moments and norms
        s1 = average(s1, g, c0, SMALL)
        s2 = average(s2, g * g, c1, SMALL)
        direction = lamb_direction(x, s1, s2, c2, c3, c5, c7)
        weight = x
        if mask is not None:
            weight = tl.where(mask, x, 0.0)
            direction = tl.where(mask, direction, 0.0)
        sums = tl.sum(weight * weight), tl.sum(direction * direction)
    elif RULE == 8:  # direction
        s1 = average(s1, g, c0, SMALL)
        x = c2 * g + c5 * s1
    else:  # lamb: the weights
        x = x - c4 * lamb_direction(x, s1, s2, c2, c3, c5, c7)
    if RULE < 6 or RULE == 9:
        x = tl.where(x > c7, x - c7, tl.where(x < -c7, x + c7, x * 0.0))  # NaN stays NaN
    if RULE != 6:
        if MASTER:
            tl.store(master_ptr + at, x, mask)
        rounded = x.to(p_ptr.dtype.element_ty)
        tl.store(p_ptr + at, rounded, mask)
        if REMAINDER:
            left = x - rounded.to(tl.float32)
            tl.store(remainder_ptr + at, left.to(tl.bfloat16), mask)
        if ZERO_GRADS:
            tl.store(g_ptr + at, tl.zeros((BLOCK,), g_ptr.dtype.element_ty), mask)
    if RULE != 7:
        random = random_bits(key, at)
        if STATES >= 1:
            store_state(
                s1_ptr, a1_ptr, signed_map, at, mask, s1, random & 0xFFFF, 127, STATE, RANDOM, BLOCK
            )  # fmt: skip
        if STATES >= 2:
            store_state(
                s2_ptr, a2_ptr, unsigned_map, at, mask, s2, random >> 16, 0, STATE, RANDOM, BLOCK
            )  # fmt: skip
    return sums


@triton.jit
def step_kernel(
    tensors_ptr,  # int64 [tensors, WIDTH]
    coefficients_ptr,  # float32 [tensors, 8]
    chunks_ptr,  # int64 [programs, 2]: tensor, first element
    sums_ptr,  # float32 [programs, 2]: lamb's sums of squares
    signed_map,
    unsigned_map,
    scale,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    MASTER: tl.constexpr,
    REMAINDER: tl.constexpr,
    RANDOM: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    SMALL: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps one chunk of one tensor, a block at a time."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * program)
    first = tl.multiple_of(tl.load(chunks_ptr + 2 * program + 1), BLOCK)
    row = tensors_ptr + WIDTH * tensor
    p_ptr = tl.load(row).to(tl.pointer_type(PARAM))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(GRAD))
    s1_ptr = tl.load(row + 2).to(tl.pointer_type(STATE))
    s2_ptr = tl.load(row + 3).to(tl.pointer_type(STATE))
    s3_ptr = tl.load(row + 4).to(tl.pointer_type(STATE))
    a1_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    a2_ptr = tl.load(row + 6).to(tl.pointer_type(tl.float32))
    master_ptr = tl.load(row + 7).to(tl.pointer_type(tl.float32))
    remainder_ptr = tl.load(row + 8).to(tl.pointer_type(tl.bfloat16))
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        s1_ptr = tl.multiple_of(s1_ptr, 16)
        s2_ptr = tl.multiple_of(s2_ptr, 16)
        s3_ptr = tl.multiple_of(s3_ptr, 16)
        master_ptr = tl.multiple_of(master_ptr, 16)
        remainder_ptr = tl.multiple_of(remainder_ptr, 16)
    count = tl.minimum(tl.load(row + COUNT) - first, CHUNK)
    key = tl.load(row + KEY).to(tl.uint32)
    c_ptr = coefficients_ptr + 8 * tensor
    c0 = tl.load(c_ptr)
    c1 = tl.load(c_ptr + 1)
    c2 = tl.load(c_ptr + 2)
    c3 = tl.load(c_ptr + 3)
    c4 = tl.load(c_ptr + 4)
    c5 = tl.load(c_ptr + 5)
    c6 = tl.load(c_ptr + 6)
    c7 = tl.load(c_ptr + 7)
    whole = count // BLOCK * BLOCK
    lanes = first + tl.arange(0, BLOCK)
    weights = 0.0
    updates = 0.0

    # Whole blocks have no mask: one that may end anywhere would make every access an element wide.
    for start in range(0, whole, BLOCK):
        one, other = update(
            p_ptr, g_ptr, s1_ptr, s2_ptr, s3_ptr, a1_ptr, a2_ptr, master_ptr, remainder_ptr,
            c0, c1, c2, c3, c4, c5, c6, c7, signed_map, unsigned_map, key,
            lanes + start, None, scale,
            RULE, STATES, STATE, MASTER, REMAINDER, RANDOM, ZERO_GRADS, SMALL, BLOCK,
        )  # fmt: skip
        weights += one
        updates += other
    if whole < count:
        at = lanes + whole
        one, other = update(
            p_ptr, g_ptr, s1_ptr, s2_ptr, s3_ptr, a1_ptr, a2_ptr, master_ptr, remainder_ptr,
            c0, c1, c2, c3, c4, c5, c6, c7, signed_map, unsigned_map, key,
            at, at < first + count, scale,
            RULE, STATES, STATE, MASTER, REMAINDER, RANDOM, ZERO_GRADS, SMALL, BLOCK,
        )  # fmt: skip
        weights += one
        updates += other
    if RULE == 6:
        tl.store(sums_ptr + 2 * program, weights)
        tl.store(sums_ptr + 2 * program + 1, updates)


@triton.jit
def norm_kernel(
    tensors_ptr,  # int64 [tensors, 2]: address, number of elements
    chunks_ptr,  # int64 [programs, 2]: tensor, first element
    sums_ptr,  # float64 [programs]
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of one chunk of one gradient."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * program)
    first = tl.multiple_of(tl.load(chunks_ptr + 2 * program + 1), BLOCK)
    g_ptr = tl.load(tensors_ptr + 2 * tensor).to(tl.pointer_type(GRAD))
    if ALIGNED:
        g_ptr = tl.multiple_of(g_ptr, 16)
    count = tl.minimum(tl.load(tensors_ptr + 2 * tensor + 1) - first, CHUNK)
    whole = count // BLOCK * BLOCK
    lanes = first + tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float64)
    for start in range(0, whole, BLOCK):
        g = tl.load(g_ptr + lanes + start).to(tl.float32)
        total += tl.sum(g * g).to(tl.float64)
    if whole < count:
        at = lanes + whole
        g = tl.load(g_ptr + at, at < first + count, other=0.0).to(tl.float32)
        total += tl.sum(g * g).to(tl.float64)
    tl.store(sums_ptr + program, total)


def chunks_of(numels: Sequence[int]) -> Tensor:
    """int64 [programs, 2]: the tensor and the first element of each program."""
    counts = (torch.tensor(numels) + CHUNK - 1) // CHUNK
    index = torch.repeat_interleave(counts)
    firsts = (torch.arange(len(index)) - (counts.cumsum(0) - counts)[index]) * CHUNK
    return torch.stack((index, firsts), 1)


@dataclass(frozen=True)
class _Launch:
    """Tensors of the same dtypes and alignment: their numbers and the table of their addresses."""

    indices: list[int]
    rows: list[list[int]]
    grad: torch.dtype
    param: torch.dtype
    aligned: bool


class Plan:
    def __init__(self, rule: Rule, tensors: Tensors) -> None:
        self._rule, self._tensors = rule, tensors
        self._contiguous = Contiguous(tensors)
        self._columns = [self._contiguous.column(name) for name in COLUMNS if name != "grads"]
        self._state = tensors.states1[0].dtype if rule.states else torch.float32
        device = tensors.params[0].device
        self._maps = [dynamic_map(signed).to(device) for signed in (True, False)]

    def step(
        self,
        grads: list[Tensor],
        options: Options,
        scale: float,
        zero_grads: bool,
        seed: int | None,
    ) -> None:
        with self._contiguous.step(grads, zero_grads) as used:
            self._run(used, options, scale, zero_grads, seed)

    def _run(
        self,
        grads: Sequence[Tensor],
        options: Options,
        scale: float,
        zero_grads: bool,
        seed: int | None,
    ) -> None:
        """One step in place: a launch for each kind of tensors, and a second sweep for Lamb."""
        tensors, rule = self._tensors, self._rule
        counts = [t.add_(1).item() for t in tensors.steps]
        coefficients = [rule.coefficients(options, t) for t in counts]
        of_step = [0 if seed is None else seed_of_step(seed, t) for t in counts]
        keys = [
            (s ^ (stream * 0x9E3779B9 & 0xFFFFFFFF)) * 0x85EBCA6B & 0xFFFFFFFF
            for s, stream in zip(of_step, tensors.streams, strict=True)
        ]
        launches = self._launches(grads, keys)
        lamb = rule.name == "lamb"
        for launch in launches:
            squares = self._launch(
                launch, rule.code, coefficients, scale, zero_grads and not lamb, seed is not None
            )
            for i, pair in zip(launch.indices, squares, strict=True):
                coefficients[i][4] *= trust_ratio(*pair)
        if lamb:
            for launch in launches:
                self._launch(launch, LAMB_APPLY, coefficients, scale, zero_grads, False)

    def _launches(self, grads: Sequence[Tensor], keys: Sequence[int]) -> list[_Launch]:
        """One for each kind of tensors (dtypes, alignment), with the rows of its table."""
        groups: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[int, list[int]]]]
        groups = defaultdict(list)
        for i, (g, key) in enumerate(zip(grads, keys, strict=True)):
            if g.numel() == 0:
                continue
            row = [address_of(column[i]) for column in self._columns]
            row.insert(1, g.data_ptr())
            aligned = all(address % 16 == 0 for address in row)
            kind = (self._tensors.params[i].dtype, g.dtype, aligned)
            groups[kind].append((i, [*row, g.numel(), key]))
        return [
            _Launch([i for i, _ in members], [row for _, row in members], grad, param, aligned)
            for (param, grad, aligned), members in groups.items()
        ]

    def _launch(
        self,
        launch: _Launch,
        code: int,
        coefficients: Sequence[Sequence[float]],
        scale: float,
        zero_grads: bool,
        random: bool,
    ) -> list[tuple[float, float]]:
        """Runs one kernel; for lamb's norms, returns each tensor's sums of squares."""
        device = self._tensors.params[0].device
        chunks = chunks_of([row[COUNT.value] for row in launch.rows])
        sums = torch.empty(len(chunks), 2, device=device)
        numbers = torch.tensor([coefficients[i] for i in launch.indices], dtype=torch.float32)
        bits8 = self._state == torch.uint8 and not torch.version.hip
        step_kernel[(len(chunks),)](
            torch.tensor(launch.rows).to(device),
            numbers.to(device),
            chunks.to(device),
            sums,
            *self._maps,
            scale,
            RULE=code,
            STATES=self._rule.states,
            PARAM=TL_DTYPES[launch.param],
            GRAD=TL_DTYPES[launch.grad],
            STATE=TL_DTYPES[self._state],
            MASTER=bool(self._tensors.masters),
            REMAINDER=bool(self._tensors.compensations),
            RANDOM=random,
            ZERO_GRADS=zero_grads,
            SMALL=any(math.copysign(1, c) < 0 for row in coefficients for c in row[:2]),
            ALIGNED=launch.aligned,
            CHUNK=CHUNK,
            BLOCK=WIDE_BLOCK if self._state == torch.bfloat16 else BLOCK,
            num_warps=WARPS_8BIT if bits8 else NUM_WARPS,
            enable_fp_fusion=True,
        )
        if self._rule.name != "lamb" or code == LAMB_APPLY:
            return [(1.0, 1.0)] * len(launch.indices)
        total = torch.zeros(len(launch.indices), 2, dtype=torch.float64)
        total.index_add_(0, chunks[:, 0], sums.cpu().double())
        return [(one, other) for one, other in total.tolist()]


def squared_norm(grads: list[Tensor]) -> tuple[float, int]:
    """The sum of all squares, and the index of the first tensor that is not finite, else -1."""
    used = contiguous(grads)
    parts = torch.zeros(len(used), dtype=torch.float64)
    groups: dict[tuple[torch.dtype, bool], list[int]] = defaultdict(list)
    for i, g in enumerate(used):
        if g.numel():
            groups[g.dtype, g.data_ptr() % 16 == 0].append(i)
    for (dtype, aligned), indices in groups.items():
        device = used[indices[0]].device
        chunks = chunks_of([used[i].numel() for i in indices])
        sums = torch.empty(len(chunks), dtype=torch.float64, device=device)
        rows = torch.tensor([(used[i].data_ptr(), used[i].numel()) for i in indices])
        norm_kernel[(len(chunks),)](
            rows.to(device),
            chunks.to(device),
            sums,
            GRAD=TL_DTYPES[dtype],
            ALIGNED=aligned,
            CHUNK=CHUNK,
            BLOCK=WIDE_BLOCK,
            num_warps=NUM_WARPS,
        )
        total = torch.zeros(len(indices), dtype=torch.float64)
        total.index_add_(0, chunks[:, 0], sums.cpu())
        parts[indices] = total
    for i, part in enumerate(parts.tolist()):
        if not math.isfinite(part):  # a square overflowed, or the gradient is not finite
            parts[i] = (used[i].double() ** 2).sum().item()
    values = parts.tolist()
    bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), -1)
    return math.fsum(values) if bad < 0 else math.inf, bad


def compile_cases() -> list[CompileCase]:
    """What `compile_checks` compiles for each chip."""
    types = {"tensors_ptr": "*i64", "coefficients_ptr": "*fp32", "chunks_ptr": "*i64"}
    types |= {"sums_ptr": "*fp32", "signed_map": "*fp32", "unsigned_map": "*fp32", "scale": "fp32"}
    shape = {"ALIGNED": True, "CHUNK": CHUNK, "BLOCK": BLOCK}
    aligned = (*types,)[:-1]
    f32, bf16, u8 = tl.float32, tl.bfloat16, tl.uint8
    kinds = [  # name, rule, states, param, grad, state, master, random
        ("adam, float32", 0, 2, f32, f32, f32, False, False),
        ("adam, bfloat16, float32 states and masters", 0, 2, bf16, bf16, f32, True, False),
        ("adam, bfloat16, random rounding", 0, 2, bf16, bf16, bf16, False, True),
        ("adam, float32, 8-bit states", 0, 2, f32, f32, u8, False, False),
        ("adam, float32, 8-bit states, random rounding", 0, 2, f32, f32, u8, False, True),
        ("lion, float32", 1, 1, f32, f32, f32, False, False),
        ("sgd, float32", 2, 0, f32, f32, f32, False, False),
        ("momentum, float32", 3, 1, f32, f32, f32, False, False),
        ("adagrad, float32", 4, 1, f32, f32, f32, False, False),
        ("schedule_free, float32", 5, 2, f32, f32, f32, False, False),
        ("lamb norms, float32", 6, 2, f32, f32, f32, False, False),
        ("lamb weights, float32", 7, 2, f32, f32, f32, False, False),
        ("direction, bfloat16 of float32", 8, 1, bf16, f32, f32, False, False),
        ("amsgrad, float32", 9, 3, f32, f32, f32, False, False),
    ]
    cases = []
    for name, rule, states, param, grad, state, master, random in kinds:
        constants = {"RULE": rule, "STATES": states, "PARAM": param, "GRAD": grad, "STATE": state}
        constants |= {"MASTER": master, "REMAINDER": False, "RANDOM": random, "ZERO_GRADS": True}
        constants["SMALL"] = False
        constants |= shape | {"BLOCK": WIDE_BLOCK if state == bf16 else BLOCK}
        launches: list[tuple[int, tuple[str, ...] | None]] = [(NUM_WARPS, None)]
        if state == u8:
            launches = [
                (WARPS_8BIT, ("sm_80", "sm_90", "sm_100", "sm_120")),
                (NUM_WARPS, ("gfx942",)),
            ]
        for warps, chips in launches:
            case = CompileCase(name, step_kernel, types, constants, aligned, warps, chips=chips)
            cases.append(case)
    norm_types = {"tensors_ptr": "*i64", "chunks_ptr": "*i64", "sums_ptr": "*fp64"}
    for dtype in (f32, bf16):
        constants = {"GRAD": dtype, **shape, "BLOCK": WIDE_BLOCK}
        cases.append(
            CompileCase(f"norm, {dtype}", norm_kernel, norm_types, constants, (*norm_types,), 4)
        )
    return cases
