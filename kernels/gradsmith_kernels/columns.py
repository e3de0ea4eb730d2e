"""Columns of tensors that one call steps together, for kernels that take contiguous ones only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

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
    def step(self, grads: Sequence[Tensor], zero_grads: bool) -> Iterator[Sequence[Tensor]]:
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


def contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, copied where they are not contiguous; the same sequence if all are."""
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [tensor.contiguous() for tensor in tensors]


def address_of(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
