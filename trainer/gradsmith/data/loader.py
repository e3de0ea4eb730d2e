"""Which sequences make up which batch: a pure function of (seed, epoch, global index).

The global index counts sequences from the start of the run. Nothing here depends on the number
of ranks or on what was read before, so the position of a run is one integer, its step.
Letters: B sequences in a micro-batch, S sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .packing import IGNORED, Sequence, Sequences


@dataclass(frozen=True)
class Batch:
    """int64 tensors (B, S); labels are already shifted, -100 does not count."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of an epoch, int64 (n,): n numbers of Philox(seed, epoch), sorted.

    Built on the generator's raw output, which numpy promises to keep from version to version
    (it does not promise that of `Generator.permutation`).
    """
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    return np.argsort(raw, kind="stable")


class Loader:
    """The training batches over `sequences`, epoch after epoch.

    Args:
        sequences: the rows.
        seed: of the order.
        global_batch: sequences in one step, over all ranks and micro-batches.
    """

    def __init__(self, sequences: Sequences, *, seed: int, global_batch: int):
        if len(sequences) == 0:
            raise ValueError("sequences: there are none, so there is nothing to train on")
        self.sequences, self.seed, self.global_batch = sequences, seed, global_batch
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a batch spans two epochs where one rolls over
                del self._orders[min(self._orders)]
            self._orders[epoch] = permutation(self.seed, epoch, len(self.sequences))
        return self._orders[epoch]

    def indices(self, step: int) -> np.ndarray:
        """The rows of a step's global batch, int64 (global_batch,); steps count from 0."""
        first, n = step * self.global_batch, len(self.sequences)
        parts, at = [], first
        while at < first + self.global_batch:
            epoch, inside = divmod(at, n)
            part = self._order(epoch)[inside : inside + first + self.global_batch - at]
            parts.append(part)
            at += len(part)
        return np.concatenate(parts)

    def tokens(self, step: int) -> int:
        """Inputs of the whole global batch that are no padding."""
        return int(self.sequences.row_tokens[self.indices(step)].sum())

    def target_tokens(self, step: int) -> int:
        """Labels that count in the whole global batch: what its loss is divided by."""
        return int(self.sequences.row_targets[self.indices(step)].sum())

    def micro_batches(self, step: int, *, rank: int, world: int, micro_batch: int) -> list[Batch]:
        """This rank's share: its a-th has rows [(a*world + rank) * micro_batch : +micro_batch].

        Raises:
            ValueError: the global batch does not divide over world * micro_batch.
        """
        accumulation, left = divmod(self.global_batch, world * micro_batch)
        if left:
            raise ValueError(
                f"global_batch: {self.global_batch} is no multiple of world {world} * "
                f"micro_batch {micro_batch}"
            )
        mine = self.indices(step).reshape(accumulation, world, micro_batch)[:, rank]
        return [_batch([self.sequences[int(k)] for k in rows]) for rows in mine]


def evaluation_batches(
    sequences: Sequences, *, rank: int, world: int, batch: int, limit: int | None = None
) -> Iterator[Batch]:
    """The first `limit` rows in order; each group of world * batch rows is dealt to the ranks.

    Every rank gets the same number of batches, as collectives inside a model need it. A batch
    may be short; where nothing is left for a rank it gets one row of padding without labels.
    """
    rows = len(sequences) if limit is None else min(limit, len(sequences))
    S = sequences.sequence_length
    empty = Sequence(np.full(S, sequences.pad_id), np.full(S, IGNORED), np.arange(S))
    for group in range(0, rows, world * batch):
        first = group + rank * batch
        found = [sequences[k] for k in range(first, min(first + batch, rows))]
        yield _batch(found or [empty])


def _batch(rows: list[Sequence]) -> Batch:
    arrays = (np.stack([getattr(row, name) for row in rows]) for name in Sequence._fields)
    return Batch(*map(torch.from_numpy, arrays))
