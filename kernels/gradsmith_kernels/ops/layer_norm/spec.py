"""LayerNorm's samples, naive computation, benchmark cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gradsmith_kernels.ops.common.norm import SHAPES, in_layout, outputs_and_gradients
from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.layer_norm import layer_norm
from gradsmith_kernels.ops.layer_norm.op import OP
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

# x, weight, bias, residual -> y, h
Function = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
Timed = Callable[[Function, Inputs], None]
Dtypes = tuple[torch.dtype | None, torch.dtype | None]  # of weight and bias; None is without

EPS = 1e-5
MEAN = 1000.0  # of the samples whose mean is large beside their deviation of 1


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parameters: Dtypes,
    residual: bool,
    layout: str,
    mean: float,
    device: torch.device,
) -> Inputs:
    """x, weight, bias, residual and the upstream gradients dy and dh (all non-uniform).

    layout: of x, residual, dy and dh, see `in_layout`. mean: of x.
    """
    generator = seeded(math.prod(shape) + len(shape))

    def tensor(mean: float = 0.0) -> Tensor:
        return in_layout(layout, shape, dtype, device, generator, mean)

    def parameter(dtype: torch.dtype | None) -> Tensor | None:
        values = torch.randn(shape[-1], generator=generator)
        return None if dtype is None else values.to(dtype).to(device)

    inputs: Inputs = {"x": tensor(mean), "weight": parameter(parameters[0])}
    inputs["bias"] = parameter(parameters[1])
    inputs["residual"] = tensor() if residual else None
    inputs["dy"], inputs["dh"] = tensor(), tensor() if residual else None
    return inputs


def sample(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parameters: Dtypes | None = None,
    residual: bool = False,
    layout: str = "contiguous",
    mean: float = 0.0,
) -> Sample:
    parameters = parameters or (dtype, dtype)
    label = "x".join(map(str, shape)) + f" {str(dtype).removeprefix('torch.')}"
    for name, own in zip(("weight", "bias"), parameters, strict=True):
        if own is None:
            label += f", no {name}"
        elif own != dtype:
            label += f", {str(own).removeprefix('torch.')} {name}"
    label += ", residual" if residual else ""
    label += "" if layout == "contiguous" else f", {layout}"
    label += f", mean {mean:g}" if mean else ""
    make = partial(make_inputs, shape, dtype, parameters, residual, layout, mean)
    return Sample(label, dtype, make)


def torch_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """torch's own; it wants one dtype, so mixed ones are computed in the widest and rounded."""
    h = x if residual is None else x + residual
    compute = h.dtype
    for parameter in (weight, bias):
        if parameter is not None:
            compute = torch.promote_types(compute, parameter.dtype)
    weight, bias = (p if p is None else p.to(compute) for p in (weight, bias))
    y = torch.nn.functional.layer_norm(h.to(compute), h.shape[-1:], weight, bias, EPS)
    return y.to(h.dtype), h


def ours(backend: str | None) -> Function:
    def function(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            return layer_norm(x, weight, bias, eps=EPS, backend=backend), x
        return layer_norm(x, weight, bias, eps=EPS, residual=residual, backend=backend)

    return function


class LayerNormSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        samples = [
            sample(shape, dtype, residual=residual)
            for dtype in FLOATS
            for shape in SHAPES
            for residual in (False, True)
        ]
        for dtype in FLOATS:
            samples += [
                sample((17, 96), dtype, residual=True, layout="rows"),
                sample((17, 96), dtype, residual=True, layout="columns"),
                sample((2, 4, 9, 64), dtype, layout="heads"),
                sample((40, 96), dtype, (None, None)),
                sample((40, 96), dtype, (dtype, None), residual=True),
                sample((40, 96), dtype, (None, dtype)),
            ]
        bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
        samples += [
            sample((40, 96), bf16, (fp32, fp32)),
            sample((40, 96), fp16, (fp32, fp16), residual=True),
            sample((40, 96), fp32, (fp16, bf16)),
            sample((100, 300), fp32, mean=MEAN),
            sample((100, 300), fp32, residual=True, mean=-10 * MEAN),
            sample((3, 9001), fp32, mean=10 * MEAN),
        ]
        return samples

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        return outputs_and_gradients(ours(backend), ("weight", "bias"), inputs)

    def naive(self, inputs: Inputs) -> Outputs:
        return outputs_and_gradients(torch_layer_norm, ("weight", "bias"), inputs)

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        ops = torch.ops.gradsmith
        checks = []
        for grad in (True, False):
            x = torch.randn(4, 6, 32, device=device, requires_grad=True)
            residual = torch.randn(4, 6, 32, device=device, requires_grad=True)
            weight = torch.randn(32, device=device, requires_grad=grad)
            bias = torch.randn(32, device=device, requires_grad=True)
            statistics = torch.rand(4, 6, 3, device=device)
            h, w = residual.detach(), weight.detach()
            needed = [True, grad, not grad]
            checks += [
                OpCheck(ops.layer_norm.default, (x, weight, bias, EPS)),
                OpCheck(ops.layer_norm.default, (x.transpose(0, 1), None, bias, EPS)),
                OpCheck(ops.layer_norm.default, (x.detach(), weight, None, EPS)),
                OpCheck(ops.add_layer_norm.default, (x, residual, weight, bias, EPS)),
                OpCheck(ops.add_layer_norm.default, (x.detach(), residual, None, None, EPS)),
                OpCheck(
                    ops.layer_norm_backward.default,
                    (x.detach(), h, h, w, bias.detach(), statistics, needed),
                ),
                OpCheck(
                    ops.layer_norm_backward.default,
                    (x.detach(), None, h, None, None, statistics, [grad, False, False]),
                ),
            ]
        return checks

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.ops.layer_norm import triton_kernels

        return triton_kernels.compile_cases()

    def bench_cases(self) -> list[BenchCase]:
        def forward(function: Function, inputs: Inputs) -> None:
            with torch.no_grad():
                function(inputs["x"], inputs["weight"], inputs["bias"], inputs["residual"])

        def forward_backward(function: Function, inputs: Inputs) -> None:
            outputs_and_gradients(function, ("weight", "bias"), inputs)

        def time_ours(timed: Timed, inputs: Inputs, backend: str | None) -> None:
            timed(ours(backend), inputs)

        cases = []
        bf16, fp32 = torch.bfloat16, torch.float32
        # Tensors of x's size that are moved: forward x, y; backward dy, x, dx; a residual adds its
        # own reading and h's writing forward, and dh's reading backward.
        for name, timed, residual, moved in (
            ("forward", forward, False, 2),
            ("forward+backward", forward_backward, False, 5),
            ("residual forward+backward", forward_backward, True, 8),
        ):
            for rows, cols, dtype in (
                (4096, 768, bf16),
                (4096, 4096, bf16),
                (4096, 384, fp32),
                (64, 128, fp32),
            ):
                short = str(dtype).removeprefix("torch.")
                small = sample((40, cols), dtype, residual=residual)
                cases.append(
                    BenchCase(
                        f"layer_norm {name} {rows}x{cols} {short}",
                        sample((rows, cols), dtype, residual=residual).make,
                        partial(time_ours, timed),
                        {"torch": partial(timed, torch_layer_norm)},
                        moved * rows * cols * dtype.itemsize,
                        (8 if name == "forward" else 22) * rows * cols,
                        partial(check_parity, self, small, None),
                    )
                )
        return cases


SPEC = LayerNormSpec()
