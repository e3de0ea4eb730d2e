"""Rotary embedding's samples, naive computation, benchmark cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.rope import rope
from gradsmith_kernels.ops.rope.op import OP
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

Shape = tuple[int, int, int, int, int]  # batch, length, heads, key heads, size


def angles(batch: int, length: int, rotated: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin of the positions, float32, each angle at both places of its pair."""
    frequency = 10000.0 ** -(torch.arange(0, rotated, 2) / rotated)
    # Every sequence begins at a position of its own.
    position = 7 * torch.arange(batch)[:, None] + torch.arange(length)
    angle = position[..., None] * frequency
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def make_inputs(
    shape: Shape,
    rotated: int,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    interleaved: bool,
    shared: bool,
    tables: str,
    layout: str,
    device: torch.device,
) -> Inputs:
    """q, k, cos, sin and the upstream gradients of both (non-uniform).

    rotated: the width of cos and sin. shared: all sequences have the same ones.
    tables: "angles" of positions; "any" numbers, different at the two places of a pair.
    layout: of q, k and the gradients: "contiguous"; "heads" (transposed views, as of a model with
    heads before positions); "fused" (slices of one product's output); "columns" (elements of a
    head, and of cos and sin, not adjacent).
    """
    batch, length, heads, key_heads, size = shape
    generator = seeded(sum(shape) + rotated)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype).to(device)

    def tensors() -> tuple[Tensor, Tensor]:
        if layout == "heads":
            q, k = (normal(batch, count, length, size) for count in (heads, key_heads))
            return q.transpose(1, 2), k.transpose(1, 2)
        if layout == "columns":
            q, k = (normal(batch, length, count, 2 * size) for count in (heads, key_heads))
            return q[..., ::2], k[..., 1::2]
        if layout == "fused":
            both = normal(batch, length, heads + 2 * key_heads, size)
            return both[:, :, :heads], both[:, :, heads : heads + key_heads]
        return normal(batch, length, heads, size), normal(batch, length, key_heads, size)

    table_batch = 1 if shared else batch
    if tables == "angles":
        cos, sin = angles(table_batch, length, rotated, interleaved)
    else:
        cos, sin = 2 * torch.rand(2, table_batch, length, rotated, generator=generator) - 1
    cos, sin = cos.to(table_dtype).to(device), sin.to(table_dtype).to(device)
    if layout == "columns":
        cos, sin = torch.stack((cos, sin), -1).unbind(-1)
    q, k = tensors()
    upstream_q, upstream_k = tensors()
    return {
        "q": q,
        "k": k,
        "cos": cos,
        "sin": sin,
        "interleaved": interleaved,
        "upstream q": upstream_q,
        "upstream k": upstream_k,
    }


def sample(
    shape: Shape,
    dtype: torch.dtype,
    *,
    rotated: int | None = None,
    table_dtype: torch.dtype | None = None,
    interleaved: bool = False,
    shared: bool = False,
    tables: str = "any",
    layout: str = "contiguous",
    interpret: bool = True,
) -> Sample:
    rotated = rotated or shape[-1]
    table_dtype = table_dtype or dtype
    label = "x".join(map(str, shape)) + f" {str(dtype).removeprefix('torch.')}"
    label += "" if rotated == shape[-1] else f", {rotated} rotated"
    if table_dtype != dtype:
        label += f", {str(table_dtype).removeprefix('torch.')} tables"
    label += ", interleaved" * interleaved + ", one table" * shared
    label += ", angles" if tables == "angles" else ""
    label += "" if layout == "contiguous" else f", {layout}"
    make = partial(
        make_inputs, shape, rotated, dtype, table_dtype, interleaved, shared, tables, layout
    )
    return Sample(label, dtype, make, interpret)


