"""What a table's columns learn of the training split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, one_line
from .table_kinds import FEW, Kind, Parsed, Reading, amounts, infer
from .table_spool import Chunk
from .table_steps import (
    FOLDS,
    SMOOTHING,
    Category,
    Date,
    Features,
    Number,
    Scaler,
    Step,
    Text,
    fold_of,
)

Chunks = Callable[[], Iterable[Chunk]]


def reading_of(data: Any) -> Reading:
    """How the recipe's `data` says that text is read."""
    clean, columns = data.clean, data.columns
    return Reading(
        list(clean.missing_values),
        columns.thousands,
        columns.decimal,
        clean.case == "lower",
        clean.blanks == "trim",
    )


def parsed(cells: pa.Array, kind: Kind, reader: Reading) -> Parsed:
    """Cells of a column of numbers, dates or true/false as numbers."""
    parse = {"boolean": reader.booleans, "date": reader.dates}.get(kind.name, reader.numbers)
    return parse(cells)


def broken(
    chunk: Chunk, name: str, kind: Kind, bad: np.ndarray, on_error: str, into: Features | None
) -> None:
    """What becomes of cells of another type than their column.

    Raises:
        UserError: the recipe says to stop at the first of them.
    """
    if not bad.any():
        return
    row = int(np.flatnonzero(bad)[0])
    if on_error == "stop":
        value = one_line(chunk.column(name)[row].as_py(), 60)
        raise UserError(
            f'{chunk.place(row)}: "{name}" is a column of {kind.name}s; found "{value}". Say what '
            "it is in data.columns, or data.on_error: skip to drop such rows"
        )
    if into is not None:
        into.lose(f"{name}: no {kind.name}", bad)


def values_of(name: str, kind: Kind, chunks: Chunks, reader: Reading, on_error: str) -> np.ndarray:
    """A whole column of the training split, float64 (rows,)."""
    found = []
    for chunk in chunks():
        values, bad = parsed(chunk.column(name), kind, reader)
        broken(chunk, name, kind, bad, on_error, None)
        found.append(np.where(bad, np.nan, values) if bad.any() else values)
    return np.concatenate(found)


# ------------------------------------------------------------------------------------- target


