"""The tensors that one call steps together, and what may be in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsmith_kernels.ops.common.tensor_lists import Columns, check_step
from gradsmith_kernels.ops.optimizer_step.rules import Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_BLOCK = 256  # elements that share a scale of an 8-bit state


@dataclass(frozen=True)
class Tensors(Columns):
    """Columns with an entry for each of params, or empty where the rule or the caller has none.

    states1, states2: the rule's states: float32, bfloat16, or uint8 codes (signed and unsigned).
    states3: likewise, never of 8 bits.
    absmax1, absmax2: float32 scales of 8-bit states, one for each 256 elements.
    masters: float32 weights behind 16-bit params.
    compensations: bfloat16, what rounding took from 16-bit params.
    steps: steps done, one float32 element on the CPU each.
    streams: which random bits each parameter draws; any numbers below 2^32.
    """

    states1: Sequence[Tensor]
    states2: Sequence[Tensor]
    states3: Sequence[Tensor]
    absmax1: Sequence[Tensor]
    absmax2: Sequence[Tensor]
    masters: Sequence[Tensor]
    compensations: Sequence[Tensor]
    steps: Sequence[Tensor]
    streams: Sequence[int]

    def states_of(self, i: int) -> list[Tensor]:
        """The states of params[i]."""
        return [c[i] for c in (self.states1, self.states2, self.states3) if c]


def check(rule: Rule, tensors: Tensors, grads: Sequence[Tensor]) -> None:
    """
    Raises:
        ValueError: numbers of tensors, shapes or devices do not fit.
        TypeError: a dtype is not one that the rule takes.
    """
    count = len(tensors.params)
    wanted = {"grads": count, "steps": count, "streams": count}
    wanted |= {f"states{i}": count if rule.states >= i else 0 for i in (1, 2, 3)}
    lengths = {"grads": len(grads)} | {
        name: len(getattr(tensors, name)) for name in wanted if name != "grads"
    }
    if lengths != wanted:
        raise ValueError(f"optimizer_step_: {rule.name} needs {wanted} tensors; got {lengths}")
    quantized = any(s.dtype == torch.uint8 for s in tensors.states1)
    for name in ("absmax1", "absmax2", "masters", "compensations"):
        allowed = {0, count}
        if name.startswith("absmax") and quantized and rule.states >= int(name[-1]):
            allowed = {count}
        if len(getattr(tensors, name)) not in allowed:
            raise ValueError(
                f"optimizer_step_: {name} has {len(getattr(tensors, name))} tensors for {count} "
                f"params; allowed are {sorted(allowed)}"
            )
    if tensors.masters and tensors.compensations:
        raise ValueError("optimizer_step_: give masters or compensations, not both")
    for i, (p, g) in enumerate(zip(tensors.params, grads, strict=True)):
        _check_one(rule, tensors, i, p, g)


def _check_one(rule: Rule, tensors: Tensors, i: int, p: Tensor, g: Tensor) -> None:
    """Raises TypeError or ValueError for what does not fit about params[i] and its gradient."""
    float64 = p.dtype == torch.float64
    allowed = (torch.float64,) if float64 else DTYPES
    state_dtypes: tuple[torch.dtype, ...]
    state_dtypes = (torch.float64,) if float64 else (torch.float32, torch.bfloat16, torch.uint8)
    if rule.name == "lamb":
        state_dtypes = state_dtypes[:1]
    if rule.name == "amsgrad":
        state_dtypes = state_dtypes[:2]
    what = f"optimizer_step_: params[{i}]"
    if p.dtype not in allowed or g.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(
            f"{what} is {p.dtype} and its gradient {g.dtype}; "
            f"both must be {names} (and float64 does not mix with the others)"
        )
    check_step(what, tensors.steps[i])
    states = tensors.states_of(i)
    for s in states:
        if s.dtype not in state_dtypes or s.dtype != states[0].dtype:
            names = ", ".join(str(dtype) for dtype in state_dtypes)
            raise TypeError(
                f"{what}: its states are {[str(s.dtype) for s in states]}; allowed for "
                f"{rule.name} is one of {names} for all of them"
            )
    exact = {"masters": torch.float32, "compensations": torch.bfloat16}
    extra = {name: getattr(tensors, name)[i] for name in exact if getattr(tensors, name)}
    for name, tensor in extra.items():
        if tensor.dtype != exact[name] or p.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"{what}: {name} are {exact[name]} beside 16-bit params; they are {tensor.dtype} "
                f"and {p.dtype}"
            )
    for tensor in (g, *states, *extra.values()):
        if tensor.shape != p.shape:
            raise ValueError(
                f"{what} is {tuple(p.shape)} and one of its tensors {tuple(tensor.shape)}; "
                "the shapes must be equal"
            )
        if not tensor.device == p.device == tensors.params[0].device:
            raise ValueError(
                f"{what} or one of its tensors is on {tensor.device}; all must be on "
                f"{tensors.params[0].device}, like params[0]"
            )
    if states and states[0].dtype == torch.uint8:
        blocks = -(-p.numel() // STATE_BLOCK)
        for scale in [column[i] for column in (tensors.absmax1, tensors.absmax2) if column]:
            if scale.dtype != torch.float32 or scale.numel() != blocks or scale.device != p.device:
                raise ValueError(
                    f"{what}: the scales of its 8-bit states are {scale.numel()} of "
                    f"{scale.dtype} on {scale.device}; they must be {blocks} of torch.float32, "
                    f"one for each {STATE_BLOCK} elements, on {p.device}"
                )
