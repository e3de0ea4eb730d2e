"""One optimizer step over many tensors in one sweep; `gradsmith_kernels.optim` makes optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import gradsmith_kernels.ops.optimizer_step.op  # noqa: F401 - registers gradsmith::optimizer_step_
from gradsmith_kernels.ops.optimizer_step.rules import RULES

__all__ = ["optimizer_step_"]


def optimizer_step_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *states: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: Mapping[str, float],
    absmax: Sequence[Sequence[Tensor]] = (),
    masters: Sequence[Tensor] = (),
    compensations: Sequence[Tensor] = (),
    streams: Sequence[int] | None = None,
    scale: float = 1.0,
    zero_grads: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> None:
    """One step of an update rule, in place; the rules' formulas: `optimizer_step/rules.py`.

    Each element's weight, gradient and states are read once and written once. The arithmetic is
    float32; what is stored in 16 bits is rounded to nearest even, or randomly (see `seed`).

    Args:
        rule: adam, amsgrad, lion, sgd, momentum, adagrad, schedule_free, lamb or direction.
        params: float32, bfloat16 or float16, any shape (float64: reference backend, all in it).
        grads: like params in shape and device, not necessarily in dtype.
        states: as many lists as the rule has states, like params in shape and device: float32,
            bfloat16, or uint8 codes of `quantize.py` (lamb: float32; amsgrad: no codes).
        steps: the number of steps that each tensor has behind it, one float32 element on the CPU;
            raised by one. t is the raised number.
        options: the rule's numbers, `RULES[rule].options`; flags as 0 or 1.
        absmax: for uint8 states, a list for each state: float32 scales, one for 256 elements.
        masters: float32 weights behind 16-bit params: stepped instead of the params, which get
            their rounded values.
        compensations: instead of masters, bfloat16: what rounding took from the 16-bit params.
            It is added before the next step (Kahan), so 2 bytes do the work of a master's 4.
        streams: numbers below 2^32 that tell the tensors' random bits apart; default 0, 1, ...
        scale: the gradients are multiplied by it first; a negative one maximizes.
        zero_grads: set the gradients to zero in passing.
        seed: round states that are not float32 randomly, so that small changes are not lost: a
            function of the seed, the step, the stream and the index. None: to nearest.
        backend: reference, cpu or triton; None chooses by device.

    Raises:
        ValueError: an unknown rule; options, numbers of tensors, shapes or devices that do not fit.
        TypeError: a dtype is not one of the above.
        BackendError: the backend cannot run here.
    """
    if rule not in RULES:
        raise ValueError(f"optimizer_step_: {rule!r} is not one of {', '.join(RULES)}")
    names = RULES[rule].options
    if set(options) != set(names):
        raise ValueError(f"optimizer_step_: {rule} takes {sorted(names)}; got {sorted(options)}")
    if len(states) != RULES[rule].states:
        raise ValueError(
            f"optimizer_step_: {rule} has {RULES[rule].states} states; got {len(states)}"
        )
    empty: Sequence[Tensor] = []
    torch.ops.gradsmith.optimizer_step_.default(
        rule,
        params,
        grads,
        *(states[i] if i < len(states) else empty for i in (0, 1, 2)),
        *(absmax[i] if i < len(absmax) else empty for i in (0, 1)),
        masters,
        compensations,
        steps,
        list(range(len(params))) if streams is None else streams,
        [float(options[name]) for name in names],
        scale,
        zero_grads,
        seed,
        backend,
    )