def naive_rope(q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """As transformers' models have it: all in q's dtype, or cos's where that is wider."""
    cos, sin = inputs["cos"].unsqueeze(2), inputs["sin"].unsqueeze(2)

    def quarter_turn(x: Tensor) -> Tensor:
        if inputs["interleaved"]:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def rotate(x: Tensor) -> Tensor:
        size = cos.shape[-1]
        turning, rest = x[..., :size], x[..., size:]
        turned = (turning * cos + quarter_turn(turning) * sin).to(x.dtype)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    return rotate(q), rotate(k)


Function = Callable[[Tensor, Tensor, Inputs], tuple[Tensor, Tensor]]
Timed = Callable[[Function, Inputs], None]


def outputs_and_gradients(function: Function, inputs: Inputs) -> Outputs:
    leaves = inputs["q"].detach().requires_grad_(), inputs["k"].detach().requires_grad_()
    q, k = function(*leaves, inputs)
    upstream = [inputs["upstream q"], inputs["upstream k"]]
    dq, dk = torch.autograd.grad([q, k], leaves, upstream)
    return {"q": q.detach(), "k": k.detach(), "dq": dq, "dk": dk}


def ours(backend: str | None) -> Function:
    def function(q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        cos, sin, interleaved = inputs["cos"], inputs["sin"], inputs["interleaved"]
        return rope(q, k, cos, sin, interleaved=interleaved, backend=backend)

    return function


class RopeSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        samples = []
        for dtype in FLOATS:
            for interleaved in (False, True):
                one = partial(sample, dtype=dtype, interleaved=interleaved)
                samples += [
                    one((1, 1, 1, 1, 2)),
                    one((2, 9, 3, 1, 64), tables="angles", table_dtype=torch.float32),
                    one((2, 11, 6, 6, 64), tables="angles", shared=True, layout="heads"),
                    one((1, 9, 8, 2, 128), layout="fused"),
                    one((2, 11, 3, 2, 80)),
                    one((3, 5, 2, 5, 50), shared=True),
                    one((2, 7, 4, 2, 64), layout="columns"),
                    one((2, 7, 4, 2, 96), rotated=24, layout="heads"),
                    one((2, 7, 3, 2, 67), rotated=38, table_dtype=torch.float32),
                    one((1, 3, 2, 3, 9), rotated=2),
                    one((2, 2, 5, 3, 516), rotated=514),
                    one((1, 1, 70, 9, 32)),
                    one((0, 4, 2, 2, 16)),
                    one((2, 0, 2, 2, 16), shared=True),
                    one((2, 4, 3, 0, 16)),
                    one((2, 200, 8, 4, 128), shared=True, interpret=False),
                ]
        return samples

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        return outputs_and_gradients(ours(backend), inputs)

    def naive(self, inputs: Inputs) -> Outputs:
        return outputs_and_gradients(naive_rope, inputs)

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        overload = torch.ops.gradsmith.rope.default
        checks = []
        for needs in ((True, True), (True, False), (False, True)):
            q = torch.randn(2, 5, 4, 16, device=device, requires_grad=needs[0])
            k = torch.randn(2, 2, 5, 16, device=device).transpose(1, 2).requires_grad_(needs[1])
            for rotated, interleaved in ((16, False), (6, True)):
                cos, sin = torch.randn(2, 1, 5, rotated, device=device)
                checks += [
                    OpCheck(overload, (q, k, cos, sin, interleaved, False)),
                    OpCheck(overload, (q, None, cos, sin, interleaved, True)),
                ]
        return checks

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.ops.rope import triton_kernels

        return triton_kernels.compile_cases()

    def bench_cases(self) -> list[BenchCase]:
        def forward(function: Function, inputs: Inputs) -> None:
            with torch.no_grad():
                function(inputs["q"], inputs["k"], inputs)

        def forward_backward(function: Function, inputs: Inputs) -> None:
            outputs_and_gradients(function, inputs)

        def time_ours(timed: Timed, inputs: Inputs, backend: str | None) -> None:
            timed(ours(backend), inputs)

        dtype = torch.bfloat16
        cases = []
        for name, timed, passes in (
            ("forward", forward, 1),
            ("forward+backward", forward_backward, 2),
        ):
            for shape in ((4, 512, 6, 6, 64), (1, 2048, 32, 8, 128)):
                batch, length, heads, key_heads, size = shape
                elements = batch * length * (heads + key_heads) * size
                small = sample((2, 40, heads, key_heads, size), dtype, shared=True, tables="angles")
                cases.append(
                    BenchCase(
                        f"rope {name} B {batch}, S {length}, H {heads}, Hk {key_heads}, D {size}, "
                        "bfloat16",
                        partial(
                            make_inputs, shape, size, dtype, dtype, False, True, "angles",
                            "contiguous",
                        ),
                        partial(time_ours, timed),
                        {"torch": partial(timed, naive_rope)},
                        # q and k are read and written, and cos and sin read, in each pass.
                        passes * (2 * elements + 2 * length * size) * dtype.itemsize,
                        passes * 3 * elements,
                        partial(check_parity, self, small, None),
                    )
                )  # fmt: skip
        return cases


SPEC = RopeSpec()