@dataclass
class Target:
    """What there is to predict.

    Attributes:
        problem: classification or regression.
        classes: the values of the training split, with their counts.
        mean, scale: of a number.
        values: of the training rows: float64 (rows, columns), what target encoding averages.
    """

    problem: str
    classes: dict[str, int] = field(default_factory=dict)
    mean: float = 0.0
    scale: float = 1.0
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 1)))
    names: list[str] = field(default_factory=list)

    @classmethod
    def fit(cls, data: Any, chunks: Chunks, reader: Reading) -> Target:
        """
        Raises:
            UserError: there is one class only, or a number that never changes.
        """
        name = data.target
        problem = data.problem or _problem(name, chunks, reader)
        if problem == "regression":
            values = values_of(name, Kind("number", ""), chunks, reader, data.on_error)
            known = values[~np.isnan(values)]
            if len(known) == 0 or known.min() == known.max():
                raise UserError(
                    f'data.target: "{name}" is one number in the whole training split: nothing to '
                    "learn"
                )
            scaler = Scaler.fit(known, "zscore")
            values = np.nan_to_num(scaler.apply(values))
            return cls(problem, {}, scaler.shift, scaler.scale, values[:, None], ["mean"])
        parts = [reader.categories(chunk.column(name)) for chunk in chunks()]
        whole = pa.chunked_array(parts, pa.string())
        counts = {v["values"]: v["counts"] for v in pc.value_counts(whole).to_pylist()}
        counts.pop(None, None)
        if len(counts) < 2:
            found = ", ".join(f'"{label}"' for label in counts) or "none"
            raise UserError(
                f'data.target: "{name}" has one class only in the training split ({found}); a '
                "classifier needs two and more"
            )
        if len(counts) > max(FEW, len(whole) // 2):
            raise UserError(
                f'data.target: "{name}" has {len(counts):,} classes in {len(whole):,} rows; if it '
                "is a number, say data.problem: regression"
            )
        classes = {label: counts[label] for label in sorted(counts, key=_order(counts))}
        index = pc.index_in(whole, pa.array(list(classes), pa.string()))
        codes = np.asarray(index.fill_null(0))
        shown = list(classes)[1:] if len(classes) == 2 else list(classes)
        values = np.stack([codes == list(classes).index(label) for label in shown], axis=1)
        return cls(problem, classes, values=values.astype(np.float64), names=shown)

    def in_words(self) -> str:
        if self.problem == "regression":
            return f"target: regression, mean {self.mean:g}, deviation {self.scale:g}"
        shown = ", ".join(f"{label} {count:,}" for label, count in self.classes.items())
        return f"target: classification, {one_line(shown, 200)}"


def _order(values: Iterable[str]) -> Callable[[str], Any]:
    """Numbers by size where all are numbers, else as text."""
    try:
        return {value: (float(value), value) for value in values}.__getitem__
    except ValueError:
        return str


def _problem(name: str, chunks: Chunks, reader: Reading) -> str:
    kind = infer((chunk.column(name) for chunk in chunks()), reader, f'data.target: "{name}"')
    if kind.name != "number":
        return "classification"
    distinct: set[float] = set()
    for chunk in chunks():
        values, _ = reader.numbers(chunk.column(name))
        distinct |= set(np.unique(values[~np.isnan(values)])[: FEW + 1].tolist())
        if amounts(np.array(list(distinct)), len(distinct)):
            return "regression"
    return "classification"


# ------------------------------------------------------------------------------------ columns


def fit_column(
    name: str, kind: Kind, chunks: Chunks, reader: Reading, target: Target, data: Any
) -> Step:
    """What a column learns of the training split."""
    if kind.name == "text":
        return Text(name, data.features.text_size)
    if kind.name == "category":
        return _category(name, chunks, reader, target, data)
    values = values_of(name, kind, chunks, reader, data.on_error)
    return (Date if kind.name == "date" else Number).fit(name, values, data)


def _category(name: str, chunks: Chunks, reader: Reading, target: Target, data: Any) -> Category:
    clean, features = data.clean, data.features
    counts: Counter[str] = Counter()
    gaps = 0
    for chunk in chunks():
        cells = reader.categories(chunk.column(name))
        gaps += cells.null_count
        for pair in pc.value_counts(cells.drop_null()).to_pylist():
            counts[pair["values"]] += pair["counts"]
    frequent = sorted(counts, key=lambda value: (-counts[value], value))
    encode = features.encoders.get(name, features.encode)
    fill = None
    if clean.missing == "constant":
        fill = str(clean.fill.get(name, "missing"))
    elif clean.missing == "most_frequent" and frequent:
        fill = frequent[0]
    if fill is not None and gaps:
        counts[fill] += gaps
        frequent = sorted(counts, key=lambda value: (-counts[value], value))
    kept = frequent[: features.max_categories]
    values = sorted(kept, key=_order(kept))
    found = Category(name, values, encode, fill, drop=clean.missing == "drop")
    indicator = encode != "index" if clean.indicator is None else clean.indicator
    found.indicator = bool(indicator and gaps and fill is None and not found.drop)
    rows = sum(counts.values()) + (gaps if fill is None else 0)
    if encode == "onehot":
        found.columns = [f"{name}={value}" for value in values]
    elif encode == "hash":
        found.hash_size = features.hash_size
        found.columns = [f"{name}#{place}" for place in range(found.hash_size)]
    elif encode == "frequency":
        shares = np.array([0.0, *(counts[value] / rows for value in values)])
        _table(found, [f"{name} share"], shares[None, :, None])
    elif encode == "ordinal":
        _table(found, [f"{name} order"], np.arange(len(values) + 1.0)[None, :, None])
    elif encode == "target":
        _target_table(found, chunks, reader, target)
    return found


def _table(found: Category, columns: list[str], tables: np.ndarray) -> None:
    found.columns, found.tables = columns, tables.tolist()


def _target_table(found: Category, chunks: Chunks, reader: Reading, target: Target) -> None:
    """(Σ y + m · mean) / (rows + m) of each value, m rows of smoothing: scikit-learn's
    TargetEncoder with smooth=m. Table 0 is of all training rows; table 1 + f of all but fold f's,
    which is what the rows of fold f get, so that none reads its own target."""
    size, columns = len(found.values) + 1, target.values.shape[1]
    sums = np.zeros((FOLDS, size, columns))
    rows = np.zeros((FOLDS, size))
    start = 0
    for chunk in chunks():
        cells = reader.categories(chunk.column(found.name))
        codes = found.codes(cells if found.fill is None else cells.fill_null(found.fill))
        place = fold_of(chunk.hashes) * size + codes
        y = target.values[start : start + len(chunk)]
        start += len(chunk)
        rows += np.bincount(place, minlength=FOLDS * size).reshape(FOLDS, size)
        for column in range(columns):
            added = np.bincount(place, y[:, column], FOLDS * size)
            sums[:, :, column] += added.reshape(FOLDS, size)
    tables = []
    for fold in (None, *range(FOLDS)):
        y_sum, count = sums.sum(0), rows.sum(0)
        if fold is not None:
            y_sum, count = y_sum - sums[fold], count - rows[fold]
        mean = y_sum.sum(0) / max(count.sum(), 1)
        found_here = (y_sum + SMOOTHING * mean) / (count + SMOOTHING)[:, None]
        found_here[0] = np.where(count[0] > 0, found_here[0], mean)
        tables.append(found_here)
    names = [f"{found.name} mean"] if columns == 1 else [
        f"{found.name} mean of {label}" for label in target.names]  # fmt: skip
    _table(found, names, np.array(tables))
