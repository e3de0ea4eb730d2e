"""Tables as a stream of Arrow record batches, from files, databases and datasets.

CSV's cells are text whatever they say: what a column is, the training split decides.
"""

from __future__ import annotations

import bisect
import csv
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import UserError, did_you_mean, one_line
from ..reading import reading
from . import excel, sql
from .example import Ledger
from .files import files_of, lines
from .readers import rows
from .table_cells import CHUNK, RECORDS, cells, from_columns, from_rows

BLOCK = 1 << 22  # bytes of a CSV file that are parsed at once
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": None}


@dataclass(frozen=True)
class Part:
    """Rows of one file.

    Attributes:
        origin: the file, as messages name it.
        batch: the cells.
        numbers: int64 (rows,): where each stands in the file; the first row is 1.
    """

    origin: str
    batch: pa.RecordBatch
    numbers: np.ndarray


Report = Callable[[str, str], None]
"""Told of a broken row, where and why; it raises where the recipe says so."""


def parts(source: Any, where: str, broken: Report) -> Iterator[Part]:
    """A source's rows, a file after the other; at most `source.limit` of them.

    Raises:
        UserError: naming the file and the row, line or byte.
    """
    left = source.limit
    for part in _parts(source, where, broken):
        if left is None:
            yield part
            continue
        if left <= 0:
            return
        yield Part(part.origin, part.batch.slice(0, left), part.numbers[:left])
        left -= min(left, len(part.numbers))


def _parts(source: Any, where: str, broken: Report) -> Iterator[Part]:
    if source.kind in ("jsonl", "hf_dataset"):
        yield from _records(rows(source, [], where))
        return
    if source.kind == "sql":
        for batch, numbers in _numbered(sql.batches(source, where)):
            yield Part(sql.name_of(source.url), batch, numbers)
        return
    if source.kind == "sklearn":
        for batch, numbers in _numbered(_toy(source.path, where).to_batches()):
            yield Part(f"sklearn {source.path}", batch, numbers)
        return
    for file in files_of(source, where):
        if source.kind == "csv":
            batches = _csv(file, source, broken)
        elif source.kind == "excel":
            batches = _numbered(_excel(file, source, where))
        else:
            batches = _numbered(_columnar(file, source.kind))
        for batch, numbers in batches:
            yield Part(str(file), batch, numbers)


def _numbered(
    batches: Iterable[pa.RecordBatch],
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    first = 1
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK):
            part = batch.slice(start, CHUNK)
            numbers = np.arange(first, first + part.num_rows)
            first += part.num_rows
            yield cells(part), numbers


# ------------------------------------------------------------------------------------- kinds


def _csv(file: Path, source: Any, broken: Report) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    import pyarrow.csv

    tabs = ".tsv" in file.suffixes  # which has no quotes: a quote in it is a character
    delimiter = source.delimiter or ("\t" if tabs else ",")
    names = source.columns or _header(file, delimiter, tabs)
    _check_names(names, f"{file}:1")
    if not tabs:
        _check_quotes(file, delimiter)
    skipped: list[int] = []
    refused: list[UserError] = []
    header = 0 if source.columns else 1  # Arrow counts the line of names as row 1

    def invalid(row: Any) -> str:
        number = row.number - header
        told = f"{row.actual_columns} values in this row; allowed are as many as there are columns"
        try:
            broken(f"{file}:row {number}", f"{told}, {len(names)}")
        except UserError as error:  # which Arrow would not let through
            refused.append(error)
            return "error"
        skipped.append(number)
        return "skip"

    held, reader = sys.getrefcount(invalid), None
    try:
        with pa.input_stream(str(file), compression=COMPRESSED.get(file.suffix)) as stream:
            reader = pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(
                    use_threads=False, block_size=BLOCK, column_names=names, skip_rows=header
                ),
                pyarrow.csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char=False if tabs else '"',
                    newlines_in_values=not tabs,
                    invalid_row_handler=invalid,
                ),
                pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
            first = 1
            for batch in reader:
                good = np.arange(first, first + batch.num_rows)
                first += batch.num_rows
                for start in range(0, batch.num_rows, CHUNK):
                    part = good[start : start + CHUNK]
                    yield batch.slice(start, CHUNK), _places(part, skipped)
    except pa.ArrowInvalid as error:
        if refused:
            raise refused[0] from None
        if "Empty CSV" in str(error):
            return
        for _ in lines(file):  # which names the byte that is no UTF-8
            pass
        raise UserError(f"{file}: not readable as CSV: {one_line(error)}") from None
    finally:  # Arrow's thread may let go of `invalid` later; while Python ends that would abort it
        reader, until = None, time.monotonic() + 1.0
        while sys.getrefcount(invalid) > held and time.monotonic() < until:
            time.sleep(0.001)


def _places(good: np.ndarray, skipped: list[int]) -> np.ndarray:
    """Rows' places among all of a file's rows, where they are counted without the skipped."""
    if not skipped:
        return good
    gaps = [number - place for place, number in enumerate(skipped)]  # good rows before, plus 1
    return np.array([int(row) + bisect.bisect_right(gaps, int(row)) for row in good])


def _header(file: Path, delimiter: str, tabs: bool) -> list[str]:
    try:
        reader = csv.reader(
            _text(file),
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
            strict=True,
        )
        return next((names for names in reader if names), [])
    except csv.Error as error:
        raise UserError(f"{file}:1: not readable as CSV: {error}") from None


