"""Rows of an Excel workbook (.xlsx), read as a stream; the first row has the columns' names."""

from __future__ import annotations

import contextlib
import datetime
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from ..console import bytes_in_words
from ..errors import UserError, did_you_mean
from ..reading import reading
from .table_cells import RECORDS

LARGEST = 2 << 30  # bytes of a workbook's parts, unpacked


def check(where: str) -> None:
    """
    Raises:
        UserError: the package that reads workbooks is not installed.
    """
    if find_spec("openpyxl") is None:
        raise UserError(f"{where}.kind: excel needs: pip install 'gradsmith[excel]'")


def batches(file: Path, sheet: str | None, where: str) -> Iterator[tuple[list[str], list[Any]]]:
    """(names, columns of Python's values) of a sheet, by default the first, in batches of rows.

    Empty rows are left out, and so are empty columns without a name.

    Raises:
        UserError: no workbook, no such sheet, a value without a column's name, a formula whose
            value is an error; or parts that would unpack to more than `LARGEST`.
    """
    import openpyxl

    _check_size(file)
    with reading(str(file), "not readable as an Excel workbook"), contextlib.ExitStack() as stack:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
        stack.callback(book.close)
        names = [found.title for found in book.worksheets]
        if sheet is not None and sheet not in names:
            raise UserError(
                f'{where}.sheet: {file} has no sheet "{sheet}"; allowed are {", ".join(names)}.'
                f"{did_you_mean(sheet, names)}"
            )
        found: Any = book[sheet or names[0]]
        found.reset_dimensions()  # what a file says of them may be wrong
        rows = enumerate(found.iter_rows(values_only=True), 1)
        header = next((row for _, row in rows if any(cell is not None for cell in row)), ())
        columns = ["" if cell is None else str(cell).strip() for cell in header]
        while columns and not columns[-1]:
            columns.pop()
        told = (_cells(row, len(columns), f"{file}:row {number}") for number, row in rows)
        filled = (row for row in told if row is not None)
        while some := list(islice(filled, RECORDS)):
            yield columns, list(zip(*some, strict=True))


def _cells(row: tuple[Any, ...], count: int, at: str) -> list[Any] | None:
    """A row of `count` cells; None where all are empty."""
    if all(cell is None for cell in row):
        return None
    if any(cell is not None for cell in row[count:]):
        raise UserError(f"{at}: a value stands beyond the last column that has a name")
    cells = [*row[:count], *[None] * (count - len(row))]
    return [_value(cell, at) for cell in cells]


def _value(cell: Any, at: str) -> Any:
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    if isinstance(cell, datetime.datetime | datetime.date | datetime.time):
        return cell.isoformat()
    if isinstance(cell, str) and cell in ("#N/A", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!"):
        if cell == "#N/A":
            return None
        raise UserError(f"{at}: a formula's value is {cell}")
    return cell


def _check_size(file: Path) -> None:
    """
    Raises:
        UserError: it is none, or is small and would fill the memory: a "bomb".
    """
    with reading(str(file), "not readable as an Excel workbook"), zipfile.ZipFile(file) as parts:
        size = sum(part.file_size for part in parts.infolist())
    if size > LARGEST:
        raise UserError(
            f"{file}: unpacked, this workbook has {bytes_in_words(size)}; allowed are "
            f"{bytes_in_words(LARGEST)}. Save it as CSV"
        )
