"""RMSNorm's samples, naive computation, benchmark cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gradsmith_kernels.ops.common.norm import SHAPES, in_layout, outputs_and_gradients
from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.rms_norm import rms_norm
from gradsmith_kernels.ops.rms_norm.op import OP
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

# x, weight, residual, offset -> y, h
Function = Callable[..., tuple[Tensor, Tensor]]
Timed = Callable[[Function, Inputs], None]

EPS = 1e-6


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    residual: bool,
    layout: str,
    offset: float,
    device: torch.device,
) -> Inputs:
    """x, weight, offset, residual and the upstream gradients dy and dh (all non-uniform).

    layout: of x, residual, dy and dh, see `in_layout`.
    """
    generator = seeded(math.prod(shape) + len(shape))

    def tensor() -> Tensor:
        return in_layout(layout, shape, dtype, device, generator)

    inputs: Inputs = {"x": tensor()}
    inputs["weight"] = torch.randn(shape[-1], generator=generator).to(weight_dtype).to(device)
    inputs["offset"], inputs["residual"] = offset, tensor() if residual else None
    inputs["dy"], inputs["dh"] = tensor(), tensor() if residual else None
    return inputs


def sample(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    residual: bool = False,
    layout: str = "contiguous",
    offset: float = 0.0,
) -> Sample:
    weight_dtype = weight_dtype or dtype
    label = "x".join(map(str, shape)) + f" {str(dtype).removeprefix('torch.')}"
    if weight_dtype != dtype:
        label += f", {str(weight_dtype).removeprefix('torch.')} weight"
    label += ", residual" if residual else ""
    label += "" if layout == "contiguous" else f", {layout}"
    label += f", offset {offset:g}" if offset else ""
    make = partial(make_inputs, shape, dtype, weight_dtype, residual, layout, offset)
    return Sample(label, dtype, make)


def naive_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    """As Llama's code in transformers has it; with an offset, as Gemma's."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if offset:
        return (wide * (offset + weight.to(wide.dtype))).to(x.dtype), h
    return (weight * wide.to(x.dtype)).to(x.dtype), h


def ours(backend: str | None) -> Function:
    def function(
        x: Tensor, weight: Tensor, residual: Tensor | None, offset: float
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            return rms_norm(x, weight, eps=EPS, offset=offset, backend=backend), x
        return rms_norm(x, weight, eps=EPS, offset=offset, residual=residual, backend=backend)

    return function


def torch_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    assert not offset, "torch's has none"
    h = x if residual is None else x + residual
    return torch.nn.functional.rms_norm(h, weight.shape, weight, EPS), h


def of_inputs(function: Function, inputs: Inputs) -> Outputs:
    with_offset = partial(function, offset=inputs["offset"])
    return outputs_and_gradients(with_offset, ("weight",), inputs)


class RmsNormSpec(Spec):
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
                sample((33, 100), dtype, offset=1.0),
                sample((129, 128), dtype, offset=1.0, residual=True),
                sample((5, 9001), dtype, offset=1.0),
            ]
        samples.append(sample((40, 96), torch.bfloat16, torch.float32))
        samples.append(sample((40, 96), torch.float16, torch.float32, residual=True))
        samples.append(sample((40, 96), torch.float32, torch.bfloat16, offset=-0.3))
        return samples

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        return of_inputs(ours(backend), inputs)

    def naive(self, inputs: Inputs) -> Outputs:
        return of_inputs(naive_rms_norm, inputs)

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        ops = torch.ops.gradsmith
        checks = []
        for weight_grad in (True, False):
            x = torch.randn(4, 6, 32, device=device, requires_grad=True)
            residual = torch.randn(4, 6, 32, device=device, requires_grad=True)
            weight = torch.randn(32, device=device, requires_grad=weight_grad)
            rstd = torch.rand(4, 6, device=device)
            checks += [
                OpCheck(ops.rms_norm.default, (x, weight, EPS, 0.0)),
                OpCheck(ops.rms_norm.default, (x.transpose(0, 1), weight, EPS, 1.0)),
                OpCheck(ops.add_rms_norm.default, (x, residual, weight, EPS, 1.0)),
                OpCheck(
                    ops.rms_norm_backward.default,
                    (x.detach(), None, residual.detach(), weight.detach(), rstd, 1.0, weight_grad),
                ),
            ]
        return checks

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.ops.rms_norm import triton_kernels

        return triton_kernels.compile_cases()

    def bench_cases(self) -> list[BenchCase]:
        def forward(function: Function, inputs: Inputs) -> None:
            with torch.no_grad():
                function(inputs["x"], inputs["weight"], inputs["residual"], inputs["offset"])

        def forward_backward(function: Function, inputs: Inputs) -> None:
            of_inputs(function, inputs)

        def time_ours(timed: Timed, inputs: Inputs, backend: str | None) -> None:
            timed(ours(backend), inputs)

        cases = []
        peers = {"torch": torch_rms_norm, "transformers eager": naive_rms_norm}
        # Tensors of x's size that are moved: forward x, y; backward dy, x, dx; a residual adds its
        # own reading and h's writing forward, and dh's reading backward.
        for name, timed, residual, moved in (
            ("forward", forward, False, 2),
            ("forward+backward", forward_backward, False, 5),
            ("residual forward+backward", forward_backward, True, 8),
        ):
            for rows, cols in ((4096, 4096), (4096, 384), (64, 128)):
                for dtype in (torch.bfloat16, torch.float32):
                    short = str(dtype).removeprefix("torch.")
                    small = sample((40, cols), dtype, residual=residual)
                    cases.append(
                        BenchCase(
                            f"rms_norm {name} {rows}x{cols} {short}",
                            sample((rows, cols), dtype, residual=residual).make,
                            partial(time_ours, timed),
                            {peer: partial(timed, function) for peer, function in peers.items()},
                            moved * rows * cols * dtype.itemsize,
                            (4 if name == "forward" else 13) * rows * cols,
                            partial(check_parity, self, small, None),
                        )
                    )
        return cases


SPEC = RmsNormSpec()
