"""Optimizer steps on the CPU: csrc/optimizer_step."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.common.native import DTYPE_CODES
from gradsmith_kernels.ops.common.tensor_lists import Contiguous, address_of, contiguous
from gradsmith_kernels.ops.optimizer_step.rules import (
    LAMB_APPLY,
    Options,
    Rule,
    seed_of_step,
    trust_ratio,
)
from gradsmith_kernels.ops.optimizer_step.tensors import Tensors

# What a row of the native plan calls an address, and the column of tensors that it is of.
ADDRESSES = {
    "param": "params",
    "state1": "states1",
    "state2": "states2",
    "state3": "states3",
    "absmax1": "absmax1",
    "absmax2": "absmax2",
    "master": "masters",
    "compensation": "compensations",
    "step": "steps",
}


class Plan:
    """Tensors that are stepped together again and again, with what can be prepared once."""

    def __init__(self, rule: Rule, tensors: Tensors) -> None:
        self._rule, self._contiguous = rule, Contiguous(tensors)
        columns = [self._contiguous.column(name) for name in ADDRESSES.values()]
        self._plan = _native.StepPlan(
            [
                _native.StepRow(
                    **dict(zip(ADDRESSES, map(address_of, row), strict=True)),
                    numel=row[0].numel(),
                    param_dtype=DTYPE_CODES[row[0].dtype],
                    state_dtype=DTYPE_CODES[row[1].dtype] if rule.states else 0,
                    stream=stream,
                )
                for *row, stream in zip(*columns, tensors.streams, strict=True)
            ]
        )

    def step(
        self,
        grads: list[Tensor],
        options: Options,
        scale: float,
        zero_grads: bool,
        seed: int | None,
    ) -> None:
        with self._contiguous.step(grads, zero_grads) as used:
            self._plan.set_grads(used)
            self._run(options, scale, zero_grads, seed)

    def _run(self, options: Options, scale: float, zero_grads: bool, seed: int | None) -> None:
        """One sweep; two for Lamb, whose update needs norms of the first one's results."""
        sets = [
            (self._rule.coefficients(options, t), 0 if seed is None else seed_of_step(seed, t))
            for t in self._plan.count()
        ]
        lamb, threads = self._rule.name == "lamb", torch.get_num_threads()
        last = zero_grads and not lamb
        sums = self._plan.run(self._rule.code, sets, False, scale, last, seed is not None, threads)
        if lamb:  # the trust ratios are known now
            scaled = []
            for i, pair in zip(self._plan.places(), sums, strict=True):
                coefficients, of_step = sets[i]
                rate = coefficients[4] * trust_ratio(*pair)
                scaled.append(([*coefficients[:4], rate, *coefficients[5:]], of_step))
            self._plan.run(LAMB_APPLY, scaled, True, scale, zero_grads, False, threads)


def squared_norm(grads: list[Tensor]) -> tuple[float, int]:
    return _native.squared_norm(contiguous(grads), torch.get_num_threads())
