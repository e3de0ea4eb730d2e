"""Rows of a table -> numbers, categories and a target.

Everything is learned of the training split, column by column, and kept as JSON; `prepare`,
evaluation and serving encode with the same code. Letters: B rows of a batch, k of a chunk, n
numeric features, m categories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..errors import UserError
from ..files import write_json
from ..reading import read_json
from ..recipe import TableData, TableRecipe
from ..shapes import TableSettings
from . import excel, sql
from .ahead import ahead
from .columns import Column, Columns
from .example import Dropped, Example, Ledger
from .labelled import class_weights
from .processor import Batch, Processor, Row
from .table_cells import from_rows
from .table_fit import Chunks, Target, broken, fit_column, parsed, reading_of
from .table_kinds import Kind, infer
from .table_matrix import (
    SAMPLE,
    STAGES,
    Chained,
    Components,
    Nearest,
    Numbers,
    Products,
    Selection,
    Stage,
    isolation_forest,
    select,
)
from .table_spool import Chunk, TableSpool, digest
from .table_steps import STEPS, Category, Features, Step, Text, dump

FOREST = "an outlier by the isolation forest"


class TableSplit(Columns):
    """`numbers`, `categories`, `target`, `weight`: those that the table has."""

    target: np.ndarray


class TableProcessor(Processor):
    """See the module.

    Args:
        settings: processor.json, see `gradsmith.shapes.TableSettings`.
        recipe: what the user asks for.

    Attributes:
        problem: classification or regression.
        labels, classes: the target's values in the training split, sorted, with their counts.
        target_mean, target_scale: a number as the target is stored as (target - mean) / scale.
        numbers: the numeric features.
        categories: the others, with how many values each has; 0 is unknown or missing.
        feature_names: numbers, then categories.
    """

    noun = "rows"
    split_class = TableSplit
    columns: Mapping[str, Column]

    def __init__(self, settings: dict[str, Any], recipe: TableRecipe):
        self.settings, self.recipe = settings, recipe
        self.problem: str = settings["problem"]
        self.classes: dict[str, int] = settings["classes"]
        self.labels = list(self.classes)
        self.target_mean: float = settings["target_mean"]
        self.target_scale: float = settings["target_scale"]
        self.kinds = {name: Kind(**kind) for name, kind in settings["kinds"].items()}
        self.steps: dict[str, Step] = {
            stored["name"]: STEPS[self.kinds[stored["name"]].name].read(stored)
            for stored in settings["steps"]
        }
        self.stages: list[Stage] = []
        for stage in settings["stages"]:
            fields = {key: value for key, value in stage.items() if key != "name"}
            self.stages.append(STAGES[stage["name"]](**fields))
        self.outliers: Callable[[Numbers], np.ndarray] | None = None  # while it is prepared
        self.numbers: list[str] = settings["numbers"]
        self.categories: dict[str, int] = settings["categories"]
        self.feature_names = [*self.numbers, *self.categories]
        self.reader = reading_of(recipe.data)
        asked = getattr(recipe.objective, "class_weights", None)
        if self.problem == "classification":
            self.weights = class_weights(self.classes, asked)
        self.columns = self._columns()

    def _columns(self) -> dict[str, Column]:
        n, m = len(self.numbers), len(self.categories)
        columns = {"numbers": Column("<f4", (n,))} if n else {}
        columns |= {"categories": Column("<i4", (m,))} if m else {}
        columns["target"] = Column("<i8" if self.problem == "classification" else "<f4")
        if self.recipe.data.weight is not None:
            columns["weight"] = Column("<f4")
        return columns

    @classmethod
    def check_source(cls, source: Any, where: str) -> None:
        if source.kind == "excel":
            excel.check(where)
        elif source.kind == "sql":
            sql.check(source, where)

    @classmethod
    def spool(cls) -> type[TableSpool]:
        return TableSpool

    # ------------------------------------------------------------------------------- learning

    @classmethod
    def fit(
        cls,
        recipe: Any,
        examples: Chunks,
        ledger: Ledger,
        log: Callable[[str], None],
    ) -> Self:
        data: TableData = recipe.data
        reader = reading_of(data)
        first = next(iter(examples()))
        roles = {data.target, data.group, data.time, data.weight}
        roles |= set(data.columns.drop)  # which clean.keys may name
        names = [name for name in first.names if name not in roles]
        target = Target.fit(data, examples, reader)
        log(target.in_words())
        stated = data.columns.stated()

        def kind_of(name: str) -> Kind:
            if name in stated:
                return Kind(stated[name], "as the recipe says")
            return infer((chunk.column(name) for chunk in examples()), reader, f'column "{name}"')

        def step_of(name: str) -> Step:
            return fit_column(name, kinds[name], examples, reader, target, data)

        kinds = dict(zip(names, ahead(kind_of, names), strict=True))
        for name, kind in kinds.items():
            log(f"{name}: {kind.name} ({kind.why})")
        steps = list(ahead(step_of, [name for name in names if kinds[name].name in STEPS]))
        processor = cls(
            {
                "problem": target.problem, "classes": target.classes,
                "target_mean": target.mean, "target_scale": target.scale,
                "kinds": {name: {"name": k.name, "why": k.why} for name, k in kinds.items()},
                "steps": [dump(step) for step in steps],
                "stages": [], "numbers": [], "categories": {},
            },
            recipe,
        )  # fmt: skip
        processor._fit_stages(examples, target, log)
        found = cls(processor.settings, recipe)
        found.outliers = processor.outliers
        if not found.feature_names:
            raise UserError("data.columns: no feature is left to learn from")
        return found

    def _fit_stages(self, examples: Chunks, target: Target, log: Callable[[str], None]) -> None:
        """What is learned of several features at once; fills in `settings`."""
        data: TableData = self.recipe.data
        settings, how = self.settings, data.features

        def numbers() -> Iterator[Numbers]:
            return (found.numbers for found in self._kept(examples))

        def add(stage: Stage) -> None:
            self.stages.append(stage)
            name = next(name for name, kind in STAGES.items() if type(stage) is kind)
            settings["stages"].append({"name": name, **vars(stage)})

        first = next(self._kept(examples))
        categories = list(first.categories)
        if first.numbers:
            if data.clean.missing == "knn":
                add(Nearest.fit(numbers))
            elif data.clean.missing == "iterative":
                add(Chained.fit(numbers))
            if how.interactions:
                add(Products.fit(numbers, how.interactions, how.scale))
            if data.clean.outliers and data.clean.outliers.method == "isolation_forest":
                self.outliers = isolation_forest(numbers)
        if how.select is not None:
            codes, aim = self._sample(examples, target)
            selection, categories = select(numbers, codes, aim, target.problem, how.select)
            add(selection)
            shown = sorted(selection.scores.items(), key=lambda pair: -pair[1])[:10]
            log(f"{how.select.by}: " + ", ".join(f"{name} {score:.3g}" for name, score in shown))
        if how.pca is not None:
            add(components := Components.fit(numbers, how.pca))
            log(f"pca: {sum(components.variance):.1%} of the variance in {how.pca} components")
        settings["numbers"] = list(next(self._kept(examples)).numbers)
        settings["categories"] = {
            name: len(step.values) + 1
            for name, step in self.steps.items()
            if isinstance(step, Category) and name in categories
        }

    def _kept(self, examples: Chunks) -> Iterator[Features]:
        """The features of the training rows that are kept."""
        for chunk in examples():
            found = self._features(chunk)
            if found.drop:
                kept = ~np.logical_or.reduce(list(found.drop.values()))
                for columns in (found.numbers, found.categories):
                    columns.update({name: values[kept] for name, values in columns.items()})
                found.rows = np.flatnonzero(kept)
            yield found

    def _sample(self, examples: Chunks, target: Target) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The categories and the targets of the first kept rows."""
        codes: list[dict[str, np.ndarray]] = []
        aims, start, rows = [], 0, 0
        for chunk, found in zip(examples(), self._kept(examples), strict=True):
            kept = np.arange(len(chunk)) if found.rows is None else found.rows
            codes.append(found.categories)
            aims.append(target.values[start + kept])
            start, rows = start + len(chunk), rows + len(kept)
            if rows >= SAMPLE:
                break
        aim = np.concatenate(aims)[:SAMPLE]
        whole = {name: np.concatenate([c[name] for c in codes])[:SAMPLE] for name in codes[0]}
        several = aim.shape[1] > 1
        return whole, aim.argmax(axis=1) if several else aim[:, 0]

    # ------------------------------------------------------------------------------- encoding

    def _features(self, chunk: Chunk) -> Features:
        """A chunk's features, and which rows go no further."""
        into = Features()
        for name, step in self.steps.items():
            kind, cells = self.kinds[name], chunk.column(name)
            if isinstance(step, Category):
                step.apply(self.reader.categories(cells), chunk.hashes, into, chunk.training)
            elif isinstance(step, Text):
                step.apply(self.reader.categories(cells), into)
            else:
                values, bad = parsed(cells, kind, self.reader)
                broken(chunk, name, kind, bad, self.recipe.data.on_error, into)
                step.apply(values, into, chunk.training)
        for stage in self.stages:
            if isinstance(stage, Selection | Components):
                self._judge(chunk, into)
            into.numbers = stage.apply(into.numbers)
        self._judge(chunk, into)
        return into

    def _judge(self, chunk: Chunk, into: Features) -> None:
        """By the isolation forest, once, of the training split alone."""
        if chunk.training and self.outliers is not None and FOREST not in into.drop:
            into.drop[FOREST] = self.outliers(into.numbers)

    def encode_chunk(
        self, chunk: Chunk, ledger: Ledger
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The rows of a chunk as columns, each (kept, ...), and which they are, int64 (kept,)."""
        columns, found = self._encoded(chunk)
        kept = self._account(found, len(chunk), ledger)
        if not kept.all():
            columns = {name: values[kept] for name, values in columns.items()}
        return columns, np.flatnonzero(kept)

    def _account(self, found: Features, rows: int, ledger: Ledger) -> np.ndarray:
        """Counts what became of a chunk's rows; which are kept, bool (rows,)."""
        ledger.add("encode", "in", rows)
        kept = np.ones(rows, bool)
        for why, lost in found.drop.items():
            count = int((kept & lost).sum())
            if count:
                ledger.add("encode", "dropped", count, reason=why)
            kept &= ~lost
        for what, count in found.notes.items():
            ledger.add("encode", "changed", count, reason=what)
        ledger.add("encode", "kept", int(kept.sum()))
        return kept

    def _encoded(self, chunk: Chunk) -> tuple[dict[str, np.ndarray], Features]:
        """All rows of a chunk as columns, and which of them go no further."""
        found = self._features(chunk)
        rows = len(chunk)
        columns: dict[str, np.ndarray] = {}
        if self.numbers:
            matrix = np.empty((rows, len(self.numbers)), np.float32)
            for place, name in enumerate(self.numbers):
                matrix[:, place] = found.numbers[name]
            columns["numbers"] = matrix
        if self.categories:
            columns["categories"] = np.stack(
                [found.categories[name] for name in self.categories], axis=1
            )
        self._target(chunk, columns, found)
        return columns, found

    def _target(self, chunk: Chunk, columns: dict[str, np.ndarray], found: Features) -> None:
        """Adds the target and the weight, where the rows have them: a request has neither."""
        data = self.recipe.data
        if data.target in chunk.names:
            cells = self.reader.categories(chunk.column(data.target))
            if self.problem == "classification":
                index = pc.index_in(cells, pa.array(self.labels, pa.string()))
                codes = index.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
                found.lose("the training split has no row of its class", codes < 0)
                columns["target"] = codes
            else:
                values, bad = self.reader.numbers(chunk.column(data.target))
                broken(chunk, data.target, Kind("number", ""), bad, data.on_error, found)
                found.lose("no target", np.isnan(values))
                columns["target"] = ((values - self.target_mean) / self.target_scale).astype("f4")
        if data.weight is not None and data.weight in chunk.names:
            values, bad = self.reader.numbers(chunk.column(data.weight))
            bad |= np.isnan(values) | (values < 0)
            broken(chunk, data.weight, Kind("weight from 0", ""), bad, data.on_error, found)
            columns["weight"] = values.astype(np.float32)

    def encode(self, examples: Sequence[Example], ledger: Ledger) -> list[Row | Dropped]:
        """
        Raises:
            UserError: an example lacks a column, or a cell is of another type.
        """
        rows: list[Row | Dropped] = []
        for example in examples:
            for name in self.steps:
                if name not in example.fields:
                    raise UserError(f'{example.source}: no column "{name}"')
            names = list(example.fields)
            batch = from_rows([example.fields], names)
            hashes = digest(batch, list(self.steps))
            none = np.zeros(1, np.int64)
            chunk = Chunk(example.source, batch, none, none, hashes, training=False)
            columns, found = self._encoded(chunk)
            if self._account(found, 1, ledger)[0]:
                rows.append({name: values[0] for name, values in columns.items()})
            else:
                why = next(why for why, lost in found.drop.items() if lost[0])
                rows.append(Dropped("encode", why))
        return rows

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "problem": self.problem,
            "numbers": self.numbers,
            "categories": self.categories,
        }
        if self.problem == "classification":
            found["classes"] = self.classes
        else:
            found |= {"target_mean": self.target_mean, "target_scale": self.target_scale}
        return {**super().describe(), **found}

    # -------------------------------------------------------------------------------- batches

    def dataset(self, split: TableSplit, *, augment: bool = False) -> TableRows:
        return TableRows(self, split)

    def dummy_inputs(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        numbers = torch.randn(rows, len(self.numbers), generator=generator)
        codes = [
            torch.randint(count, (rows,), generator=generator) for count in self.categories.values()
        ]
        none = torch.zeros(rows, 0, dtype=torch.int64)
        return {"numbers": numbers, "categories": torch.stack(codes, 1) if codes else none}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "processor.json", self.settings)

    @classmethod
    def from_pretrained(cls, folder: Path, recipe: Any) -> Self:
        return cls(read_json(folder / "processor.json", TableSettings), recipe)


