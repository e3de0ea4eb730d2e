"""Samples of Adafactor, and torch.optim.Adafactor as the computation to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gradsmith_kernels.ops.adafactor_step import adafactor_step_
from gradsmith_kernels.ops.adafactor_step.op import OP
from gradsmith_kernels.ops.adafactor_step.tensors import factor_shapes
from gradsmith_kernels.verify.spec import (
    CompileCase,
    Inputs,
    OpCheck,
    Outputs,
    Sample,
    Spec,
    in_float64,
    seeded,
)

Shapes = Sequence[tuple[int, ...]]

SMALL: Shapes = [(), (1,), (5003,), (3, 5), (0, 4), (1, 300), (300, 1), (2, 3, 41), (3, 2, 3, 3)]
LARGE: Shapes = [(70, 4201), (90001,), (300, 257), (1025, 96)]
NUMBERS = {"lr": 1e-2, "beta2_decay": -0.8, "eps1": 1e-7, "eps2": 1e-3, "d": 1.0}
NUMBERS |= {"weight_decay": 0.1}
STATES = ("row_vars", "col_vars")


def make_inputs(
    changed: dict[str, float],
    shapes: Shapes,
    dtypes: tuple[torch.dtype, torch.dtype],
    steps: int,
    warm: bool,
    transposed: bool,
    device: torch.device,
) -> Inputs:
    """Parameters, states, and gradients for each of `steps` steps.

    dtypes: of the parameters and the gradients.
    warm: the states are those of a run that has 10 steps behind it; else zero.
    transposed: matrices are transposed views.
    """
    generator = seeded(len(shapes) + steps)
    param, grad = dtypes

    def normal(shape: tuple[int, ...]) -> Tensor:
        if transposed and len(shape) == 2:
            return torch.randn(shape[::-1], generator=generator).t()
        return torch.randn(shape, generator=generator)

    inputs: Inputs = {
        "numbers": NUMBERS | changed,
        "behind": 10.0 if warm else 0.0,
        "storage": param,
        "params": [normal(shape).to(param).to(device) for shape in shapes],
    }
    for name, number in (("row_vars", 0), ("col_vars", 1)):
        drawn = [normal(factor_shapes(shape)[number]).square() * warm for shape in shapes]
        inputs[name] = [s.to(device) for s in drawn]
    inputs["grads"] = [
        # Rows and columns of different sizes, else the factors are all alike.
        [(normal(s) * normal(factor_shapes(s)[0])).to(grad).to(device) for s in shapes]
        for _ in range(steps)
    ]
    return inputs


def sample(
    label: str,
    dtype: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
    shapes: Shapes = SMALL,
    steps: int = 1,
    warm: bool = True,
    transposed: bool = False,
    interpret: bool = True,
    **changed: float,
) -> Sample:
    dtypes = (dtype, grad or dtype)
    make = partial(make_inputs, changed, shapes, dtypes, steps, warm, transposed)
    # A sample with something in bfloat16 is one of bfloat16: Triton's interpreter cannot take it.
    widest = torch.bfloat16 if torch.bfloat16 in dtypes else dtype
    return Sample(label, widest, make, interpret)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class AdafactorStepSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        bf16, f16 = torch.bfloat16, torch.float16
        return [
            sample("float32, warm"),
            sample("float32, first step", warm=False),
            sample("float32, 5 steps", steps=5, warm=False, interpret=False),
            sample("float32, larger", shapes=LARGE),
            sample("float32, transposed", transposed=True),
            sample("float32, update not clipped", interpret=False, d=1e3, weight_decay=0.0),
            sample("float32, update limited by eps", eps1=0.3, eps2=3.0),
            sample("bfloat16, warm", bf16),
            sample("bfloat16, float32 gradients", bf16, torch.float32),
            sample("float32, bfloat16 gradients", torch.float32, bf16),
            sample("float16, warm", f16),
        ]

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        names = ("params", *STATES)
        params, *states = ([tensor.clone() for tensor in inputs[name]] for name in names)
        steps = [torch.tensor(inputs["behind"]) for _ in params]
        for grads in inputs["grads"]:
            adafactor_step_(
                params, grads, *states, steps=steps, backend=backend, **inputs["numbers"]
            )
        assert all(step == inputs["behind"] + len(inputs["grads"]) for step in steps)
        return {"param": flat(params), "row_var": flat(states[0]), "col_var": flat(states[1])}

    def naive(self, inputs: Inputs) -> Outputs:
        """torch.optim.Adafactor, in float32, rounded to storage at the end."""
        compute = torch.promote_types(inputs["params"][0].dtype, torch.float32)
        params = [p.to(compute, copy=True).requires_grad_() for p in inputs["params"]]
        states = [[s.to(compute, copy=True) for s in inputs[name]] for name in STATES]
        o = inputs["numbers"]
        names = ("lr", "beta2_decay", "d", "weight_decay")
        # torch divides by the size of an empty tensor.
        optimizer = torch.optim.Adafactor(
            [p for p in params if p.numel()],
            eps=(o["eps1"], o["eps2"]),
            foreach=False,
            **{name: o[name] for name in names},
        )
        for p, row_var, col_var in zip(params, *states, strict=True):
            if p.numel():
                state = {"row_var": row_var, "col_var": col_var}
                state = state if p.ndim >= 2 else {"variance": row_var}
                optimizer.state[p] = state | {"step": torch.tensor(inputs["behind"])}
        for grads in inputs["grads"]:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.to(compute)
            optimizer.step()
        outputs = {"param": flat(params).detach().to(inputs["storage"])}
        return outputs | {"row_var": flat(states[0]), "col_var": flat(states[1])}

    def exact(self, inputs: Inputs) -> Outputs:
        return self.naive(in_float64(inputs) | {"storage": torch.float64})

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        checks = []
        for dtype, master in ((torch.float32, False), (torch.bfloat16, True)):
            shapes = [(3, 5), (4,)]
            params = [torch.rand(shape, device=device).to(dtype) for shape in shapes]
            grads = [torch.rand(shape, device=device) for shape in shapes]
            states = [
                [torch.rand(factor_shapes(shape)[k], device=device) for shape in shapes]
                for k in (0, 1)
            ]
            masters = [p.float() for p in params] if master else []
            steps = [torch.tensor(3.0), torch.tensor(0.0)]
            numbers = (1e-2, -0.8, None, 1e-3, 1.0, 0.1, 0.0)
            arguments = (params, grads, *states, masters, [], steps, *numbers, 0.5, True)
            checks.append(OpCheck(torch.ops.gradsmith.adafactor_step_.default, arguments))
        return checks

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.ops.adafactor_step import triton_kernels

        return triton_kernels.compile_cases()


SPEC = AdafactorStepSpec()
