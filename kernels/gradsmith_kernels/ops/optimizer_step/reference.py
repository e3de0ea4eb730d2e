"""Optimizer steps in plain PyTorch: the definition. In float32, or in float64 for float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsmith_kernels.ops.optimizer_step import quantize
from gradsmith_kernels.ops.optimizer_step.rules import Options, Rule, seed_of_step, trust_ratio
from gradsmith_kernels.ops.optimizer_step.tensors import Tensors


class Plan:
    def __init__(self, rule: Rule, tensors: Tensors) -> None:
        self._rule, self._tensors = rule, tensors

    def step(
        self,
        grads: Sequence[Tensor],
        options: Options,
        scale: float,
        zero_grads: bool,
        seed: int | None,
    ) -> None:
        for i, grad in enumerate(grads):
            self._step_one(i, grad, options, scale, seed)
            if zero_grads:
                grad.zero_()

    def _step_one(
        self, i: int, grad: Tensor, options: Options, scale: float, seed: int | None
    ) -> None:
        """Steps params[i] and its states in place, and raises its count of steps."""
        columns = self._tensors
        p = columns.params[i]
        compute = torch.promote_types(p.dtype, torch.float32)
        t = columns.steps[i].add_(1).item()
        weight = columns.masters[i] if columns.masters else p
        x = weight.to(compute, copy=True)
        if columns.compensations:
            x += columns.compensations[i]
        scales = [column[i] for column in (columns.absmax1, columns.absmax2) if column]
        stored = columns.states_of(i)
        states = [
            quantize.decode(s, scales[k], signed=k == 0)
            if s.dtype == torch.uint8
            else s.to(compute, copy=True)
            for k, s in enumerate(stored)
        ]
        x = update(self._rule.name, options, t, x, grad.to(compute) * scale, states)
        if columns.masters:
            columns.masters[i].copy_(x)
        p.copy_(x)
        if columns.compensations:
            columns.compensations[i].copy_(x - p)
        for k, (s, new) in enumerate(zip(stored, states, strict=True)):
            random = None
            if seed is not None and k < 2 and s.dtype in (torch.uint8, torch.bfloat16):
                bits = random_bits(seed_of_step(seed, t), columns.streams[i], p)
                random = (bits >> 16) if k else bits & 0xFFFF
            if s.dtype == torch.uint8:
                draws = (
                    None if random is None else 1 - (random + 0.5).float().reshape(-1) * 2.0**-16
                )
                codes, absmax = quantize.encode(new, k == 0, draws)
                s.copy_(codes)
                scales[k].copy_(absmax)
            elif random is not None:
                raised = (new.view(torch.int32) + random.int()) & -65536
                s.copy_(torch.where(new.isfinite(), raised.view(torch.float32), new))
            else:
                s.copy_(new)


def update(rule: str, o: Options, t: float, x: Tensor, g: Tensor, states: list[Tensor]) -> Tensor:
    """The new x; x and the states are changed in place. Formulas: rules.py."""
    if rule == "direction":
        (m,) = states
        m.lerp_(g, 1 - o["momentum"])
        of_m = o["momentum"] if o["nesterov"] else 1.0
        return x.copy_(g.mul(1 - of_m).add_(m, alpha=of_m))
    lr, decay = o["lr"], o["weight_decay"]
    if rule in ("schedule_free", "lamb"):
        first, v = states
        v.mul_(o["beta2"]).addcmul_(g, g, value=1 - o["beta2"])
        denominator = v.sqrt() / math.sqrt(1 - o["beta2"] ** t) + o["eps"]
        if rule == "lamb":
            first.lerp_(g, 1 - o["beta1"])
            d = (first / (1 - o["beta1"] ** t) / denominator).add_(x, alpha=decay)
            squares = (float((vector.double() ** 2).sum()) for vector in (x, d))
            return x.sub_(d, alpha=lr * trust_ratio(*squares))
        d = (g / denominator).add_(x, alpha=decay)
        x.lerp_(first, o["average"]).sub_(d, alpha=lr * (1 - o["beta1"] * (1 - o["average"])))
        first.sub_(d, alpha=lr)
        return shrink(x, lr * o["l1"])
    if not o["decoupled"]:
        g = g.add(x, alpha=decay)
    else:
        x.sub_(x, alpha=lr * decay)
    if rule in ("adam", "amsgrad"):
        m, v, *most = states
        m.lerp_(g, 1 - o["beta1"])
        v.mul_(o["beta2"]).addcmul_(g, g, value=1 - o["beta2"])
        for s in most:
            v = torch.maximum(s, v, out=s)
        denominator = v.sqrt() / math.sqrt(1 - o["beta2"] ** t) + o["eps"]
        x.addcdiv_(m, denominator, value=-lr / (1 - o["beta1"] ** t))
    elif rule == "lion":
        (m,) = states
        x.sub_(m.lerp(g, 1 - o["beta1"]).sign_(), alpha=lr)
        m.lerp_(g, 1 - o["beta2"])
    elif rule == "sgd":
        x.sub_(g, alpha=lr)
    elif rule == "momentum":
        (m,) = states
        m.mul_(o["momentum"]).add_(g, alpha=1.0 if t == 1 else 1 - o["dampening"])
        x.sub_(g.add(m, alpha=o["momentum"]) if o["nesterov"] else m, alpha=lr)
    elif rule == "adagrad":
        (s,) = states
        s.addcmul_(g, g)
        x.addcdiv_(g, s.sqrt() + o["eps"], value=-lr / (1 + (t - 1) * o["lr_decay"]))
    return shrink(x, lr * o["l1"])


def shrink(x: Tensor, threshold: float) -> Tensor:
    """Every element moved towards 0 by the threshold, where it stops."""
    return x.sign() * (x.abs() - threshold).clamp(min=0) if threshold else x


def random_bits(seed: int, stream: int, like: Tensor) -> Tensor:
    """32 random bits for each element, in int64: a function of seed, stream and index alone."""
    key = (seed ^ (stream * 0x9E3779B9 & 0xFFFFFFFF)) * 0x85EBCA6B & 0xFFFFFFFF
    index = torch.arange(like.numel(), device=like.device)
    high = key + (index >> 32) * 0x9E3779B9
    x = (index & 0xFFFFFFFF) ^ (high & 0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return (x ^ (x >> 16)).view(like.shape)


def squared_norm(grads: Sequence[Tensor]) -> tuple[float, int]:
    sums = [float((g.double() ** 2).sum()) for g in grads]
    bad = next((i for i, value in enumerate(sums) if not math.isfinite(value)), -1)
    return sum(sums), bad
