"""Rows of a table: a class or a number, as the data's target is.

What the data decide is known once they are prepared: `Table` is what can be said before, and makes
itself one of the two below. Letters: B rows of a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch

from ..blocks import Examination, Result
from ..data.prepared import PreparedData
from ..data.processor import Batch, Dataset
from ..errors import UserError
from .baselines import ROWS, Rows, fit_baselines, permutation_importance
from .classification import Classification
from .regression import Regression
from .task import Subject, Task

LOOKED_AT = 100_000  # rows that the bins of numbers are made of


class Table(Task):
    """Inputs numbers, float (B, N), and categories, int64 (B, M), which are indices."""

    unit = "rows"
    metrics = tuple({m.name: m for m in (*Classification.metrics, *Regression.metrics)}.values())
    auto_class = "gradsmith.models.tabular:AutoModelForTable"
    architectures = "gradsmith.models.tabular:ARCHITECTURES"

    processor: Any
    edges: list[list[float]] | None = None

    @classmethod
    def of(cls, recipe: Any, processor: Any) -> Task:
        classify = processor.problem == "classification"
        objective = recipe.objective
        unfit = ("loss", "delta", "quantiles") if classify else ("class_weights", "label_smoothing")
        for key in unfit:
            if getattr(objective, key):
                raise UserError(
                    f"objective.{key}: does not go with the target, {recipe.data.target}, which "
                    f"is learned by {processor.problem}; leave it out, or set data.problem"
                )
        return (TableClassification if classify else TableRegression)(recipe, processor)

    def config(self) -> dict[str, Any]:
        return {
            "numbers": len(self.processor.numbers),
            "cardinalities": list(self.processor.categories.values()),
            "edges": self.edges or [],
            **self.head(),
        }

    def check_data(self, data: PreparedData, dataset: Dataset) -> None:
        """Also cuts the numbers into the bins that the model's config asks for."""
        super().check_data(data, dataset)
        bins = (self.recipe.model.config or {}).get("bins", 0)
        if bins:
            numbers = Rows.of(dataset, LOOKED_AT).numbers.astype(np.float64)
            ends = np.quantile(numbers, np.linspace(0, 1, bins + 1), axis=0)
            self.edges = [np.unique(column).tolist() for column in ends.T]

    def check_model(self, model: Any) -> None:
        found = (model.config.numbers, list(model.config.cardinalities))
        wanted = (len(self.processor.numbers), list(self.processor.categories.values()))
        if found != wanted:
            raise UserError(
                f"model.from: its model reads {_told(*found)}; the data have {_told(*wanted)}"
            )

    def examine(self, subject: Subject) -> Examination:
        examined = super().examine(subject)
        train = self.processor.dataset(subject.data.split("train"))
        held_out = self.processor.dataset(subject.data.split(subject.split))
        examined.results += self._baselines(train, held_out, examined)
        device = next(subject.model.parameters()).device

        def measure(batch: Batch) -> dict[str, float]:
            moved = batch.to(device, subject.model.dtype)
            return self.summarize(self.metric_sums(self.outputs(subject.model, moved), moved))

        names = (list(self.processor.numbers), list(self.processor.categories))
        metric = examined.definitions[0]
        examined.blocks.append(permutation_importance(measure, held_out, names, metric))
        return examined

    @classmethod
    def examined(cls, recipe: Any, split: str) -> tuple[str, ...]:
        return (split, "train")

    def _baselines(self, train: Dataset, held_out: Dataset, examined: Examination) -> list[Result]:
        """On the same features; a note says where scikit-learn is missing."""
        rows, classify = Rows.of(train, ROWS), isinstance(self, Classification)
        fitted = fit_baselines(rows, list(self.processor.categories.values()), classify)
        if fitted is None:
            examined.note += " More baselines need: pip install 'gradsmith[table]'."
            return []
        asked = Rows.of(held_out)
        if len(train) > len(rows.target):
            examined.note += f" Baselines are fitted on {len(rows.target):,} rows of them."
        return [
            {"name": name, "values": self.judge(answer(asked), asked), "note": "scikit-learn"}
            for name, answer in fitted.items()
        ]

    @abstractmethod
    def judge(self, answers: np.ndarray, rows: Rows) -> dict[str, float]:
        """The metrics of a baseline's answers."""

    def rows_in_words(self, rows: int) -> str:
        numbers, categories = len(self.processor.numbers), len(self.processor.categories)
        return f"{rows:,} rows of {_told(numbers, [0] * categories)}"


def _told(numbers: int, cardinalities: list[int]) -> str:
    sizes = f" of {cardinalities} values" if any(cardinalities) else ""
    return f"{numbers} numbers and {len(cardinalities)} categories{sizes}"


class TableClassification(Table, Classification):
    """Which class a row has."""

    metrics = Classification.metrics

    def judge(self, answers: np.ndarray, rows: Rows) -> dict[str, float]:
        target = torch.from_numpy(rows.target)
        return self.sums.summarize(self.sums.sums(torch.from_numpy(answers), target))


class TableRegression(Table, Regression):
    """A row's number."""

    metrics = Regression.metrics

    def examine(self, subject: Subject) -> Examination:
        examined = super().examine(subject)
        held_out = Rows.of(self.processor.dataset(subject.data.split(subject.split)))
        mean: Result = {
            "name": "mean",
            "values": self.judge(np.zeros((len(held_out.target), 1)), held_out),
            "note": "reads nothing",
        }
        examined.results.insert(len(subject.measured), mean)
        return examined

    def judge(self, answers: np.ndarray, rows: Rows) -> dict[str, float]:
        point = type(self.sums)((), self.mean, self.scale)
        found, target = map(self.in_its_unit, map(torch.from_numpy, (answers, rows.target)))
        return point.summarize(point.sums(found, target))
