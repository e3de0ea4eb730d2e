"""Adafactor on the CPU: csrc/adafactor_step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.adafactor_step.tensors import Options, Tensors, matrices_of
from gradsmith_kernels.native import DTYPE_CODES


class Plan:
    """Tensors that are stepped together again and again, with what can be prepared once."""

    def __init__(self, tensors: Tensors) -> None:
        self._copies = [(t, t.contiguous()) for t in tensors.written() if not t.is_contiguous()]
        copies = {id(original): copy for original, copy in self._copies}

        def address(tensor: Tensor | None) -> int:
            return 0 if tensor is None else copies.get(id(tensor), tensor).data_ptr()

        names = ("row_vars", "col_vars", "masters", "compensations", "steps")
        self._plan = _native.AdafactorPlan(
            [
                (
                    address(p),
                    address(row_var),
                    address(col_var) if p.ndim >= 2 else 0,
                    address(master),
                    address(compensation),
                    address(step),
                    *matrices_of(p.shape),
                    DTYPE_CODES[p.dtype],
                )
                for p, row_var, col_var, master, compensation, step in zip(
                    tensors.params, *map(tensors.column, names), strict=True
                )
            ]
        )

    def step(
        self, grads: Sequence[Tensor], options: Options, scale: float, zero_grads: bool
    ) -> None:
        for original, copy in self._copies:
            copy.copy_(original)
        used = [g.contiguous() for g in grads]
        self._plan.set_grads([g.data_ptr() for g in used])
        self._plan.set_grad_dtypes([DTYPE_CODES[g.dtype] for g in used])
        self._plan.run(
            [options.coefficients(t) for t in self._plan.count()],
            scale,
            zero_grads,
            torch.get_num_threads(),
        )
        for original, copy in self._copies:
            original.copy_(copy)
        if zero_grads:
            for g, copy in zip(grads, used, strict=True):
                if g is not copy:
                    g.zero_()
