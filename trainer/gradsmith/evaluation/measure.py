"""One pass over a dataset: the sums of a task's metrics."""

from __future__ import annotations

from typing import Any

import torch

from ..data.loader import evaluation_batches
from ..data.processor import Dataset
from ..tasks.task import Task


@torch.no_grad()
def measure(
    task: Task,
    model: Any,
    dataset: Dataset,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    limit: int | None = None,
) -> torch.Tensor:
    """This rank's part of the sums; those of all ranks add.

    Args:
        task: whose sums.
        model: a model or an engine around one. It is in evaluation mode meanwhile.
        dataset: the rows.
        batch: rows in a forward pass; no effect on the result but rounding.
        limit: measure the first `limit` rows only.

    Returns:
        float64 (M,) on the CPU; `task.summarize` reads it.
    """
    parameter = next(model.parameters())
    total, was_training = torch.zeros((), dtype=torch.float64), model.training
    model.eval()
    try:
        for rows in evaluation_batches(dataset, rank=rank, world=world, batch=batch, limit=limit):
            rows = rows.to(parameter.device, parameter.dtype)
            total = total + task.metric_sums(task.outputs(model, rows), rows)
    finally:
        model.train(was_training)
    return total
