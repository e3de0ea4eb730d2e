"""The learning rate of a step, and how many steps there are."""

from __future__ import annotations

import math

from ..data.loader import Loader
from ..recipe import Recipe


def learning_rate(recipe: Recipe, progress: float) -> float:
    """The rate at a share `progress` of the run: a linear rise, then the schedule's fall."""
    peak, schedule = recipe.training.optimizer.lr, recipe.training.schedule
    if progress < schedule.warmup:
        total = recipe.training.steps
        first = 1 / total if total else schedule.warmup / 100  # the first step moves too
        return peak * min(1.0, (progress + first) / schedule.warmup)
    x = (progress - schedule.warmup) / (1 - schedule.warmup)
    fall = {"constant": 0.0, "linear": x, "cosine": 0.5 * (1 - math.cos(math.pi * x))}
    return peak * (1 - (1 - schedule.final) * fall[schedule.name])


def total_steps(recipe: Recipe, loader: Loader) -> int | None:
    """The number of optimizer steps, or None when minutes limit the run."""
    training, rows = recipe.training, len(loader.dataset)
    if training.minutes is not None:
        return None
    if training.steps is not None:
        return training.steps
    if training.epochs is not None:
        return max(1, round(training.epochs * rows / training.global_batch))
    assert training.tokens is not None
    per_step = training.global_batch * float(loader.dataset.lengths.mean())
    return max(1, math.ceil(training.tokens / per_step))
