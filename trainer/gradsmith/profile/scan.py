"""A table read once, as a stream: what is counted over all rows, and a sample of rows.

Memory is bounded but for 8 bytes a row, by which duplicates are found. What a column is, is said by
the same code as in `prepare`, from the first rows. Letters: k cells of a batch, s rows of the
sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.table_fit import parsed
from ..data.table_kinds import SEEN, Kind, Reading, infer
from ..data.table_read import Report, aligned, parts
from ..data.table_spool import digest
from ..errors import UserError

SAMPLE = 100_000  # rows; of a larger table the ones with the smallest hashes of their places
SKETCH = 16_384  # different values are counted up to this, and estimated above (within about 1 %)
COUNTED = 20_000  # values of a column that are counted; where there are more, the sample says
MARKS = ((None, "."), (",", "."), (".", ","), (" ", "."), ("'", "."))  # thousands', decimal
NUMBERS = ("number", "boolean", "date")  # kinds whose cells are read as numbers


def mix(values: np.ndarray) -> np.ndarray:
    """A hash of uint64 (splitmix64; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


class Distinct:
    """How many different values there are, from the smallest of their hashes.

    Exact up to `SKETCH`; above it (k - 1) / (the k-th smallest hash / 2^64), of which the relative
    deviation is 1/sqrt(k - 2) (Bar-Yossef et al. 2002).
    """

    def __init__(self) -> None:
        self._least = np.zeros(0, np.uint64)
        self.exact = True

    def add(self, hashes: np.ndarray) -> None:
        if not self.exact:
            hashes = hashes[hashes < self._least[-1]]
        self._least = np.unique(np.concatenate([self._least, hashes]))
        if len(self._least) > SKETCH:
            self._least, self.exact = self._least[:SKETCH], False

    @property
    def count(self) -> int:
        if self.exact:
            return len(self._least)
        return round((SKETCH - 1) / (float(self._least[-1]) / 2.0**64))


@dataclass
class Seen:
    """A column over all rows.

    Attributes:
        kind: what it is.
        missing, bad: cells without a value, and of another type than the column.
        least, most, total: of numbers.
        counts: how often each value is there, of texts; None where there are too many values.
    """

    kind: Kind
    missing: int = 0
    bad: int = 0
    least: float = np.inf
    most: float = -np.inf
    total: float = 0.0
    distinct: Distinct = field(default_factory=Distinct)
    counts: Counter[str] | None = field(default_factory=Counter)

    @property
    def numeric(self) -> bool:
        return self.kind.name in NUMBERS or self.kind.why.startswith("whole numbers")

    def add(self, cells: pa.Array, reader: Reading) -> None:
        if self.numeric:
            values, bad = parsed(cells, self.kind, reader)
            there = values[~np.isnan(values)]
            self.bad += int(bad.sum())
            self.missing += len(values) - len(there) - int(bad.sum())
            if len(there):
                self.least = min(self.least, float(there.min()))
                self.most = max(self.most, float(there.max()))
                self.total += float(there.sum())
                self.distinct.add(mix((there + 0.0).view(np.uint64)))  # -0.0 is 0.0
            return
        found = reader.categories(cells)
        self.missing += found.null_count
        pairs = pc.value_counts(found.drop_null())
        values = pairs.field("values")
        if len(values):
            self.distinct.add(digest(pa.RecordBatch.from_arrays([values], ["v"]), ["v"]))
        if self.counts is not None:
            self.counts.update(dict(zip(values.to_pylist(), pairs.field("counts").to_pylist(),
                                        strict=True)))  # fmt: skip
            if len(self.counts) > COUNTED:
                self.counts = None


class _Sample:
    """`SAMPLE` rows that every row is as likely to be among, the same each time."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, pa.RecordBatch]] = []
        self._below = np.uint64(2**64 - 1)

    def add(self, batch: pa.RecordBatch, first: int) -> None:
        places = np.arange(first, first + batch.num_rows)
        self._parts += self._kept(mix(places.astype(np.uint64)), places, batch)
        if sum(len(part[0]) for part in self._parts) > 2 * SAMPLE:
            self.cut()

    def _kept(
        self, hashes: np.ndarray, places: np.ndarray, batch: pa.RecordBatch
    ) -> list[tuple[np.ndarray, np.ndarray, pa.RecordBatch]]:
        keep = np.flatnonzero(hashes <= self._below)
        if len(keep) < len(places):  # which lets go of the others' memory
            hashes, places, batch = hashes[keep], places[keep], batch.take(pa.array(keep))
        return [(hashes, places, batch)] if len(keep) else []

    def cut(self) -> tuple[np.ndarray, list[pa.RecordBatch]]:
        """The rows' places, and their cells."""
        if not self._parts:
            return np.zeros(0, np.int64), []
        hashes = np.concatenate([part[0] for part in self._parts])
        if len(hashes) > SAMPLE:
            self._below = np.partition(hashes, SAMPLE - 1)[SAMPLE - 1]
            self._parts = list(chain(*(self._kept(*part) for part in self._parts)))
        return np.concatenate([part[1] for part in self._parts]), [p[2] for p in self._parts]


@dataclass
class Table:
    """What was read.

    Attributes:
        rows: how many there are.
        columns: name -> what was counted over all rows.
        duplicates: rows that equal an earlier one in all columns.
        places: int64 (s,): which rows the sample has, from 0, rising.
        reader: how text was read.
    """

    rows: int
    columns: dict[str, Seen]
    duplicates: int
    places: np.ndarray
    reader: Reading
    _cells: list[pa.RecordBatch]

    def values(self, name: str) -> np.ndarray:
        """A numeric column of the sample, float64 (s,); NaN where there is nothing."""
        kind = self.columns[name].kind
        found = [parsed(batch.column(name), kind, self.reader)[0] for batch in self._cells]
        return np.concatenate(found)

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of the sample as places in its sorted values, -1 where there is nothing."""
        chunks = [self.reader.categories(batch.column(name)) for batch in self._cells]
        pairs = pa.chunked_array(chunks, pa.string()).combine_chunks().dictionary_encode()
        values = pairs.dictionary.to_pylist()
        order = sorted(range(len(values)), key=values.__getitem__)
        place = np.full(len(values) + 1, -1)
        place[order] = np.arange(len(values))
        codes = place[pairs.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)]
        return codes, [values[at] for at in order]


def scan(
    sources: list[Any], reader: Reading | None, stated: dict[str, str], broken: Report
) -> Table:
    """Reads all sources, each once.

    Args:
        sources: as a recipe has them.
        reader: how text is read; None finds out what parts thousands.
        stated: column -> the kind that the recipe says.
        broken: is told of broken rows.

    Raises:
        UserError: a file is not readable, or has no row.
    """
    stream = _read(sources, broken)
    head: list[pa.RecordBatch] = []
    for batch in stream:
        head.append(batch)
        if sum(part.num_rows for part in head) >= SEEN:
            break
    if not sum(part.num_rows for part in head):
        where = ", ".join(str(source.path or source.kind) for source in sources)
        raise UserError(f"{where}: there is no row")
    reader, kinds = _kinds(head, reader, stated)
    columns = {name: Seen(kind) for name, kind in kinds.items()}
    sample, rows, hashes = _Sample(), 0, []
    for batch in chain(head, stream):
        for name, column in columns.items():
            column.add(batch.column(name), reader)
        hashes.append(digest(batch, list(columns)))
        sample.add(batch, rows)
        rows += batch.num_rows
    whole = np.concatenate(hashes)
    places, cells = sample.cut()
    return Table(rows, columns, rows - len(np.unique(whole)), places, reader, cells)


def _read(sources: list[Any], broken: Report) -> Iterator[pa.RecordBatch]:
    """Batches of the columns that the first one has."""
    names: list[str] = []
    for number, source in enumerate(sources):
        where = f"data.sources.{number}"
        for part in parts(source, where, broken):
            names = names or part.batch.schema.names
            yield aligned(part, names, source, where)


def _kinds(
    head: list[pa.RecordBatch], reader: Reading | None, stated: dict[str, str]
) -> tuple[Reading, dict[str, Kind]]:
    """How text is read, and what each column is.

    Raises:
        UserError: numbers are written in a way that is not known.
    """
    from ..recipe import TableData  # pydantic's models take their time

    missing = TableData.model_fields["clean"].default.missing_values
    tried = [reader] if reader else [Reading(list(missing), *marks) for marks in MARKS]
    refused: UserError | None = None
    for how in tried:
        try:
            return how, {name: _kind(head, name, how, stated) for name in head[0].schema.names}
        except UserError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _kind(head: list[pa.RecordBatch], name: str, reader: Reading, stated: dict[str, str]) -> Kind:
    if name in stated:
        return Kind(stated[name], "as the recipe says")
    found = infer((batch.column(name) for batch in head), reader, f'column "{name}"')
    return replace(found, why=found.why.replace(" in the training split", ""))
