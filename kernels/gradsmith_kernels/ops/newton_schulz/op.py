"""gradsmith::newton_schulz: schema, checks, fake, backends.

x and y (..., M, N).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.registration import FLOATS, differentiable

OP = Op(
    "newton_schulz",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

torch.library.define(
    "gradsmith::newton_schulz",
    "(Tensor x, int steps, float[] coefficients, float eps, str? backend=None) -> Tensor",
)


def _check(x: Tensor, steps: int, coefficients: Sequence[float], eps: float) -> None:
    if x.dtype not in (*FLOATS, torch.float64):
        raise TypeError(
            f"newton_schulz: x is {x.dtype}; it must be float32, bfloat16, float16 or float64"
        )
    if x.dim() < 2:
        raise ValueError(f"newton_schulz: x is {tuple(x.shape)}; it must have 2 dimensions or more")
    if steps < 1:
        raise ValueError(f"newton_schulz: steps is {steps}; it must be at least 1")
    if len(coefficients) != 3:
        raise ValueError(f"newton_schulz: coefficients is {coefficients}; it must be three numbers")
    if not eps > 0:
        raise ValueError(f"newton_schulz: eps is {eps}; it must be > 0")


def _newton_schulz(
    x: Tensor,
    steps: int,
    coefficients: Sequence[float],
    eps: float,
    backend: str | None = None,
) -> Tensor:
    _check(x, steps, coefficients, eps)
    module = OP.choose(backend, x.device, x.dtype)
    if x.numel() == 0:
        return _empty(x)
    result: Tensor = module.newton_schulz(x, steps, coefficients, eps)
    return result


def _newton_schulz_fake(
    x: Tensor,
    steps: int,
    coefficients: Sequence[float],
    eps: float,
    backend: str | None = None,
) -> Tensor:
    _check(x, steps, coefficients, eps)
    return _empty(x)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


NEWTON_SCHULZ = differentiable("newton_schulz", _newton_schulz, _newton_schulz_fake)
