"""The optimizers' benchmark cases: a whole step of each against what people use today."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.ops.adafactor_step import spec as adafactor_step
from gradsmith_kernels.ops.newton_schulz import spec as newton_schulz
from gradsmith_kernels.ops.optimizer_step import spec as optimizer_step
from gradsmith_kernels.optim.adafactor import Adafactor
from gradsmith_kernels.optim.elementwise import SGD, Adagrad, AdamW, AdamW8bit, Lion
from gradsmith_kernels.optim.muon import Muon
from gradsmith_kernels.verify.spec import BenchCase, Inputs
from gradsmith_kernels.verify.testing import check_parity

Shapes = Sequence[tuple[int, ...]]


def bench_cases() -> list[BenchCase]:
    """What the benchmarks time; see `Spec.bench_cases`."""
    return [*_adafactor(), *_muon(), *_elementwise()]


def optimizer_of(cls: Callable[..., Any], keywords: Mapping[str, Any], inputs: Inputs) -> Any:
    """The optimizer of a benchmark's inputs, made at the first call, which is a warm-up."""
    if "optimizer" not in inputs:
        inputs["optimizer"] = cls(inputs["params"], **keywords)
    return inputs["optimizer"]


def _with_gradients(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Inputs:
    params = [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return {"params": params}


def _our_step(cls: Callable[..., Any], inputs: Inputs, backend: str | None) -> None:
    optimizer_of(cls, {"backend": backend}, inputs).step()


def _peer_step(cls: Callable[..., Any], keywords: Mapping[str, Any], inputs: Inputs) -> None:
    optimizer_of(cls, keywords, inputs).step()


# ---------------------------------------------------------------------------------- elementwise


def _elementwise() -> list[BenchCase]:
    one = [(50 * 2**20,)]
    many = [(4096,)] * 2000
    f32, bf16 = torch.float32, torch.bfloat16
    fused = partial(optimizer_of, torch.optim.AdamW, {"fused": True})
    foreach = partial(optimizer_of, torch.optim.AdamW, {"foreach": True})
    sgd = partial(optimizer_of, torch.optim.SGD, {"fused": True, "momentum": 0.9})
    adagrad = partial(optimizer_of, torch.optim.Adagrad, {"fused": True})
    lion = partial(optimizer_of, PublishedLion, {})
    half_states = {"state_dtype": bf16}
    nearest = {"stochastic_rounding": False}
    # label, shapes, dtype, ours, options, clip and zero too, peers, bytes an element, check
    table: list[tuple[Any, ...]] = []
    for where, shapes in (("one tensor of 50M", one), ("2000 tensors of 4096", many)):
        peers = {"torch fused": fused, "torch foreach": foreach}
        whole = {"torch clip_grad_norm_, fused, zero_grad": fused}
        table += [
            (f"adamw {where} float32", shapes, f32, AdamW, {}, False, peers, 28, "adam"),
            (f"clip + adamw + zero_grad {where} float32", shapes, f32, AdamW, {}, True,
             whole, 36, "adam"),
            (f"adamw {where} bfloat16, bf16 moments", shapes, bf16, AdamW,
             half_states | nearest, False, peers, 14, "adam"),
        ]  # fmt: skip
    table += [
        ("adamw one tensor of 50M bfloat16, bf16 moments, random rounding", one, bf16,
         AdamW, half_states, False, {"torch fused (nearest)": fused}, 14, "adam"),
        ("clip + adamw + zero_grad one tensor of 50M bfloat16, float32 moments and masters",
         one, bf16, AdamW, {"weights": "master"}, True,
         {"torch on float32 copies": partial(optimizer_of, OnMasters, {})}, 32, "adam"),
        ("adamw 8-bit one tensor of 50M float32", one, f32, AdamW8bit, {}, False,
         {"torch fused (float32 moments)": fused}, 16, "adam"),
        ("adamw 8-bit, nearest, one tensor of 50M float32", one, f32, AdamW8bit, nearest,
         False, {"torch fused (float32 moments)": fused}, 16, "adam"),
        ("lion one tensor of 50M float32", one, f32, Lion, {}, False,
         {"published loop": lion}, 20, "lion"),
        ("sgd, momentum, one tensor of 50M float32", one, f32, SGD, {"momentum": 0.9},
         False, {"torch fused": sgd}, 20, "momentum"),
        ("adagrad one tensor of 50M float32", one, f32, Adagrad, {}, False,
         {"torch fused": adagrad}, 20, "adagrad"),
    ]  # fmt: skip
    return [_elementwise_case(*row) for row in table]


def _elementwise_case(
    label: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    cls: Any,
    keywords: dict[str, Any],
    whole: bool,
    peers: dict[str, Callable[..., Any]],
    bytes_each: int,
    rule: str,
) -> BenchCase:
    def ours(inputs: Inputs, backend: str | None) -> None:
        extra = {"max_grad_norm": 1.0, "zero_grads": True} if whole else {}
        optimizer_of(cls, keywords | extra | {"backend": backend}, inputs).step()

    def peer(made: Callable[[Inputs], Any], inputs: Inputs) -> None:
        made_optimizer = made(inputs)
        if whole:
            torch.nn.utils.clip_grad_norm_(inputs["params"], 1.0)
        made_optimizer.step()
        if whole:
            made_optimizer.zero_grad(set_to_none=False)

    elements = sum(math.prod(shape) for shape in shapes)
    small = optimizer_step.sample(f"{str(dtype).removeprefix('torch.')}, warm", rule, dtype)
    return BenchCase(
        label,
        partial(_with_gradients, shapes, dtype),
        ours,
        {name: partial(peer, made) for name, made in peers.items()},
        elements * bytes_each,
        elements * 15,
        partial(check_parity, optimizer_step.SPEC, small, None),
    )


class OnMasters(torch.optim.Optimizer):
    """A float32 optimizer on copies of 16-bit weights, as mixed precision is done by hand: torch's
    fused AdamW, unless a subclass has another one."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.masters = [p.detach().float() for p in self.param_groups[0]["params"]]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        self.inner = self.make(self.masters)

    def make(self, masters: list[Tensor]) -> Any:
        return torch.optim.AdamW(masters, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = self.param_groups[0]["params"]
        for p, master in zip(params, self.masters, strict=True):
            master.grad.copy_(p.grad)
        self.inner.step()
        for p, master in zip(params, self.masters, strict=True):
            p.copy_(master)


class PublishedLion(torch.optim.Optimizer):
    """Lion as its paper's program has it, in torch."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                direction = m.mul(beta1).add(p.grad, alpha=1 - beta1).sign_()
                p.add_(direction, alpha=-group["lr"])
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


# ----------------------------------------------------------------------------------------- Muon


def _muon() -> list[BenchCase]:
    cases = []
    for count, m, n in ((12, 1024, 4096), (12, 1024, 1024)):
        peers = {"published loop": PublishedMuon, "torch.optim.Muon": torch.optim.Muon}
        flops = count * newton_schulz.STEPS * (4 * m * m * n + 2 * m**3)
        small = newton_schulz.sample((256, 256 * n // m), torch.bfloat16)
        cases.append(
            BenchCase(
                f"muon step, {count} matrices {m}x{n} float32",
                partial(_with_gradients, [(m, n)] * count, torch.float32),
                partial(_our_step, Muon),
                {name: partial(_peer_step, cls, {}) for name, cls in peers.items()},
                count * m * n * 20,
                flops,
                partial(check_parity, newton_schulz.SPEC, small, None),
            )
        )
    return cases


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
                update = newton_schulz.published(
                    p.grad.lerp(momentum, group["momentum"]).bfloat16()
                )
                update = update * max(1, p.size(-2) / p.size(-1)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])


# ------------------------------------------------------------------------------------ Adafactor


def _adafactor() -> list[BenchCase]:
    f32, bf16 = torch.float32, torch.bfloat16
    matrices, many = [(1024, 4096)] * 12, [(4096,)] * 2000
    # A parameter that fits the cache is read and written once, g read once; a variance too.
    return [
        _adafactor_case("12 matrices of 1024x4096 float32", matrices, f32, 24),
        _adafactor_case("12 matrices of 1024x4096 bfloat16", matrices, bf16, 12),
        _adafactor_case("2000 tensors of 4096 float32", many, f32, 20),
        _adafactor_case("2000 matrices of 64x64 float32", [(64, 64)] * 2000, f32, 12),
    ]


def _adafactor_case(label: str, shapes: Shapes, dtype: torch.dtype, bytes_each: int) -> BenchCase:
    peers = {"torch foreach": {"foreach": True}, "torch, a tensor at a time": {"foreach": False}}
    check = partial(check_parity, adafactor_step.SPEC, adafactor_step.sample("warm", dtype), None)
    elements = sum(math.prod(shape) for shape in shapes)
    return BenchCase(
        f"adafactor {label}",
        partial(_with_gradients, shapes, dtype),
        partial(_our_step, Adafactor),
        {name: partial(_peer_step, torch.optim.Adafactor, kw) for name, kw in peers.items()},
        elements * bytes_each,
        elements * 12,
        check,
    )
