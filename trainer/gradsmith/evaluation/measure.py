"""One pass over a dataset: the sums of a task's metrics, and what its loss compares with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .. import ranks
from ..data.loader import evaluation_batches
from ..data.processor import Batch, Dataset
from ..tasks.task import Task


@torch.no_grad()
def measure(
    task: Task, model: Any, dataset: Dataset, *, batch: int, limit: int | None = None
) -> torch.Tensor:
    """The sums of a task's metrics, over all ranks of a launch.

    Args:
        task: whose sums.
        model: a model or an engine around one. It is in evaluation mode meanwhile.
        dataset: the rows.
        batch: rows in a forward pass; no effect on the result but rounding.
        limit: measure so many rows only, spread evenly.

    Returns:
        float64 (M,) on the CPU; `task.summarize` reads it.
    """

    def passing(sums: Any) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for rows in _batches(model, dataset, batch, limit):
            total = total + sums(task.outputs(model, rows), rows)
        return ranks.add(total)

    with _evaluating(model):
        if task.needs_statistics:
            task.shared = passing(task.statistics)
        return passing(task.metric_sums)


@torch.no_grad()
def reference(task: Task, model: Any, dataset: Dataset, *, batch: int) -> np.ndarray:
    """What a model says of all rows, for a loss that compares with it; over all ranks.

    Returns:
        float32 (rows, ...).
    """
    rank, world = ranks.rank(), ranks.world()
    total: torch.Tensor | None = None
    with _evaluating(model):
        for number, rows in enumerate(_batches(model, dataset, batch, None)):
            found = task.reference(task.outputs(model, rows)).float().cpu()
            if total is None:
                total = torch.zeros(len(dataset), *found.shape[1:])
            first = (number * world + rank) * batch
            if first < len(dataset):
                total[first : first + len(found)] = found
    assert total is not None
    return ranks.add(total).numpy()


def _batches(model: Any, dataset: Dataset, batch: int, limit: int | None) -> Iterator[Batch]:
    parameter = next(model.parameters())
    rank, world = ranks.rank(), ranks.world()
    for rows in evaluation_batches(dataset, rank=rank, world=world, batch=batch, limit=limit):
        yield rows.to(parameter.device, parameter.dtype)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
