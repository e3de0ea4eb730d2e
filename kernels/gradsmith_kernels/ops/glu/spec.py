"""The gated linear units' samples, naive computation, benchmark cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.glu import geglu, swiglu
from gradsmith_kernels.ops.glu.op import ACTIVATIONS, OP
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

Function = Callable[[Tensor, Tensor, str], Tensor]

SHAPES = (
    (3, 7),
    (130,),
    (2, 5, 130),
    (300, 64),
    (6, 4096),
    (5, 9001),  # longer than one block, and no multiple of anything
    (0, 8),
    (4, 0),
)


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    activation: str,
    layout: str,
    device: torch.device,
) -> Inputs:
    """gate, up and the upstream gradient dy. The gates reach from one flat end to the other.

    layout: "contiguous"; "halves" (gate and up are the halves of one contiguous tensor); of gate,
    up and dy: "rows" (rows further apart than they are long), "columns" (elements of a row not
    adjacent), "heads" (a transposed view of four dimensions).
    """
    generator = seeded(math.prod(shape) + len(shape))

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(dtype).to(device)

    def tensor(scale: float = 1.0) -> Tensor:
        if layout == "rows":
            return normal(*shape[:-1], shape[-1] + 24, scale=scale)[..., 8 : 8 + shape[-1]]
        if layout == "columns":
            return normal(*shape[:-1], 2 * shape[-1], scale=scale)[..., ::2]
        if layout == "heads":
            batch, heads, length, size = shape
            return normal(batch, length, heads, size, scale=scale).transpose(1, 2)
        return normal(*shape, scale=scale)

    inputs: Inputs = {"activation": activation, "product": None}
    if layout == "halves":
        inputs["product"] = normal(*shape[:-1], 2 * shape[-1], scale=2.0)
        inputs["gate"], inputs["up"] = inputs["product"].chunk(2, -1)
    else:
        inputs["gate"], inputs["up"] = tensor(scale=2.0), tensor()
    inputs["dy"] = tensor()
    return inputs


def sample(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str, layout: str = "contiguous"
) -> Sample:
    label = "x".join(map(str, shape)) + f" {str(dtype).removeprefix('torch.')}, {activation}"
    label += "" if layout == "contiguous" else f", {layout}"
    return Sample(label, dtype, partial(make_inputs, shape, dtype, activation, layout))


def naive_glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As Llama's, Gemma's and ModernBERT's code in transformers has it."""
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def our_glu(gate: Tensor, up: Tensor, activation: str, backend: str | None = None) -> Tensor:
    if activation == "silu":
        return swiglu(gate, up, backend=backend)
    approximate: Any = "tanh" if activation == "gelu_tanh" else "none"
    return geglu(gate, up, approximate=approximate, backend=backend)


def outputs_and_gradients(function: Function, inputs: Inputs) -> Outputs:
    gate, up = (inputs[name].detach().requires_grad_() for name in ("gate", "up"))
    y = function(gate, up, inputs["activation"])
    dgate, dup = torch.autograd.grad(y, (gate, up), inputs["dy"])
    return {"y": y.detach(), "dgate": dgate, "dup": dup}


class GluSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        samples = [
            sample(shape, dtype, activation)
            for dtype in FLOATS
            for activation in ACTIVATIONS
            for shape in SHAPES
        ]
        for dtype in FLOATS:
            for activation in ACTIVATIONS:
                samples.append(sample((33, 100), dtype, activation, "halves"))
            samples += [
                sample((17, 129), dtype, "silu", "halves"),
                sample((17, 96), dtype, "gelu", "rows"),
                sample((17, 96), dtype, "gelu_tanh", "columns"),
                sample((2, 4, 9, 64), dtype, "silu", "heads"),
            ]
        return samples

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        return outputs_and_gradients(partial(our_glu, backend=backend), inputs)

    def naive(self, inputs: Inputs) -> Outputs:
        return outputs_and_gradients(naive_glu, inputs)

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        ops = torch.ops.gradsmith
        checks = []
        for activation in ACTIVATIONS:
            product = torch.randn(4, 6, 64, device=device)
            gate, up = (half.requires_grad_() for half in product.chunk(2, -1))
            dy = torch.randn(4, 6, 32, device=device)
            arguments = (gate, up, activation)
            checks += [
                OpCheck(ops.glu.default, arguments),
                OpCheck(ops.glu.default, (gate, up.detach(), activation)),
                OpCheck(ops.glu.default, (gate.transpose(0, 1), up.transpose(0, 1), activation)),
            ]
            checks += [
                OpCheck(
                    ops.glu_backward.default,
                    (dy, gate.detach(), up.detach(), activation, need_dgate, need_dup),
                )
                for need_dgate, need_dup in ((True, True), (True, False), (False, True))
            ]
        return checks

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.ops.glu import triton_kernels

        return triton_kernels.compile_cases()

    def bench_cases(self) -> list[BenchCase]:
        bfloat16, float32 = torch.bfloat16, torch.float32
        cases = []
        for activation, rows, cols, dtype, layout in (
            ("silu", 2048, 1024, bfloat16, "contiguous"),
            ("silu", 2048, 1024, bfloat16, "halves"),
            ("silu", 4096, 4096, bfloat16, "contiguous"),
            ("silu", 2048, 1024, float32, "contiguous"),
            ("gelu", 2048, 1024, bfloat16, "contiguous"),
            ("gelu", 2048, 1024, float32, "contiguous"),
            ("gelu_tanh", 2048, 1024, bfloat16, "contiguous"),
            ("gelu_tanh", 2048, 1024, float32, "contiguous"),
        ):
            small = sample((40, cols), dtype, activation, layout)
            of_halves = ", halves of one product" if layout == "halves" else ""
            # Tensors that are moved: forward gate, up, y; backward dy, gate, up, dgate, dup, and of
            # halves both gradients once more, which autograd joins. Operations: an exponential, a
            # quotient and some sums and products, each counted as one.
            for name, timed, moved, flops in (
                ("forward", forward, 3, 5),
                ("forward+backward", forward_backward, 12 if of_halves else 8, 17),
            ):
                cases.append(
                    BenchCase(
                        f"glu {name} {activation} {rows}x{cols} "
                        f"{str(dtype).removeprefix('torch.')}{of_halves}",
                        partial(make_inputs, (rows, cols), dtype, activation, layout),
                        partial(time_ours, timed),
                        {"torch": partial(timed, naive_glu)},
                        moved * rows * cols * dtype.itemsize,
                        flops * rows * cols,
                        partial(check_parity, self, small, None),
                    )
                )
        return cases


def forward(function: Function, inputs: Inputs) -> None:
    with torch.no_grad():
        function(inputs["gate"], inputs["up"], inputs["activation"])


def forward_backward(function: Function, inputs: Inputs) -> None:
    """With respect to gate and up, or to the product whose halves they are."""
    product = inputs["product"]
    if product is None:
        outputs_and_gradients(function, inputs)
        return
    leaf = product.detach().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    y = function(gate, up, inputs["activation"])
    torch.autograd.grad(y, leaf, inputs["dy"])


def time_ours(
    timed: Callable[[Function, Inputs], None], inputs: Inputs, backend: str | None
) -> None:
    timed(partial(our_glu, backend=backend), inputs)


SPEC = GluSpec()
