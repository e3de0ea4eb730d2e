"""The linear layer's samples, naive computation, benchmark cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gradsmith_kernels.backends import torch_multiplies_bf16
from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.linear import linear
from gradsmith_kernels.ops.linear.op import OP
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


def make_inputs(
    shape: tuple[int, ...],
    outputs: int,
    dtype: torch.dtype,
    bias: bool,
    layout: str,
    device: torch.device,
) -> Inputs:
    """x of `shape`, weight, bias, and an upstream gradient that is not uniform.

    layout: of x, weight and the gradient: "contiguous"; "rows" (further apart than they are long);
    "columns" (elements not adjacent).
    """
    *rows, size = shape
    generator = seeded(outputs * 31 + size)

    def matrix(*lengths: int, deviation: float = 1.0) -> Tensor:
        *others, cols = lengths
        there = {"rows": cols + 5, "columns": 2 * cols}.get(layout, cols)
        whole = deviation * torch.randn(*others, there, generator=generator)
        whole = whole.to(dtype).to(device)
        if layout == "rows":
            return whole[..., 3 : 3 + cols]
        return whole[..., ::2] if layout == "columns" else whole

    return {
        "x": matrix(*shape),
        "weight": matrix(outputs, size, deviation=max(1, size) ** -0.5),
        "bias": torch.randn(outputs, generator=generator).to(dtype).to(device) if bias else None,
        "dy": matrix(*rows, outputs),
    }


def sample(
    shape: tuple[int, ...],
    outputs: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    layout: str = "contiguous",
) -> Sample:
    label = f"{'x'.join(map(str, shape))} to {outputs} {str(dtype).removeprefix('torch.')}"
    label += (", bias" if bias else "") + ("" if layout == "contiguous" else f", {layout}")
    return Sample(label, dtype, partial(make_inputs, shape, outputs, dtype, bias, layout))


def with_float32(shape: tuple[int, ...], outputs: int, device: torch.device) -> Inputs:
    """Inputs in bfloat16, and the same numbers for a peer that multiplies in float32."""
    inputs = make_inputs(shape, outputs, torch.bfloat16, False, "contiguous", device)
    wide = {name: None if x is None else x.float() for name, x in inputs.items()}
    return {**inputs, "float32": wide}


Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def outputs_and_gradients(function: Function, inputs: Inputs) -> Outputs:
    names = [name for name in ("x", "weight", "bias") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    y = function(leaves["x"], leaves["weight"], leaves.get("bias"))
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    return {"y": y.detach()} | {f"d{n}": d for n, d in zip(names, gradients, strict=True)}


class LinearSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        samples = []
        for dtype in FLOATS:
            one = partial(sample, dtype=dtype)
            samples += [
                one((5, 33), 7),
                one((64, 40), 50, bias=True),
                one((3, 67, 70), 130, bias=True),
                one((97, 31), 1, bias=True),
                one((200, 1), 65),
                one((70, 1700), 33),  # more than a piece of the depth
                one((1601, 24), 40, bias=True),  # so for the weight's gradient
                one((100, 16), 1100),  # more than a group of columns, and of the depth for dx
                one((80, 48), 1650, bias=True),
                one((66, 50), 90, layout="rows", bias=True),
                one((66, 50), 90, layout="columns"),
                one((0, 8), 20, bias=True),
                one((9, 0), 20, bias=True),
                one((70, 8), 0),
            ]
        return samples

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        return outputs_and_gradients(partial(linear, backend=backend), inputs)

    def naive(self, inputs: Inputs) -> Outputs:
        return outputs_and_gradients(F.linear, inputs)

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        ops = torch.ops.gradsmith
        checks = []
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            x = torch.randn(2, 9, 20, device=device, requires_grad=needs[0])
            weight = torch.randn(50, 20, device=device, requires_grad=needs[1])
            bias = torch.randn(50, device=device, requires_grad=True) if needs[2] else None
            dy = torch.randn(2, 9, 50, device=device)
            checks += [
                OpCheck(ops.linear.default, (x, weight, bias)),
                OpCheck(ops.linear_backward.default, (dy, x.detach(), weight.detach(), *needs)),
            ]
        return checks

    def compile_cases(self) -> list[CompileCase]:
        return []  # GPUs keep torch's products

    def bench_cases(self) -> list[BenchCase]:
        cases = []
        for rows, size, outputs in (
            (2048, 384, 1024),
            (4096, 768, 2048),
            (4096, 768, 4096),
            (2048, 768, 32000),
        ):
            inputs = partial(with_float32, (rows, size), outputs)
            shape = f"{rows}x{size} to {outputs} bfloat16"
            moved = 2 * (rows * size + outputs * size + rows * outputs)
            work = rows * size * outputs
            # A minute a call where torch multiplies bfloat16 in a slow loop.
            slow = work > 10**9 and not torch_multiplies_bf16()

            def case(
                name: str,
                timed: Callable[[Inputs, str | None], object],
                peer: Callable[[Inputs], object],
                products: int,
                shape: str = shape,
                inputs: Callable[[torch.device], Inputs] = inputs,
                moved: int = moved,
                work: int = work,
                slow: bool = slow,
            ) -> BenchCase:
                peers = {"torch float32": lambda inputs: peer(inputs["float32"])}
                if not slow:
                    peers["torch"] = peer
                return BenchCase(
                    f"linear {name} {shape}",
                    inputs,
                    timed,
                    peers,
                    products * moved,
                    2 * products * work,
                    partial(
                        check_parity, self, sample((80, 48), 1650, torch.bfloat16, bias=True), None
                    ),
                )

            cases += [
                case("forward", self._forward, lambda i: F.linear(i["x"], i["weight"]), 1),
                case("dweight", self._dweight, lambda i: i["dy"].t() @ i["x"], 1),
                case("forward+backward", self.run, self.naive, 3),
            ]
        return cases

    def _forward(self, inputs: Inputs, backend: str | None) -> Tensor:
        return linear(inputs["x"], inputs["weight"], backend=backend)

    def _dweight(self, inputs: Inputs, backend: str | None) -> Tensor:
        needs = (False, True, False)
        _, dweight, _ = torch.ops.gradsmith.linear_backward.default(
            inputs["dy"], inputs["x"], inputs["weight"], *needs, backend
        )
        result: Tensor = dweight
        return result


SPEC = LinearSpec()
