"""training.early_stopping and training.validate.monitor: the best checkpoint, kept and taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import losses

from gradsmith.checks import check_recipe
from gradsmith.errors import UserError
from gradsmith.models.base import find_model
from gradsmith.recipe import Recipe
from gradsmith.run import Run
from gradsmith.training import loop
from gradsmith.training.stopping import Best

Tiny = Callable[..., Recipe]

# A rate at which the validation loss falls for some steps and rises again.
OVERFITS = {
    "training.steps": 400,
    "training.optimizer.lr": 3e-2,
    "training.schedule.name": "constant",
    "training.precision": "fp32",
    "training.validate.every": 4,
    "training.checkpoint": {"every": 1000, "keep": 1},
    "training.early_stopping": {"patience": 3},
    "data.split": {"validation": 0.1, "test": 0.1},
}


def test_the_best_is_the_best_by_more_than_min_delta() -> None:
    best = Best(greater=False, patience=2, min_delta=0.1)
    found = [best.update(value, step) for step, value in enumerate([1.0, 0.95, 0.85, 0.8, 0.8])]
    assert found == [True, False, True, False, False]
    assert (best.value, best.step, best.over) == (0.85, 2, True)
    again = Best(greater=False, patience=3, min_delta=0.1, state=best.state())
    assert not again.over
    assert again.update(0.5, 5)
    best = Best(greater=True)
    assert [best.update(v, 0) for v in (float("nan"), 0.1, 0.2, 0.2)] == [False, True, True, False]
    assert not best.over


def test_a_run_ends_keeps_its_best_and_resumes_to_the_same_end(tiny: Tiny) -> None:
    whole = tiny("whole", **OVERFITS)
    loop.train(whole)
    run = Run(whole.output)
    rows = [row for row in run.read_metrics() if row["kind"] == "validation"]
    values = [row["loss"] for row in rows]
    best = min(rows, key=lambda row: row["loss"])
    assert len(rows) - 1 - values.index(best["loss"]) == 3
    assert rows[-1]["step"] < 400
    # what was kept, and what evaluate, export and fine-tuning take
    kept = [step for step, _ in run.steps()]
    assert kept == [rows[-1]["step"], best["step"]]
    assert find_model(run.folder).step == best["step"]
    assert find_model(run.folder, hashes=False).step == best["step"]

    parts = tiny("parts", **OVERFITS)
    seen: list[int] = []

    def interrupt(row: dict) -> bool:
        seen.append(row["step"])
        return len(seen) == 2

    loop.train(parts, watch=interrupt)
    assert Run(parts.output).steps()[0][0] == seen[-1] == 8
    loop.train(parts)
    assert losses(parts) == losses(whole)
    loop.train(parts)  # it is over: nothing is left to do
    assert losses(parts) == losses(whole)


def test_a_metric_that_the_task_does_not_have_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"monitor: found acuracy.*Did you mean .accuracy"):
        check_recipe(tiny("run", **{"training.validate.monitor": "acuracy"}))
    settings = {"training.early_stopping": {}, "data.split.validation": 0.0}
    with pytest.raises(UserError, match=r"early_stopping: needs data.split.validation above 0"):
        check_recipe(tiny("run", **settings))
