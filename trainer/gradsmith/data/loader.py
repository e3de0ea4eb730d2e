"""Which rows make up which batch: a pure function of (seed, epoch, global index).

The global index counts rows from the start of the run: a row's place in it. Nothing here depends
on the number of ranks or on what was read before, so the position of a run is one integer, its
step. So the next batches can be made while the model works on this one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from .processor import Batch, Dataset

AHEAD = 2  # micro-batches that are begun before they are asked for


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of an epoch, int64 (n,): n numbers of Philox(seed, epoch), sorted.

    Built on the generator's raw output, which numpy promises to keep from version to version
    (it does not promise that of `Generator.permutation`).
    """
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    return np.argsort(raw, kind="stable")


class Loader:
    """The training batches over `dataset`, epoch after epoch.

    Args:
        dataset: the rows.
        seed: of the order.
        global_batch: rows in one step, over all ranks and micro-batches.

    Attributes:
        waited: seconds that `micro_batches` has waited for rows, in all.
    """

    def __init__(self, dataset: Dataset, *, seed: int, global_batch: int):
        if len(dataset) == 0:
            raise ValueError("dataset: there are no rows, so there is nothing to train on")
        self.dataset, self.seed, self.global_batch = dataset, seed, global_batch
        self._orders: dict[int, np.ndarray] = {}
        self.waited = 0.0
        self._maker = ThreadPoolExecutor(1, "loader")
        self._begun: dict[tuple[int, ...], Future[Batch]] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a batch spans two epochs where one rolls over
                del self._orders[min(self._orders)]
            self._orders[epoch] = permutation(self.seed, epoch, len(self.dataset))
        return self._orders[epoch]

    def indices(self, step: int) -> np.ndarray:
        """The rows of a step's global batch, int64 (global_batch,); steps count from 0."""
        first, n = step * self.global_batch, len(self.dataset)
        parts, at = [], first
        while at < first + self.global_batch:
            epoch, inside = divmod(at, n)
            part = self._order(epoch)[inside : inside + first + self.global_batch - at]
            parts.append(part)
            at += len(part)
        return np.concatenate(parts)

    def length(self, step: int) -> int:
        """What the whole global batch costs: its tokens without padding, else its rows."""
        return int(self.dataset.lengths[self.indices(step)].sum())

    def items(self, step: int) -> float:
        """Terms of the whole global batch's loss: what it is divided by."""
        return float(self.dataset.items[self.indices(step)].sum())

    def micro_batches(
        self, step: int, *, rank: int, world: int, micro_batch: int
    ) -> Iterator[Batch]:
        """This rank's share: its a-th has rows [(a*world + rank) * micro_batch : +micro_batch].

        Another thread makes them, and has begun those of the next step when this one's are used up.

        Raises:
            ValueError: the global batch does not divide over world * micro_batch.
        """
        accumulation, left = divmod(self.global_batch, world * micro_batch)
        if left:
            raise ValueError(
                f"global_batch: {self.global_batch} is no multiple of world {world} * "
                f"micro_batch {micro_batch}"
            )
        first, shape = step * accumulation, (accumulation, world, micro_batch)
        return (self._made(first + a, rank, shape) for a in range(accumulation))

    def _made(self, number: int, rank: int, shape: tuple[int, int, int]) -> Batch:
        """A rank's micro-batch, counted from the start of the run; begins those that follow."""
        wanted = [(n, rank, *shape) for n in range(number, number + 1 + AHEAD)]
        self._begun = {key: made for key, made in self._begun.items() if key in wanted}
        for key in wanted:
            if key not in self._begun:
                rows, draws = self._places(key[0], rank, shape)
                self._begun[key] = self._maker.submit(self.dataset.batch, rows, draws)
        began = time.monotonic()
        batch = self._begun.pop(wanted[0]).result()
        self.waited += time.monotonic() - began
        return batch

    def _places(
        self, number: int, rank: int, shape: tuple[int, int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a micro-batch, and their places in the run."""
        step, a = divmod(number, shape[0])
        places = np.arange(self.global_batch, dtype=np.uint64)
        places += np.uint64(step * self.global_batch)
        rows, draws = (whole.reshape(shape)[a, rank] for whole in (self.indices(step), places))
        return rows, draws


def evaluation_batches(
    dataset: Dataset, *, rank: int, world: int, batch: int, limit: int | None = None
) -> Iterator[Batch]:
    """`limit` rows in order; each group of world * batch rows is dealt to the ranks.

    They are spread evenly over the split: its first rows may be of one source, or of one class.
    Every rank gets the same number of batches, as collectives inside a model need it. A batch
    may be short; where nothing is left for a rank it gets one that counts for nothing.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    rows = np.arange(count) * len(dataset) // max(1, count)
    for group in range(0, count, world * batch):
        first = group + rank * batch
        yield dataset.batch(rows[first : first + batch])
