"""Newton-Schulz' samples and the published computation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.newton_schulz import COEFFICIENTS, newton_schulz
from gradsmith_kernels.ops.newton_schulz.op import OP
from gradsmith_kernels.verify.spec import (
    CompileCase,
    Inputs,
    OpCheck,
    Outputs,
    Sample,
    Spec,
    seeded,
)

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
        from gradsmith_kernels.ops.newton_schulz import triton_kernels

        return triton_kernels.compile_cases()


SPEC = NewtonSchulzSpec()
