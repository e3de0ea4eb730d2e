"""Adafactor on the CPU: csrc/adafactor_step."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.adafactor_step.tensors import Options, Tensors, matrices_of
from gradsmith_kernels.ops.common.native import DTYPE_CODES
from gradsmith_kernels.ops.common.tensor_lists import Contiguous, address_of


class Plan:
    """Tensors that are stepped together again and again, with what can be prepared once."""

    def __init__(self, tensors: Tensors) -> None:
        self._contiguous = Contiguous(tensors)
        names = ("params", "row_vars", "col_vars", "masters", "compensations", "steps")
        self._plan = _native.AdafactorPlan(
            [
                _native.FactorRow(
                    param=address_of(p),
                    row_var=address_of(row_var),
                    col_var=address_of(col_var) if p.ndim >= 2 else 0,
                    master=address_of(master),
                    compensation=address_of(compensation),
                    step=address_of(step),
                    **dict(zip(("matrices", "rows", "cols"), matrices_of(p.shape), strict=True)),
                    param_dtype=DTYPE_CODES[p.dtype],
                )
                for p, row_var, col_var, master, compensation, step in zip(
                    *map(self._contiguous.column, names), strict=True
                )
            ]
        )

    def step(self, grads: list[Tensor], options: Options, scale: float, zero_grads: bool) -> None:
        with self._contiguous.step(grads, zero_grads) as used:
            self._plan.set_grads(used)
            self._plan.run(
                [options.coefficients(t) for t in self._plan.count()],
                scale,
                zero_grads,
                torch.get_num_threads(),
            )
