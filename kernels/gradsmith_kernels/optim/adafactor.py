"""Adafactor on gradsmith's kernels, with the names, groups and state dicts of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradsmith_kernels.ops.adafactor_step.op import OP
from gradsmith_kernels.ops.adafactor_step.tensors import Options, Tensors, check, factor_shapes
from gradsmith_kernels.optim.base import OF_TORCH, FusedOptimizer, check_ranges, column


class Adafactor(FusedOptimizer):
    """Adafactor: the second moment of a matrix from the means of its rows and columns (Shazeer and
    Stern 2018, arXiv:1804.04235). Formulas: `gradsmith_kernels.ops.adafactor_step.adafactor_step_`.

    The gradients are passed over three times, small tensors within a core's cache. Stands in for
    `torch.optim.Adafactor`: the same arguments and defaults, parameter groups, and
    state dicts that load into torch's and back (`step`, `row_var` and `col_var`, or `variance` for
    fewer than two dimensions). The states are float32; so is the arithmetic, whatever the
    parameters' dtype, hence also the eps[0] of None: 2^-23, where torch takes 2^-7 for bfloat16.

    Args:
        params: parameters or parameter groups: dense, float32, bfloat16 or float16.
        lr: largest relative step size, and the rate of the decay and of l1; >= 0.
        beta2_decay: exponent of the step in the share of the new squares; <= 0.
        eps: least root of the second moment (None: see above), least size of a tensor's weights
            in its step size; each >= 0.
        d: the root mean square of a tensor's update is at most this; >= 1.
        weight_decay: decoupled decay, multiplied by lr; >= 0.
        l1: proximal L1 penalty, multiplied by lr; >= 0.
        maximize: step along the gradient.
        options: see `FusedOptimizer`; `state_dtype` is float32 here.

    Raises:
        ValueError: an argument is outside its range.
    """

    of_torch: ClassVar[Mapping[str, tuple[Any, ...]]] = {"foreach": OF_TORCH["foreach"]}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        l1: float = 0.0,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d}
        defaults |= {"weight_decay": weight_decay, "l1": l1, "maximize": maximize}
        super().__init__(params, defaults, **options)

    @staticmethod
    def _state_dtypes() -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_ranges("Adafactor", group, ("lr", "weight_decay", "l1"), ())
        if not group["beta2_decay"] <= 0:
            raise ValueError(
                f"Adafactor: beta2_decay is {group['beta2_decay']}; it must be a number <= 0"
            )
        eps1, eps2 = group["eps"]
        if not ((eps1 is None or eps1 >= 0) and eps2 >= 0):
            raise ValueError(
                f"Adafactor: eps is {group['eps']}; it must be two numbers >= 0, the first or None"
            )
        if not group["d"] >= 1:
            raise ValueError(f"Adafactor: d is {group['d']}; it must be a number >= 1")

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "adafactor"

    def _needs_whole(self, p: Tensor, group: Mapping[str, Any]) -> str:
        return "a step needs the means of its rows and columns"

    def _init_moments(self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        names = ("row_var", "col_var") if p.ndim >= 2 else ("variance",)
        for name, shape in zip(names, factor_shapes(p.shape), strict=False):
            state[name] = torch.zeros(shape, dtype=self._state_dtype(p), device=p.device)

    def _prepare(
        self,
        group: Mapping[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        streams: list[int],
    ) -> tuple[Callable[[Sequence[Tensor]], None], Callable[[], Any]]:
        none = params[0].new_empty(0, dtype=self._state_dtype(params[0]))
        tensors = Tensors(
            params,
            [state["row_var" if "row_var" in state else "variance"] for state in states],
            [state.get("col_var", none) for state in states],
            *(column(states, name) for name in ("master", "compensation", "step")),
        )
        module = OP.choose(self._backend, params[0].device, params[0].dtype)
        return partial(check, tensors), lambda: module.Plan(tensors)

    def _advance(
        self, plan: Any, grads: list[Tensor], group: Mapping[str, Any], scale: float
    ) -> None:
        eps1, eps2 = group["eps"]
        names = ("lr", "beta2_decay", "d", "weight_decay", "l1")
        options = Options(eps1=eps1, eps2=eps2, **{name: float(group[name]) for name in names})
        plan.step(grads, options, scale, self.zero_grads)
