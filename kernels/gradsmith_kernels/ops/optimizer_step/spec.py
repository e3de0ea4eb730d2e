"""Samples of every rule, and plain PyTorch's computation of the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.ops.optimizer_step import optimizer_step_, quantize
from gradsmith_kernels.ops.optimizer_step.op import OP
from gradsmith_kernels.ops.optimizer_step.rules import RULES
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

SHAPES = [(), (1,), (3, 5), (0, 4), (5003,), (64, 96), (17000,), (2, 3, 40)]
NUMBERS = {"lr": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
NUMBERS |= {"decoupled": 1.0, "l1": 0.0, "momentum": 0.9, "dampening": 0.1, "nesterov": 0.0}
NUMBERS |= {"lr_decay": 0.01, "average": 0.1}
ABSMAX = ("absmax1", "absmax2")


def options(rule: str, **changed: float) -> dict[str, float]:
    numbers = NUMBERS | changed
    return {name: numbers[name] for name in RULES[rule].options}


def make_inputs(
    rule: str,
    changed: dict[str, float],
    shapes: Sequence[tuple[int, ...]],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    steps: int,
    warm: bool,
    transposed: bool,
    device: torch.device,
) -> Inputs:
    """Parameters, states, and gradients for each of `steps` steps.

    dtypes: of the parameters, the gradients and the states.
    warm: the states are those of a run that has 10 steps behind it; else zero.
    transposed: matrices are transposed views.
    """
    generator = seeded(len(shapes) + steps)
    param, grad, state = dtypes

    def normal(shape: tuple[int, ...]) -> Tensor:
        if transposed and len(shape) == 2:
            return torch.randn(shape[::-1], generator=generator).t()
        return torch.randn(shape, generator=generator)

    def states(number: int) -> list[Tensor]:
        if number >= RULES[rule].states:
            return []
        drawn = [0.1 * normal(shape) * warm for shape in shapes]
        if rule == "schedule_free" and not number:  # z starts at the weights
            return [s + p for s, p in zip(drawn, params, strict=True)]
        # Second moments and sums are not negative.
        return [s.square() if number or rule == "adagrad" else s for s in drawn]

    params = [normal(shape).to(param) for shape in shapes]
    inputs: Inputs = {
        "rule": rule,
        "options": options(rule, **changed),
        "params": [p.to(device) for p in params],
        "behind": 10.0 if warm else 0.0,
        "storage": param,
        "state_storage": state,
    }
    for number in (0, 1, 2):
        drawn = states(number)
        scales = []
        if state == torch.uint8:
            encoded = [quantize.encode(s, signed=number == 0) for s in drawn]
            drawn, scales = [e[0] for e in encoded], [e[1] for e in encoded]
        inputs[f"states{number + 1}"] = [
            s.to(state).to(device) if state != torch.uint8 else s.to(device) for s in drawn
        ]
        if number < len(ABSMAX):
            inputs[ABSMAX[number]] = [s.to(device) for s in scales]
    inputs["grads"] = [
        [normal(shape).to(grad).to(device) for shape in shapes] for _ in range(steps)
    ]
    return inputs


def sample(
    label: str,
    rule: str,
    dtype: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
    state: torch.dtype = torch.float32,
    steps: int = 1,
    warm: bool = True,
    transposed: bool = False,
    **changed: float,
) -> Sample:
    shapes = SHAPES if steps == 1 else SHAPES[:5]
    dtypes = (dtype, grad or dtype, state)
    make = partial(make_inputs, rule, changed, shapes, dtypes, steps, warm, transposed)
    # A sample with something in bfloat16 is one of bfloat16: Triton's interpreter cannot take it.
    widest = torch.bfloat16 if torch.bfloat16 in dtypes else dtype
    # And of many steps it would show no more than of one: errors add up on the CPU as well.
    return Sample(f"{rule}, {label}", widest, make, interpret=steps < 100)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def torch_step(inputs: Inputs, params: list[Tensor], states: list[list[Tensor]]) -> None:
    """torch.optim's steps, for the rules that it has."""
    rule, o = inputs["rule"], inputs["options"]
    betas = (o.get("beta1"), o.get("beta2"))
    keys: tuple[str, ...] = ()
    cls: Any
    kwargs: dict[str, Any]
    if rule in ("adam", "amsgrad"):
        cls = torch.optim.AdamW if o["decoupled"] else torch.optim.Adam
        kwargs = {"betas": betas, "eps": o["eps"], "weight_decay": o["weight_decay"]}
        kwargs["amsgrad"] = rule == "amsgrad"
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: len(states)]
    elif rule == "adagrad":
        cls, keys = torch.optim.Adagrad, ("sum",)
        kwargs = {name: o[name] for name in ("lr_decay", "eps", "weight_decay")}
    else:
        cls, keys = torch.optim.SGD, ("momentum_buffer",) if rule == "momentum" else ()
        kwargs = {name: o[name] for name in ("momentum", "dampening") if name in o}
        kwargs |= {"weight_decay": o["weight_decay"], "nesterov": bool(o.get("nesterov"))}
    leaves = [p.requires_grad_() for p in params]
    optimizer: Any = cls(leaves, lr=o["lr"], foreach=False, **kwargs)
    for i, p in enumerate(leaves):
        state = {key: column[i] for key, column in zip(keys, states, strict=True)}
        if rule != "momentum" or inputs["behind"]:  # torch's SGD has no buffer before step 1
            optimizer.state[p] = state | {"step": torch.tensor(inputs["behind"])}
    for grads in inputs["grads"]:
        for p, grad in zip(leaves, grads, strict=True):
            p.grad = grad.to(p.dtype)
        optimizer.step()
    for i, p in enumerate(leaves):
        p.requires_grad_(False)
        for key, column in zip(keys, states, strict=True):
            column[i] = optimizer.state[p][key]


