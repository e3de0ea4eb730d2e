"""Columns of tensors that one call steps together, for kernels that take contiguous ones only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The base of what an op steps: subclasses add columns, which have an entry for each of params
    or are empty.

    params: the weights.
    """

    params: Sequence[Tensor]

    def column(self, name: str) -> Sequence[Tensor | None]:
        """A column with None for each entry where it is empty."""
        values: Sequence[Tensor] = getattr(self, name)
        return values or [None] * len(self.params)

    def written(self) -> Iterator[Tensor]:
        """Every tensor that a step changes, but the step counts."""
        for field in fields(self):
            if field.name not in ("steps", "streams"):
                yield from getattr(self, field.name)


class Contiguous:
    """Columns with a copy in place of each tensor that is not contiguous."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._copies = [(t, t.contiguous()) for t in columns.written() if not t.is_contiguous()]
        self._copy_of = {id(original): copy for original, copy in self._copies}

    def column(self, name: str) -> list[Tensor | None]:
        """A column with None for each entry where it is empty."""
        return [self._copy_of.get(id(tensor), tensor) for tensor in self._columns.column(name)]

    @contextmanager
    def step(self, grads: list[Tensor], zero_grads: bool) -> Iterator[list[Tensor]]:
        """Gives a step contiguous gradients; copies are filled before it and written back after.

        Args:
            grads: the gradients.
            zero_grads: the step sets the gradients it is given to zero; so then are `grads`.
        """
        for original, copy in self._copies:
            copy.copy_(original)
        used = contiguous(grads)
        yield used
        for original, copy in self._copies:
            original.copy_(copy)
        if zero_grads and used is not grads:
            for grad, copy in zip(grads, used, strict=True):
                if grad is not copy:
                    grad.zero_()


def contiguous(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, copied where they are not contiguous; the same list if all are."""
    from gradsmith_kernels import _native  # not above: `backends` says why it may be missing

    if _native.all_contiguous(tensors):
        return tensors
    return [tensor.contiguous() for tensor in tensors]


def check_step(what: str, t: Any) -> None:
    """
    Raises:
        TypeError: a count of steps is not what a step can raise by one.
    """
    if not (isinstance(t, Tensor) and t.dtype == torch.float32 and t.numel() == 1 and t.is_cpu):
        found = f"{t.dtype} {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)
        raise TypeError(f"{what}: its step is {found}; it must be one float32 element on the CPU")


def address_of(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
