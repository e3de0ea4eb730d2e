"""AdamW's samples, torch's computation of the same, benchmark cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.adamw import adamw_
from gradsmith_kernels.adamw.op import OP
from gradsmith_kernels.optim import AdamW
from gradsmith_kernels.spec import (
    BenchCase,
    CompileCase,
    Inputs,
    OpCheck,
    Outputs,
    Sample,
    Spec,
    in_float64,
)
from gradsmith_kernels.testing import check_parity

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(), (1,), (3, 5), (0, 4), (5003,), (64, 96), (17000,), (2, 3, 40)]


def make_inputs(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    steps: int,
    warm: bool,
    transposed: bool,
    device: torch.device,
) -> Inputs:
    """Parameters, moments, and gradients for each of `steps` steps.

    warm: the moments are those of a run that has 10 steps behind it; else zero.
    transposed: matrices are transposed views.
    """
    generator = torch.Generator().manual_seed(len(shapes) + steps)

    def normal(shape: tuple[int, ...]) -> Tensor:
        if transposed and len(shape) == 2:
            return torch.randn(shape[::-1], generator=generator).t()
        return torch.randn(shape, generator=generator)

    m = [0.1 * normal(shape) if warm else torch.zeros(shape) for shape in shapes]
    v = [0.1 * normal(shape).square() if warm else torch.zeros(shape) for shape in shapes]
    return {
        "params": [normal(shape).to(dtype).to(device) for shape in shapes],
        "exp_avgs": [tensor.to(device) for tensor in m],
        "exp_avg_sqs": [tensor.to(device) for tensor in v],
        "grads": [
            [normal(shape).to(grad_dtype).to(device) for shape in shapes] for _ in range(steps)
        ],
        "behind": 10.0 if warm else 0.0,
        "storage": dtype,
    }


def sample(
    label: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None = None,
    steps: int = 1,
    warm: bool = True,
    transposed: bool = False,
) -> Sample:
    shapes = SHAPES if steps == 1 else SHAPES[:5]
    make = partial(make_inputs, shapes, dtype, grad_dtype or dtype, steps, warm, transposed)
    return Sample(label, dtype, make)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class AdamWSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        fp32, bf16 = torch.float32, torch.bfloat16
        return [
            sample("float32, first step", fp32, warm=False),
            sample("float32, 100 steps", fp32, steps=100, warm=False),
            sample("float32, warm", fp32),
            sample("float32, transposed", fp32, transposed=True),
            sample("bfloat16, first step", bf16, warm=False),
            sample("bfloat16, warm", bf16),
            sample("bfloat16, float32 gradients", bf16, fp32),
            sample("float32, bfloat16 gradients", fp32, bf16),
        ]

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        params, exp_avgs, exp_avg_sqs = (
            [tensor.clone() for tensor in inputs[name]]
            for name in ("params", "exp_avgs", "exp_avg_sqs")
        )
        steps = [torch.tensor(inputs["behind"]) for _ in params]
        for grads in inputs["grads"]:
            adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, **OPTIONS, backend=backend)
        assert all(step == inputs["behind"] + len(inputs["grads"]) for step in steps)
        return {
            "param": flat(params),
            "exp_avg": flat(exp_avgs),
            "exp_avg_sq": flat(exp_avg_sqs),
        }

    def naive(self, inputs: Inputs) -> Outputs:
        """torch.optim.AdamW, in float32 for bfloat16 parameters, which are then rounded."""
        compute = torch.promote_types(inputs["params"][0].dtype, torch.float32)
        params = [p.to(compute, copy=True).requires_grad_() for p in inputs["params"]]
        optimizer = torch.optim.AdamW(
            params,
            lr=OPTIONS["lr"],
            betas=(OPTIONS["beta1"], OPTIONS["beta2"]),
            eps=OPTIONS["eps"],
            weight_decay=OPTIONS["weight_decay"],
            foreach=False,
        )
        moments = zip(params, inputs["exp_avgs"], inputs["exp_avg_sqs"], strict=True)
        for p, m, v in moments:
            optimizer.state[p] = {
                "step": torch.tensor(inputs["behind"]),
                "exp_avg": m.clone(),
                "exp_avg_sq": v.clone(),
            }
        for grads in inputs["grads"]:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.to(compute)
            optimizer.step()
        rounded = [p.detach().to(inputs["storage"]) for p in params]
        states = [optimizer.state[p] for p in params]
        return {
            "param": flat(rounded),
            "exp_avg": flat([state["exp_avg"] for state in states]),
            "exp_avg_sq": flat([state["exp_avg_sq"] for state in states]),
        }

    def exact(self, inputs: Inputs) -> Outputs:
        return self.naive(in_float64(inputs) | {"storage": torch.float64})

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        def tensors(dtype: torch.dtype) -> list[Tensor]:
            return [torch.rand(3, 5, device=device, dtype=dtype), torch.rand(4, device=device)]

        return [
            OpCheck(
                torch.ops.gradsmith.adamw_.default,
                (
                    tensors(dtype),
                    tensors(torch.float32),
                    tensors(torch.float32),
                    tensors(torch.float32),
                    [torch.tensor(3.0), torch.tensor(0.0)],
                    *OPTIONS.values(),
                ),
            )
            for dtype in (torch.float32, torch.bfloat16)
        ]

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.adamw import triton_kernels

        return triton_kernels.compile_cases()

    def bench_cases(self) -> list[BenchCase]:
        def make(
            shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
        ) -> Inputs:
            params = [
                torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes
            ]
            for p in params:
                p.grad = torch.randn_like(p)
            return {"params": params, "optimizers": {}}

        def step(kind: str, options: dict[str, Any], inputs: Inputs) -> None:
            # The optimizer and its state are made by the first call, which is a warm-up.
            if kind not in inputs["optimizers"]:
                cls = AdamW if kind == "ours" else torch.optim.AdamW
                inputs["optimizers"][kind] = cls(inputs["params"], **options)
            inputs["optimizers"][kind].step()

        cases = []
        layouts: list[tuple[str, Sequence[tuple[int, ...]]]] = [
            ("one tensor of 16M", [(16 * 2**20,)]),
            ("2000 tensors of 4096", [(4096,)] * 2000),
        ]
        for label, shapes in layouts:
            for dtype in (torch.float32, torch.bfloat16):
                elements = sum(math.prod(shape) for shape in shapes)
                short = str(dtype).removeprefix("torch.")
                # torch keeps moments in the parameters' dtype: with bfloat16 it does another, less
                # accurate thing, with less traffic.
                suffix = "" if dtype == torch.float32 else ", bf16 moments"
                cases.append(
                    BenchCase(
                        f"adamw {label} {short}",
                        partial(make, shapes, dtype),
                        lambda inputs, backend: step("ours", {"backend": backend}, inputs),
                        {
                            f"torch fused{suffix}": partial(step, "fused", {"fused": True}),
                            f"torch foreach{suffix}": partial(step, "foreach", {"foreach": True}),
                        },
                        elements * (3 * dtype.itemsize + 16),
                        elements * 15,
                        partial(self._check, sample(f"{short}, warm", dtype)),
                    )
                )
        return cases

    def _check(self, small: Sample, device: torch.device) -> None:
        backend = self.op.resolve(None, device.type, small.dtype)
        check_parity(self, small, backend, device)


SPEC = AdamWSpec()