def _text(file: Path) -> Iterator[str]:
    """Lines, of a compressed file too."""
    if file.suffix not in COMPRESSED:
        yield from lines(file)
        return
    with reading(str(file), f"not readable as {file.suffix[1:]}"):
        with pa.input_stream(str(file), compression=COMPRESSED[file.suffix]) as stream:
            text = stream.read(BLOCK).decode("utf-8", errors="ignore")
        yield from text.removeprefix("\ufeff").splitlines(keepends=True)


def _check_names(names: list[str], at: str) -> None:
    if not names:
        raise UserError(f"{at}: no line of columns' names: the file is empty")
    if not all(name.strip() for name in names):
        raise UserError(f"{at}: a column's name is empty: {one_line(', '.join(names), 200)}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'{at}: the column "{name}" is there twice')


def _check_quotes(file: Path, delimiter: str) -> None:
    """
    Raises:
        UserError: a quote that does not end, after which Arrow would take the rest of the file for
            one value.
    """
    count = 0
    with pa.input_stream(str(file), compression=COMPRESSED.get(file.suffix)) as stream:
        while block := stream.read(BLOCK):
            count += block.count(b'"')
    if count % 2 == 0:
        return
    reader, started = csv.reader(_text(file), delimiter=delimiter, strict=True), 0
    try:
        for _ in reader:
            started = reader.line_num
    except csv.Error as error:
        raise UserError(f"{file}:{started + 1}: not readable as CSV: {error}") from None


def _excel(file: Path, source: Any, where: str) -> Iterator[pa.RecordBatch]:
    for names, columns in excel.batches(file, source.sheet, where):
        _check_names(names, f"{file}:row 1")
        yield from_columns(columns, names)


def _columnar(file: Path, kind: str) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet

    what = "Parquet" if kind == "parquet" else "Arrow"
    with reading(str(file), f"not readable as {what}"):
        if kind == "parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                yield from table.iter_batches(CHUNK)
            return
        with pa.memory_map(str(file)) as mapped:
            try:
                table = pa.ipc.open_file(mapped)
            except pa.ArrowInvalid:
                mapped.seek(0)
                yield from pa.ipc.open_stream(mapped)
                return
            for number in range(table.num_record_batches):
                yield table.get_batch(number)


def _toy(name: str, where: str) -> pa.Table:
    """One of the tables that ship with scikit-learn; what it predicts is the column `target`."""
    try:
        import sklearn.datasets
    except ImportError:
        raise UserError(
            f"{where}.kind: sklearn needs scikit-learn: pip install 'gradsmith[table]'"
        ) from None
    found = getattr(sklearn.datasets, f"load_{name}")()
    columns = {str(n): found.data[:, i] for i, n in enumerate(found.feature_names)}
    target = found.target
    if "target_names" in found:
        target = np.array([str(label) for label in found.target_names])[target]
    return pa.table({**columns, "target": target})


def _records(found: Iterator[tuple[dict[str, Any], str]]) -> Iterator[Part]:
    """Rows that come as mappings; of a file, all have keys of its first rows."""
    for origin, of_file in groupby(found, lambda pair: pair[1].rpartition(":")[0]):
        names: list[str] = []
        first = 1
        while chunk := list(islice(of_file, RECORDS)):
            names = names or list(dict.fromkeys(key for row, _ in chunk for key in row))
            for row, at in chunk:
                for name in row:
                    if name not in names:
                        raise UserError(
                            f'{at}: the key "{name}" is in none of the first {RECORDS:,} rows, '
                            f"which have {', '.join(names)}.{did_you_mean(name, names)}"
                        )
            numbers = np.arange(first, first + len(chunk))
            first += len(chunk)
            yield Part(origin, from_rows([row for row, _ in chunk], names), numbers)


def aligned(part: Part, names: list[str], source: Any, where: str) -> pa.RecordBatch:
    """A part's cells in these columns. Rows that come with their names may lack some of them.

    Raises:
        UserError: a file lacks a column that others have.
    """
    there = part.batch.schema.names
    if source.kind not in ("jsonl", "hf_dataset"):
        check_columns(dict.fromkeys(names, where), there, part.origin)
    rows = part.batch.num_rows
    columns = [part.batch.column(name) if name in there else pa.nulls(rows) for name in names]
    return pa.RecordBatch.from_arrays(columns, names)


def check_columns(needed: dict[str, str], names: list[str], at: str) -> None:
    """
    Args:
        needed: column -> the recipe's key that names it.
        names: those that are there.
        at: the file.

    Raises:
        UserError: one of them is not there.
    """
    for name, key in needed.items():
        if name not in names:
            raise UserError(
                f'{key}: {at} has no column "{name}"; it has {one_line(", ".join(names))}.'
                f"{did_you_mean(name, names)}"
            )


def reporting(on_error: str, ledger: Ledger) -> Report:
    """What becomes of a broken row: `stop` raises, `skip` counts it."""

    def broken(at: str, why: str) -> None:
        if on_error == "stop":
            raise UserError(f"{at}: {why}. data.on_error: skip would drop such rows")
        ledger.add("read", "in")
        ledger.add("read", "dropped", reason=why)

    return broken