def published_step(inputs: Inputs, params: list[Tensor], states: list[list[Tensor]]) -> None:
    """The papers' pseudocode, for the rules that torch does not have."""
    o = inputs["options"]
    lr, wd, b1, b2 = (o.get(name) for name in ("lr", "weight_decay", "beta1", "beta2"))
    for i, p in enumerate(params):
        for t, grads in enumerate(inputs["grads"], int(inputs["behind"]) + 1):
            g, m = grads[i].to(p.dtype), states[0][i]
            if inputs["rule"] == "direction":  # as torch.optim.Muon
                m.lerp_(g, 1 - o["momentum"])
                p.copy_(g.lerp(m, o["momentum"]) if o["nesterov"] else m)
                continue
            if inputs["rule"] == "lion":
                p.mul_(1 - lr * wd).sub_(lr * torch.sign(b1 * m + (1 - b1) * g))
                m.mul_(b2).add_(g, alpha=1 - b2)
                continue
            v = states[1][i]
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            denominator = (v / (1 - b2**t)).sqrt() + o["eps"]
            if inputs["rule"] == "schedule_free":
                direction = g / denominator + wd * p
                p.lerp_(m, o["average"])
                p.sub_(lr * (1 - b1 * (1 - o["average"])) * direction)
                m.sub_(lr * direction)
            else:
                m.mul_(b1).add_(g, alpha=1 - b1)
                direction = m / (1 - b1**t) / denominator + wd * p
                weight, size = p.norm(), direction.norm()
                ratio = weight / size if weight > 0 and size > 0 else 1.0
                p.sub_(lr * ratio * direction)