class TableRows:
    """The rows of a split."""

    reference: np.ndarray | None = None

    def __init__(self, processor: TableProcessor, split: TableSplit):
        self.processor, self.split = processor, split
        self.lengths = np.ones(len(split), np.int64)
        weights = np.ones(len(split), np.float32)
        if processor.problem == "classification" and len(split):
            weights = processor.weights[split.target].astype(np.float32)
        if "weight" in processor.columns:
            weights = weights * split.weight  # type: ignore[attr-defined]
        self.items = weights

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, rows: Sequence[int] | np.ndarray, draws: np.ndarray | None = None) -> Batch:
        """inputs numbers, float32 (B, n), and categories, int64 (B, m); labels target, int64 or
        float32 (B,), and weight, float32 (B,)."""
        which = np.asarray(rows, np.int64)
        inputs = {}
        for name, dtype in (("numbers", np.float32), ("categories", np.int64)):
            count = len(getattr(self.processor, name))
            values = np.zeros((max(1, len(which)), count), dtype)
            if count and len(which):
                values[:] = getattr(self.split, name)[which]
            inputs[name] = torch.from_numpy(values)
        target = self.split.target[which] if len(which) else np.zeros(1, self.split.target.dtype)
        weight = self.items[which] if len(which) else np.zeros(1, np.float32)
        labels = {"target": torch.from_numpy(target), "weight": torch.from_numpy(weight)}
        return Batch(inputs, labels)
