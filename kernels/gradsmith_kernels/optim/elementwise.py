"""The optimizers whose step takes each weight by itself, on the operator optimizer_step_."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradsmith_kernels.ops.optimizer_step.quantize import dynamic_map
from gradsmith_kernels.optim.base import OF_TORCH, FusedOptimizer, check_ranges


def _common(group: Mapping[str, Any]) -> dict[str, float]:
    return {
        "lr": float(group["lr"]),
        "weight_decay": float(group["weight_decay"]),
        "decoupled": float(group["decoupled"]),
        "l1": float(group["l1"]),
    }


def _betas(group: Mapping[str, Any]) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    return {"beta1": float(beta1), "beta2": float(beta2)}


class AdamW(FusedOptimizer):
    """AdamW: Adam with decoupled weight decay.

    Stands in for `torch.optim.AdamW`: the same arguments and defaults, parameter groups, closures,
    and state dicts that load into torch's and back (`step`, `exp_avg`, `exp_avg_sq`).

    Args:
        params: parameters or parameter groups: dense, float32, bfloat16 or float16.
        lr: learning rate, a float or a one-element tensor; >= 0.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the denominator; >= 0.
        weight_decay: decay, multiplied by lr; >= 0.
        amsgrad: divide by the root of the largest second moment so far (12 bytes of state a weight
            instead of 8).
        maximize: step along the gradient.
        decoupled: decay the weights themselves; False adds weight_decay * x to the gradient.
        l1: proximal L1 penalty, multiplied by lr; >= 0.
        options: see `FusedOptimizer`; torch's foreach, fused, capturable=False and
            differentiable=False are taken and change nothing.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: there is no such argument.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    of_torch: ClassVar[Mapping[str, tuple[Any, ...]]] = {**OF_TORCH, "capturable": (False,)}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled: bool = True,
        l1: float = 0.0,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"amsgrad": amsgrad, "maximize": maximize, "decoupled": decoupled, "l1": l1}
        super().__init__(params, defaults, **options)

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "amsgrad" if group["amsgrad"] else "adam"

    def _options(self, group: Mapping[str, Any]) -> dict[str, float]:
        return _common(group) | _betas(group) | {"eps": group["eps"]}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        check_ranges(name, group, ("lr", "eps", "weight_decay", "l1"), ())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its counterpart in torch."""
        groups = [
            # torch's Adam and AdamW are one class, told apart by this flag.
            {"decoupled": group["decoupled_weight_decay"]} | group
            if "decoupled_weight_decay" in group
            else group
            for group in state_dict["param_groups"]
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})


class Adam(AdamW):
    """Adam, for `torch.optim.Adam`: AdamW whose weight_decay is 0 and not decoupled by default."""

    of_torch: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **AdamW.of_torch,
        "decoupled_weight_decay": (False,),  # ours is `decoupled`
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, decoupled=decoupled, **options
        )


class AdamW8bit(AdamW):
    """AdamW with moments of 8 bits: 2 bytes of state for a weight instead of 8.

    The moments are codes of the dynamic map with a float32 scale for each 256 elements
    (`optimizer_step/quantize.py`), rounded randomly by default, or to nearest as bitsandbytes does.
    State dicts load into `bitsandbytes.optim.AdamW8bit` and back.

    Args:
        min_8bit_size: parameters with fewer elements keep float32 moments.
        stochastic_rounding: False rounds to nearest.
        others: as in `AdamW`; there is no state_dtype and no amsgrad.
    """

    state_names = ("state1", "state2")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        self.min_8bit_size = min_8bit_size
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, state_dtype=torch.uint8, **options
        )

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        check_ranges("AdamW8bit", group, (), ("amsgrad",))

    def _needs_whole(self, p: Tensor, group: Mapping[str, Any]) -> str:
        if self._state_dtype(p) != torch.uint8:
            return ""
        return "a scale of its 8-bit states belongs to 256 elements of the whole"

    @staticmethod
    def _state_dtypes() -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def _state_dtype(self, p: Tensor) -> torch.dtype:
        if p.dtype == torch.float64:
            return torch.float64
        return torch.float32 if p.numel() < self.min_8bit_size else torch.uint8

    def state_dict(self) -> dict[str, Any]:
        """The state dict as bitsandbytes' AdamW8bit has it: with the maps, and steps as ints."""
        state_dict = super().state_dict()
        states = {}
        for i, state in state_dict["state"].items():
            states[i] = {**state, "step": int(state["step"])}
            if state["state1"].dtype == torch.uint8:
                device = state["state1"].device
                states[i] |= {
                    "qmap1": dynamic_map(True).to(device, copy=True),
                    "qmap2": dynamic_map(False).to(device, copy=True),
                }
        return {**state_dict, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of bitsandbytes' AdamW8bit.

        Raises:
            ValueError: its 8-bit map is another one, or 8-bit states meet float32 ones.
        """
        nested = "__bnb_optimizer_quant_state__"
        states = {
            i: {k: v for k, v in state.items() if k != nested} | state.get(nested, {})
            for i, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})

    def _adopt(self, p: Tensor, state: dict[str, Any], saved: Mapping[str, Any]) -> None:
        if saved["state1"].dtype != state["state1"].dtype:
            raise ValueError(
                f"{type(self).__name__}: the states of a parameter of shape {tuple(p.shape)} are "
                f"{saved['state1'].dtype} in the state dict and {state['state1'].dtype} here; "
                "min_8bit_size must be the same"
            )
        for key, signed in (("qmap1", True), ("qmap2", False)):
            if key in saved and not torch.allclose(
                saved[key].float().cpu(), dynamic_map(signed), rtol=1e-5, atol=0
            ):
                raise ValueError(f"{type(self).__name__}: {key} is not the dynamic 8-bit map")
        super()._adopt(p, state, saved)


class Lion(FusedOptimizer):
    """Lion, the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675).

    Args:
        lr: learning rate; a third to a tenth of AdamW's.
        betas: of the interpolation whose sign is taken, and of the momentum.
        weight_decay: decay, multiplied by lr; three to ten times AdamW's.
        others: as in `AdamW`.
    """

    state_names = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        l1: float = 0.0,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"decoupled": decoupled, "l1": l1}, **options)

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "lion"

    def _options(self, group: Mapping[str, Any]) -> dict[str, float]:
        return _common(group) | _betas(group)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_ranges("Lion", group, ("lr", "weight_decay", "l1"), ("maximize",))


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum, for `torch.optim.SGD`.

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        decoupled: decay the weights themselves; False (as torch) adds to the gradient.
        l1: proximal L1 penalty, multiplied by lr.
        options: see `FusedOptimizer`.

    A group's momentum is either 0 or not for good: it decides whether there is a buffer.
    """

    state_names = ("momentum_buffer",)
    of_torch = OF_TORCH

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decoupled: bool = False,
        l1: float = 0.0,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
        super().__init__(params, defaults | {"decoupled": decoupled, "l1": l1}, **options)

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "momentum" if group["momentum"] else "sgd"

    def _options(self, group: Mapping[str, Any]) -> dict[str, float]:
        if not group["momentum"]:
            return _common(group)
        names = ("momentum", "dampening", "nesterov")
        return _common(group) | {name: float(group[name]) for name in names}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_ranges("SGD", group, ("lr", "momentum", "weight_decay", "l1"), ())
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("SGD: nesterov needs momentum > 0 and dampening 0")


