"""Newton-Schulz' samples, the published computation, benchmark cases of it and of Muon's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels import optim
from gradsmith_kernels.newton_schulz import COEFFICIENTS, newton_schulz
from gradsmith_kernels.newton_schulz.op import FLOATS, OP
from gradsmith_kernels.spec import (
    BenchCase,
    CompileCase,
    Inputs,
    OpCheck,
    Outputs,
    Sample,
    Spec,
    optimizer_of,
    seeded,
)
from gradsmith_kernels.testing import check_parity

EPS = 1e-7
STEPS = 5


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, device: torch.device
) -> Inputs:
    """One (batch of) matrices.

    kind: normal; low_rank (an eighth); graded (singular values from 1 to 1e-4); transposed (a
    view of normal ones); zero; tiny (of a norm below eps).
    """
    generator = seeded(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    *batch, m, n = shape
    x = normal(*batch, n, m).mT if kind == "transposed" else normal(*shape)
    if kind == "low_rank":
        rank = max(1, min(m, n) // 8)
        x = normal(*batch, m, rank) @ normal(*batch, rank, n)
    elif kind == "graded":
        left, _ = torch.linalg.qr(normal(*batch, m, min(m, n)))
        right, _ = torch.linalg.qr(normal(*batch, n, min(m, n)))
        x = left * torch.logspace(0, -4, min(m, n)) @ right.mT
    elif kind in ("zero", "tiny"):
        x = x * (0.0 if kind == "zero" else 1e-12)
    return {"x": x.to(dtype).to(device)}


def sample(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "normal") -> Sample:
    label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}, {kind}"
    interpret = shape[-1] * shape[-2] < 200_000
    return Sample(label, dtype, partial(make_inputs, shape, dtype, kind), interpret)


def published(x: Tensor) -> Tensor:
    """Keller Jordan's function, in x's dtype (there it is always bfloat16)."""
    a, b, c = COEFFICIENTS
    tall = x.size(-2) > x.size(-1)
    y: Tensor = x.mT if tall else x
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


class NewtonSchulzSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        samples = []
        for dtype in FLOATS:
            shapes: list[tuple[int, ...]]
            shapes = [(1, 1), (3, 70), (96, 200), (200, 96), (2, 3, 40, 50), (0, 4), (2, 0, 5)]
            samples += [sample(shape, dtype) for shape in shapes]
            samples += [
                sample((130, 130), dtype),
                sample((150, 900), dtype),
                sample((900, 150), dtype),
                sample((64, 300), dtype, "transposed"),
                sample((160, 200), dtype, "low_rank"),
                sample((160, 200), dtype, "graded"),
                sample((160, 200), dtype, "zero"),
                sample((160, 200), dtype, "tiny"),
            ]
        # Wide enough to be iterated as Gram matrices on the CPU.
        for kind in ("normal", "low_rank", "graded", "zero", "tiny", "transposed"):
            samples.append(sample((256, 1024), torch.bfloat16, kind))
            samples.append(sample((2, 1100, 130), torch.bfloat16, kind))
        return samples

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        return {"y": newton_schulz(inputs["x"], steps=STEPS, eps=EPS, backend=backend)}

    def naive(self, inputs: Inputs) -> Outputs:
        return {"y": published(inputs["x"])}

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        overload = torch.ops.gradsmith.newton_schulz.default
        return [
            OpCheck(overload, (torch.randn(shape, device=device), STEPS, [*COEFFICIENTS], EPS))
            for shape in ((4, 9), (2, 9, 4), (0, 4))
        ]

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.newton_schulz import triton_kernels

        return triton_kernels.compile_cases()

    # ------------------------------------------------------------------------- benchmarks

    def bench_cases(self) -> list[BenchCase]:
        cases = []
        for count, m, n in ((12, 1024, 4096), (12, 1024, 1024)):
            peers = {"published loop": PublishedMuon, "torch.optim.Muon": torch.optim.Muon}
            flops = count * STEPS * (4 * m * m * n + 2 * m**3)
            cases.append(
                BenchCase(
                    f"muon step, {count} matrices {m}x{n} float32",
                    partial(self._matrices, [(m, n)] * count),
                    muon_step,
                    {name: partial(peer_step, cls) for name, cls in peers.items()},
                    count * m * n * 20,
                    flops,
                    partial(check_parity, self, sample((256, 256 * n // m), torch.bfloat16), None),
                )
            )
        return cases

    @staticmethod
    def _matrices(shapes: Sequence[tuple[int, int]], device: torch.device) -> Inputs:
        params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return {"params": params}


def muon_step(inputs: Inputs, backend: str | None) -> None:
    optimizer_of(optim.Muon, {"backend": backend}, inputs).step()


def peer_step(cls: Callable[..., Any], inputs: Inputs) -> None:
    optimizer_of(cls, {}, inputs).step()


class PublishedMuon(torch.optim.Optimizer):
    """Muon as its author's program has it, in torch, for matrices."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = published(p.grad.lerp(momentum, group["momentum"]).bfloat16())
                update = update * max(1, p.size(-2) / p.size(-1)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])


SPEC = NewtonSchulzSpec()
