"""Optimizers on gradsmith's kernels, with the names, groups and state dicts of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradsmith_kernels.adamw import adamw_

__all__ = ["AdamW"]

# Options of torch.optim.AdamW that change the algorithm: a state dict with one of them set is
# another optimizer's.
_UNSUPPORTED = ("amsgrad", "maximize")


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; formula, dtypes and source: `gradsmith_kernels.adamw`.

    Stands in for `torch.optim.AdamW`: the same arguments and defaults, parameter groups, closures,
    and state dicts that load into torch's AdamW and back (`step`, `exp_avg`, `exp_avg_sq`). The
    moments are always float32, for bfloat16 parameters too (float64 for float64 parameters).

    Args:
        params: parameters or parameter groups: dense, float32 or bfloat16.
        lr: learning rate, a float or a one-element tensor; >= 0.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the denominator; >= 0.
        weight_decay: decoupled decay, multiplied by lr; >= 0.
        backend: reference, cpu or triton; None chooses by the parameters' device.

    Raises:
        ValueError: an argument is outside its range, or a loaded state dict sets amsgrad/maximize.
        TypeError: a parameter or gradient is sparse, complex or of another dtype.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        backend: str | None = None,
    ) -> None:
        self._backend = backend
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. Parameters without a gradient are left as they are.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self._state(p) for p in params]
            beta1, beta2 = group["betas"]
            adamw_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                backend=self._backend,
            )
        return loss

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            _check_parameter(p)
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch.optim.AdamW."""
        super().load_state_dict(state_dict)
        # torch has cast each moment to its parameter's dtype. For bfloat16 parameters that loses
        # what float32 moments are kept for, so take those again from the dict itself.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if p.dtype == torch.bfloat16 and i in state_dict["state"]:
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = state_dict["state"][i][key]
                    self.state[p][key] = moment.to(p.device, torch.float32, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            _check_group(group)


def _check_group(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for name, value, fits, allowed in (
        ("lr", group["lr"], float(group["lr"]) >= 0, "a number >= 0"),
        ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1)"),
        ("eps", group["eps"], group["eps"] >= 0, "a number >= 0"),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, "a number >= 0"),
    ):
        if not fits:
            raise ValueError(f"AdamW: {name} is {value}; it must be {allowed}")
    for name in _UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"AdamW: {name}=True is not supported")


def _check_parameter(p: Tensor) -> None:
    assert p.grad is not None
    for name, tensor in (("parameter", p), ("gradient", p.grad)):
        if tensor.layout != torch.strided or tensor.is_complex():
            kind = "complex" if tensor.is_complex() else str(tensor.layout)
            raise TypeError(
                f"AdamW: a {name} of shape {tuple(p.shape)} is {kind}; it must be dense"
            )