class OptimizerStepSpec(Spec):
    op = OP

    def samples(self) -> list[Sample]:
        bf16, f16 = torch.bfloat16, torch.float16
        found = []
        for rule in RULES:
            found += [
                sample("float32, warm", rule),
                sample("float32, first step", rule, warm=False),
                # torch has decoupled decay for Adam only; a step of the others is easily corrected.
                # Lion's sign of a near-zero falls either way, which decides the error: few steps.
                sample(
                    f"float32, {10 if rule == 'lion' else 100} steps",
                    rule,
                    steps=10 if rule == "lion" else 100,
                    warm=False,
                    decoupled=float(rule in ("adam", "amsgrad", "lion")),
                ),
                sample("bfloat16, warm", rule, bf16),
            ]
        return [
            *found,
            sample("float32, transposed", "adam", transposed=True),
            sample("L2, warm", "adam", decoupled=0.0),
            sample("betas of 0 and 0.001, warm", "adam", beta1=0.0, beta2=1e-3),
            sample("betas of 0.3 and 0, warm", "lamb", beta1=0.3, beta2=0.0),
            sample("bfloat16 states", "amsgrad", state=bf16),
            sample("L2 and Nesterov, warm", "momentum", decoupled=0.0, nesterov=1.0, dampening=0.0),
            sample("L2, warm", "adagrad", decoupled=0.0),
            sample("Nesterov, warm", "direction", nesterov=1.0),
            sample("bfloat16, float32 gradients", "adam", bf16, torch.float32),
            sample("float32, bfloat16 gradients", "adam", torch.float32, bf16),
            sample("float16, warm", "adam", f16),
            sample("float32, bfloat16 states", "adam", state=bf16),
            sample("bfloat16, bfloat16 states", "lion", bf16, state=bf16),
            sample("float32, 8-bit states", "adam", state=torch.uint8),
            sample("float32, 8-bit states", "lion", state=torch.uint8),
        ]

    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        names = ("params", "states1", "states2", "states3", *ABSMAX)
        params, *columns = ([tensor.clone() for tensor in inputs[name]] for name in names)
        steps = [torch.tensor(inputs["behind"]) for _ in params]
        count = RULES[inputs["rule"]].states
        for grads in inputs["grads"]:
            optimizer_step_(
                inputs["rule"],
                params,
                grads,
                *columns[:count],
                absmax=columns[3:],
                steps=steps,
                options=inputs["options"],
                backend=backend,
            )
        assert all(step == inputs["behind"] + len(inputs["grads"]) for step in steps)
        outputs = {"param": flat(params)}
        if inputs["state_storage"] != torch.uint8:  # codes are compared in test_optim_8bit.py
            outputs |= {f"state{k + 1}": flat(columns[k]) for k in range(count)}
        return outputs

    def naive(self, inputs: Inputs) -> Outputs:
        """torch.optim or the papers' pseudocode, in float32, rounded to storage at the end."""
        compute = torch.promote_types(inputs["params"][0].dtype, torch.float32)
        params = [p.to(compute, copy=True) for p in inputs["params"]]
        states = [
            [s.to(compute, copy=True) for s in inputs[f"states{k + 1}"]]
            if inputs["state_storage"] != torch.uint8
            else [
                quantize.decode(s, a.float(), signed=k == 0).to(compute)
                for s, a in zip(inputs[f"states{k + 1}"], inputs[ABSMAX[k]], strict=True)
            ]
            for k in range(RULES[inputs["rule"]].states)
        ]
        known = inputs["rule"] in ("adam", "amsgrad", "sgd", "momentum", "adagrad")
        decoupled = inputs["options"].get("decoupled") and inputs["rule"] not in ("adam", "amsgrad")
        if known and decoupled:
            assert len(inputs["grads"]) == 1
            for p in params:
                p.mul_(1 - inputs["options"]["lr"] * inputs["options"]["weight_decay"])
            inputs = inputs | {"options": inputs["options"] | {"weight_decay": 0.0}}
        (torch_step if known else published_step)(inputs, params, states)
        outputs = {"param": flat(params).to(inputs["storage"])}
        if inputs["state_storage"] != torch.uint8:
            storage = inputs["state_storage"]
            outputs |= {f"state{k + 1}": flat(s).to(storage) for k, s in enumerate(states)}
        return outputs

    def exact(self, inputs: Inputs) -> Outputs:
        wide = in_float64(inputs) | {"storage": torch.float64}
        if inputs["state_storage"] != torch.uint8:
            wide["state_storage"] = torch.float64
        return self.naive(wide)

    def opchecks(self, device: torch.device) -> list[OpCheck]:
        def tensors(dtype: torch.dtype) -> list[Tensor]:
            return [torch.rand(3, 5, device=device).to(dtype), torch.rand(4, device=device)]

        checks = []
        for rule, dtype, master in (
            ("adam", torch.float32, False),
            ("adam", torch.bfloat16, True),
            ("lion", torch.float32, False),
        ):
            params = [p.to(dtype) for p in tensors(dtype)]
            states = [tensors(torch.float32) if RULES[rule].states > k else [] for k in (0, 1)]
            masters = [p.float() for p in params] if master else []
            arguments = (rule, params, tensors(torch.float32), *states, [], [], [], masters, [])
            steps = [torch.tensor(3.0), torch.tensor(0.0)]
            numbers = list(options(rule).values())
            rest = (steps, [0, 1], numbers, 0.5, True, None)
            checks.append(OpCheck(torch.ops.gradsmith.optimizer_step_.default, (*arguments, *rest)))
        return checks

    def compile_cases(self) -> list[CompileCase]:
        from gradsmith_kernels.ops.optimizer_step import triton_kernels

        return triton_kernels.compile_cases()


SPEC = OptimizerStepSpec()
