"""`gradsmith evaluate`: a run's model on held-out data, beside its base and beside baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blocks import BASE, OURS, Result
from ..console import quiet
from ..errors import UserError
from ..files import read_json, write_json
from ..run import Run

if TYPE_CHECKING:
    from ..data.prepared import PreparedData
    from ..models.base import Model
    from ..recipe import Recipe
    from ..tasks.task import Task


def evaluate(run: Run | str | Path, *, split: str = "test") -> dict[str, Any]:
    """Measures a run's newest checkpoint on a held-out split and writes evaluation.json.

    Returns:
        task: what the run learns.
        split: its name.
        step: of the checkpoint.
        sums: of the model over the split, which add over splits, folds and machines.
        metrics: of the model, by name.
        definitions: of the metrics that are shown, as `blocks.Metric`; the headline first.
        results: the model, its base if it is fine-tuned, and baselines, as `blocks.Result`.
        blocks: figures, see `blocks`.
        lead, note: a sentence that sums it up, and how to read the results.

    Raises:
        UserError: no such run, a split that is not held out or is empty, nothing trained yet; or
            the data is not what the model was trained on, or damaged.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    with run.lock("results"), quiet(run.logs / "evaluate.log"):
        result = _evaluate(run, split)
        write_json(run.evaluation_path, result)
    return result


def _evaluate(run: Run, split: str) -> dict[str, Any]:
    from ..data.prepared import PreparedData
    from ..models.base import open_model
    from ..tasks import task_class

    recipe = run.recipe()
    prepared = PreparedData.open(run.data)
    prepared.held_out_path(split)  # before the model: a wrong split is said at once
    with open_model(run.folder) as found:
        assert found.checkpoint is not None
        if read_json(found.checkpoint / "state.json")["data"] != prepared.fingerprint:
            raise UserError(
                f"{run.data}: is not the data that {found.checkpoint} was trained on, so nothing "
                "in it is held out; train again with --fresh, or prepare the old data again"
            )
        prepared.verify(*task_class(recipe.data.task).examined(recipe, split))
        return _results(run, recipe, prepared, split, found)


def _results(
    run: Run, recipe: Recipe, data: PreparedData, split: str, found: Model
) -> dict[str, Any]:
    from ..models.build import load_model, open_task
    from ..tasks.task import Subject
    from .measure import measure, reference

    task = open_task(recipe, found)
    model = load_model(found, task)
    base = _base(model, run, recipe, task)
    dataset = task.processor.dataset(data.split(split))
    subjects = [(OURS, model)] + ([(BASE, base)] if base is not None else [])
    batch = recipe.training.micro_batch
    if task.needs_reference:
        dataset.reference = reference(task, base, dataset, batch=batch)
    sums = [measure(task, subject, dataset, batch=batch) for _, subject in subjects]
    measured: Sequence[Result] = [
        {
            "name": name,
            "values": task.summarize(total),
            "ours": name == OURS,
            "note": "before fine-tuning" if name == BASE else "",
        }
        for (name, _), total in zip(subjects, sums, strict=True)
    ]
    examined = task.examine(Subject(model, base, data, split, measured, sums[0]))
    return {
        "task": data.task,
        "split": split,
        "step": found.step,
        "sums": sums[0].tolist(),
        "metrics": examined.results[0]["values"],
        "definitions": [asdict(metric) for metric in examined.definitions or task.metrics],
        "results": examined.results,
        "blocks": examined.blocks,
        "lead": examined.lead,
        "note": examined.note,
    }


class WithoutAdapter:
    """A model with its adapter switched off while it is called: what it was fine-tuned from."""

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        with self._model.disable_adapter():
            return self._model(*args, **inputs)

    def generate(self, **settings: Any) -> Any:
        with self._model.disable_adapter():
            return self._model.generate(**settings)


def _base(model: Any, run: Run, recipe: Recipe, task: Task) -> Any:
    """What a fine-tuned model started from; None for one trained from nothing."""
    from ..models.base import base_of, check_base, is_base
    from ..models.build import load_model

    if recipe.model.from_ is None:
        return None
    if recipe.model.adapter is not None:
        return WithoutAdapter(model)
    if is_base(run.base):
        check_base(run.base)
    return load_model(base_of(run, recipe), task)