class Adagrad(FusedOptimizer):
    """Adagrad, for `torch.optim.Adagrad` (states `step`, `sum`).

    Args:
        lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as in torch.
        decoupled, l1, options: as in `SGD`.
    """

    state_names = ("sum",)
    of_torch = OF_TORCH

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        decoupled: bool = False,
        l1: float = 0.0,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        defaults |= {"initial_accumulator_value": initial_accumulator_value, "maximize": maximize}
        super().__init__(params, defaults | {"decoupled": decoupled, "l1": l1}, **options)

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "adagrad"

    def _options(self, group: Mapping[str, Any]) -> dict[str, float]:
        return _common(group) | {"lr_decay": group["lr_decay"], "eps": group["eps"]}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        ranges = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "l1")
        check_ranges("Adagrad", group, ranges, ())

    def _init_state(self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        super()._init_state(p, state, group)
        state["sum"].fill_(group["initial_accumulator_value"])


class LAMB(FusedOptimizer):
    """LAMB: Adam's direction, scaled for each tensor to its weights' norm, for large batches
    (You et al. 2020, arXiv:1904.00962). States are float32.

    Args:
        lr, betas, eps: as in `AdamW`.
        weight_decay: added to the direction before its norm is taken.
        options: see `FusedOptimizer`; `state_dtype` is float32 here.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    @staticmethod
    def _state_dtypes() -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "lamb"

    def _needs_whole(self, p: Tensor, group: Mapping[str, Any]) -> str:
        return "a step needs the norms of the whole"

    def _options(self, group: Mapping[str, Any]) -> dict[str, float]:
        own = {name: float(group[name]) for name in ("lr", "weight_decay", "eps")}
        return own | _betas(group)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_ranges("LAMB", group, ("lr", "eps", "weight_decay"), ())


class ScheduleFreeAdamW(FusedOptimizer):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): needs no learning-rate schedule.

    The parameters hold y, where gradients are taken; the average x, to be evaluated and saved, is
    put in their place by `eval()`, and y again by `train()`. `step` refuses to run in between.

    Args:
        lr, betas, eps: as in `AdamW`; lr about three times as high.
        weight_decay: decay at y, multiplied by lr.
        warmup_steps: the rate rises linearly over so many steps.
        r: later steps weigh as t^r in the average.
        weight_lr_power: and as the largest rate so far to this power.
        l1, options: as in `AdamW`.
    """

    state_names = ("z", "exp_avg_sq")
    counted = ("k", "lr_max", "weight_sum", "train_mode")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        l1: float = 0.0,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "l1": l1}
        defaults |= {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        # k: steps done; train_mode: whether the parameters hold y.
        defaults |= {"k": 0, "lr_max": 0.0, "weight_sum": 0.0, "train_mode": True}
        super().__init__(params, defaults, **options)

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "schedule_free"

    def _rate(self, group: Mapping[str, Any]) -> float:
        warmup = group["warmup_steps"]
        share = min(1.0, (group["k"] + 1) / warmup) if warmup else 1.0
        return float(group["lr"]) * share

    def _weight(self, group: Mapping[str, Any]) -> float:
        largest = max(group["lr_max"], self._rate(group))
        return float((group["k"] + 1) ** group["r"] * largest ** group["weight_lr_power"])

    def _options(self, group: Mapping[str, Any]) -> dict[str, float]:
        if not group["train_mode"]:
            raise RuntimeError(
                "ScheduleFreeAdamW: the parameters hold the average (eval mode); call train() first"
            )
        weight = self._weight(group)
        total = group["weight_sum"] + weight
        own = {"average": weight / total if total else 0.0, "lr": self._rate(group)}
        names = ("weight_decay", "l1", "eps")
        return own | {name: float(group[name]) for name in names} | _betas(group)

    def _after_step(self) -> None:
        for group in self.param_groups:
            group["weight_sum"] += self._weight(group)
            group["lr_max"] = max(group["lr_max"], self._rate(group))
            group["k"] += 1

    def _check_group(self, group: Mapping[str, Any]) -> None:
        ranges = ("lr", "eps", "weight_decay", "l1", "warmup_steps", "r", "weight_lr_power")
        check_ranges("ScheduleFreeAdamW", group, ranges, ())
        if not 0 < group["betas"][0] < 1:
            raise ValueError("ScheduleFreeAdamW: betas[0] must be in (0, 1)")

    def _init_state(self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        super()._init_state(p, state, group)
        state["z"].copy_(state.get("master", p))

    def train(self) -> None:
        """Puts y, where gradients are taken, into the parameters."""
        self._move(True, lambda beta1: 1 - beta1)

    def eval(self) -> None:
        """Puts the average x into the parameters."""
        self._move(False, lambda beta1: 1 - 1 / beta1)

    @torch.no_grad()
    def _move(self, train: bool, share: Any) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                group["train_mode"] = train
                for p in group["params"]:
                    if p in self.state:
                        _lerp(p, self.state[p], share(group["betas"][0]))


def _lerp(p: Tensor, state: dict[str, Any], share: float) -> None:
    """Moves a weight by a share of its distance from z, with what stands behind it."""
    weight = state.get("master", p)
    x = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    if "compensation" in state:
        x += state["compensation"]
    x.lerp_(state["z"].to(x.dtype), share)
    weight.copy_(x)
    p.copy_(x)
    if "compensation" in state:
        state["compensation"].copy_(x - p)
