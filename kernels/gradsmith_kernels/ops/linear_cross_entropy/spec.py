"""Linear cross-entropy's samples, naive computation, benchmark cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.linear_cross_entropy import linear_cross_entropy
from gradsmith_kernels.ops.linear_cross_entropy.op import OP
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

OPTIONS = ("label_smoothing", "z_loss", "softcap", "reduction", "chunk")


def make_inputs(
    shape: tuple[int, ...],
    size: int,
    vocabulary: int,
    dtype: torch.dtype,
    bias: bool,
    ignored: float,
    layout: str,
    options: Mapping[str, Any],
    device: torch.device,
) -> Inputs:
    """Tensors, an upstream gradient that is neither uniform nor a power of two, and the options.

    shape: of target. ignored: the share of targets to ignore. layout: of hidden, weight and target:
    "contiguous"; "rows" (further apart than they are long); "columns" (elements not adjacent).
    """
    generator = seeded(vocabulary * 31 + size)

    def matrix(*lengths: int, deviation: float = 1.0) -> Tensor:
        *rows, cols = lengths
        cols = {"rows": cols + 5, "columns": 2 * cols}.get(layout, cols)
        whole = deviation * torch.randn(*rows, cols, generator=generator)
        whole = whole.to(dtype).to(device)
        if layout == "rows":
            return whole[..., 3 : 3 + lengths[-1]]
        return whole[..., ::2] if layout == "columns" else whole

    target = torch.randint(vocabulary, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = -100
    if layout != "contiguous":
        target = torch.stack([target, target], -1)[..., 0]
    reduction = options.get("reduction", "mean")
    upstream = torch.rand(shape if reduction == "none" else (), generator=generator) + 0.3
    return {
        "hidden": matrix(*shape, size),
        # Logits as a model has them, some units wide.
        "weight": matrix(vocabulary, size, deviation=2 / max(1, size) ** 0.5),
        "bias": torch.randn(vocabulary, generator=generator).to(dtype).to(device) if bias else None,
        "target": target.to(device),
        "upstream": upstream.to(device),
        **{name: options.get(name) for name in OPTIONS},
    }


def sample(
    shape: tuple[int, ...],
    size: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    ignored: float = 0.0,
    layout: str = "contiguous",
    interpret: bool = True,
    **options: Any,
) -> Sample:
    label = f"{'x'.join(map(str, shape))} tokens, {size}, {vocabulary}"
    label += f" {str(dtype).removeprefix('torch.')}" + (", bias" if bias else "")
    label += f", {ignored:.0%} ignored" if ignored else ""
    label += "" if layout == "contiguous" else f", {layout}"
    label += "".join(f", {name} {value}" for name, value in options.items())
    make = partial(make_inputs, shape, size, vocabulary, dtype, bias, ignored, layout, options)
    return Sample(label, dtype, make, interpret)


def naive_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs) -> Tensor:
    """As transformers' models and their loss have it: the logits rounded, then float32."""
    z = F.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap := inputs["softcap"]:
        z = softcap * torch.tanh(z / softcap)
    target = inputs["target"]
    smoothing = inputs["label_smoothing"] or 0.0
    loss = F.cross_entropy(
        z.flatten(0, -2), target.flatten(), reduction="none", label_smoothing=smoothing
    )
    loss = loss.view(target.shape)
    counts = target != -100
    if inputs["z_loss"]:
        loss = loss + inputs["z_loss"] * torch.where(counts, z.logsumexp(-1), 0.0).square()
    reduction = inputs["reduction"] or "mean"
    if reduction == "mean":
        return loss.sum() / max(1, int(counts.sum()))
    return loss.sum() if reduction == "sum" else loss


Function = Callable[[Tensor, Tensor, Tensor | None, Inputs], Tensor]


def outputs_and_gradients(function: Function, inputs: Inputs) -> Outputs:
    names = [name for name in ("hidden", "weight", "bias") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    loss = function(leaves["hidden"], leaves["weight"], leaves.get("bias"), inputs)
    upstream = inputs["upstream"].to(loss.dtype)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
    named = {f"d{name}": d for name, d in zip(names, gradients, strict=True)}
    return {"loss": loss.detach(), **named}


def ours(backend: str | None) -> Function:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs) -> Tensor:
        given = {name: inputs[name] for name in OPTIONS if inputs[name] is not None}
        return linear_cross_entropy(
            hidden, weight, inputs["target"], bias=bias, backend=backend, **given
        )

    return function


def torch_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs) -> Tensor:
    """The logits stay in the dtype of the product: less memory, and a loss of that dtype."""
    return F.cross_entropy(F.linear(hidden, weight, bias), inputs["target"])


class LinearCrossEntropySpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        samples = []
        for dtype in FLOATS:
            one = partial(sample, dtype=dtype)
            samples += [
                one((1,), 1, 1),
                one((1,), 8, 3, interpret=False),
                one((7,), 5, 300),
                one((600,), 4, 16),
                one((2, 50), 130, 513, bias=True, reduction="none"),
                one((300,), 96, 1000, chunk=100, reduction="sum"),
                one((193,), 66, 517, ignored=0.4, reduction="none", chunk=7),
                one((100,), 64, 257, ignored=1.0),
                one((64,), 48, 300, bias=True, label_smoothing=0.1, z_loss=1e-2),
                one((64,), 48, 300, bias=True, softcap=5.0, label_smoothing=0.3, z_loss=1e-3,
                    ignored=0.3, reduction="none"),
                one((64,), 48, 300, bias=True, softcap=30.0, reduction="sum"),
                one((33,), 40, 200, layout="rows", bias=True),
                one((33,), 40, 200, layout="columns", reduction="none"),
                one((0,), 8, 20, bias=True),
                one((0,), 8, 20, reduction="none"),
                one((5,), 0, 20, bias=True),
                one((700,), 64, 5000, interpret=False, bias=True, z_loss=1e-4),
            ]  # fmt: skip
        return samples

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        return outputs_and_gradients(ours(backend), inputs)

    def naive(self, inputs: Inputs) -> Outputs:
        return outputs_and_gradients(naive_loss, inputs)

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        ops = torch.ops.gradsmith
        checks = []
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            hidden = torch.randn(2, 9, 20, device=device, requires_grad=needs[0])
            weight = torch.randn(50, 20, device=device, requires_grad=needs[1])
            bias = torch.randn(50, device=device, requires_grad=True) if needs[2] else None
            target = torch.randint(50, (2, 9), device=device)
            target[0, 3] = -100
            inputs = (hidden, weight, bias, target)
            plain = (*(x if x is None else x.detach() for x in inputs),)
            lse = torch.rand(2, 9, device=device, dtype=torch.float64)
            for reduction in ("mean", "none"):
                options = (-100, 0.1, 1e-3, 5.0, reduction, 4)
                dloss = torch.rand((2, 9) if reduction == "none" else (), device=device)
                checks += [
                    OpCheck(ops.linear_cross_entropy.default, (*inputs, *options)),
                    OpCheck(
                        ops.linear_cross_entropy_backward.default,
                        (dloss, lse, *plain, *options, *needs),
                    ),
                ]
            if device.type == "cpu":
                options = (-100, 0.1, 1e-3, 5.0, "mean", 4)
                overload = ops.linear_cross_entropy_with_gradients.default
                checks.append(OpCheck(overload, (*plain, *options, *needs)))
                sums = overload(*plain, *options, *needs)[2:]
                dloss = torch.rand((), device=device)
                arguments = (dloss, target, *sums, 20, torch.float32, -100, "mean")
                checks.append(OpCheck(ops.linear_cross_entropy_scale.default, arguments))
        return checks

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.ops.linear_cross_entropy import triton_kernels

        return triton_kernels.compile_cases()

    def bench_cases(self) -> list[BenchCase]:
        def forward(function: Function, inputs: Inputs) -> None:
            with torch.no_grad():
                function(inputs["hidden"], inputs["weight"], None, inputs)

        def forward_backward(function: Function, inputs: Inputs) -> None:
            outputs_and_gradients(function, inputs)

        def time_ours(timed: Callable[[Function, Inputs], None], inputs: Inputs,
                      backend: str | None) -> None:  # fmt: skip
            timed(ours(backend), inputs)

        cases = []
        peers = {"torch": torch_loss, "transformers eager": naive_loss}
        for name, timed, products in (
            ("forward", forward, 1),
            ("forward+backward", forward_backward, 3),
        ):
            for tokens, size, vocabulary, dtype in (
                (2048, 768, 32000, torch.bfloat16),
                (1024, 384, 32000, torch.float32),
            ):
                short = str(dtype).removeprefix("torch.")
                inputs = partial(
                    make_inputs, (tokens,), size, vocabulary, dtype, False, 0.0, "contiguous", {}
                )
                # Each of the products reads or writes all of weight, and of hidden.
                moved = products * (vocabulary + tokens) * size * dtype.itemsize
                cases.append(
                    BenchCase(
                        f"linear_cross_entropy {name} {tokens}x{size}x{vocabulary} {short}",
                        inputs,
                        partial(time_ours, timed),
                        {peer: partial(timed, function) for peer, function in peers.items()},
                        moved,
                        products * 2 * tokens * size * vocabulary,
                        partial(check_parity, self, sample((300,), 96, 1000, dtype), None),
                    )
                )
        return cases


SPEC = LinearCrossEntropySpec()
