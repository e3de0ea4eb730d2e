"""What a table's column is, and its cells as numbers, dates or categories.

Letters: k cells of a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .table_cells import texts

BREAKS = 0.05  # of a column's values that may break the type which the others have
SEEN = 100_000  # rows of the training split from which a type is inferred
FEW = 20  # values; a whole number with fewer as the target is a class
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
TRUE, FALSE = ("true", "yes"), ("false", "no")

Parsed = tuple[np.ndarray, np.ndarray]
"""float64 (k,), NaN where there is nothing; and bool (k,): cells of another type."""


@dataclass(frozen=True)
class Reading:
    """How text is read: the recipe's settings.

    Attributes:
        missing: texts that mean that there is no value.
        thousands, decimal: see the recipe's data.columns.
        lower, trim: whether categories lose their case and their blanks.
    """

    missing: list[str]
    thousands: str | None = None
    decimal: str = "."
    lower: bool = False
    trim: bool = True

    def present(self, array: pa.Array) -> pa.Array:
        """Nulls where there is no value."""
        if pa.types.is_floating(array.type):
            return pc.if_else(pc.is_nan(array), None, array)
        if not pa.types.is_string(array.type):
            return array
        return pc.if_else(pc.is_in(array, pa.array(self.missing, pa.string())), None, array)

    def numbers(self, array: pa.Array) -> Parsed:
        """float64; infinities are cells of another type."""
        array = self.present(array)
        if pa.types.is_null(array.type):
            return np.full(len(array), np.nan), np.zeros(len(array), bool)
        if pa.types.is_string(array.type):
            if self.decimal == "," or self.thousands:
                array = self._plain(array)
            try:
                found = array.cast(pa.float64())
            except pa.ArrowInvalid:
                array = pc.utf8_trim_whitespace(array)
                fits = pc.match_substring_regex(array, NUMBER)
                found = pc.if_else(fits, array, None).cast(pa.float64())
        else:
            found = array.cast(pa.uint8()) if pa.types.is_boolean(array.type) else array
            found = found.cast(pa.float64())
        values = found.to_numpy(zero_copy_only=False)
        wrong = np.isnan(values) if found.null_count or array.null_count else None
        there = _there(array)
        bad = there & wrong if wrong is not None else np.zeros(len(values), bool)
        infinite = np.isinf(values)
        if infinite.any():
            values = np.where(infinite, np.nan, values)
            bad = bad | infinite
        return values, bad

    def _plain(self, array: pa.Array) -> pa.Array:
        """Numbers without thousands' separators, with a decimal point."""
        if self.thousands:
            part = re.escape(self.thousands)
            whole = rf"^\s*[+-]?\d{{1,3}}({part}\d{{3}})+({re.escape(self.decimal)}\d*)?\s*$"
            plain = pc.replace_substring(array, self.thousands, "")
            array = pc.if_else(pc.match_substring_regex(array, whole), plain, array)
        if self.decimal != ".":
            array = pc.replace_substring(array, ".", "?")  # no number then
            array = pc.replace_substring(array, self.decimal, ".")
        return array

    def booleans(self, array: pa.Array) -> Parsed:
        """1 and 0."""
        array = self.present(array)
        if not pa.types.is_string(array.type):
            values, bad = self.numbers(array)
        else:
            lower = pc.utf8_lower(pc.utf8_trim_whitespace(array))
            true = pc.is_in(lower, pa.array([*TRUE, "1"]))
            false = pc.is_in(lower, pa.array([*FALSE, "0"]))
            values = np.full(len(array), np.nan)
            values[np.asarray(true)] = 1.0
            values[np.asarray(false)] = 0.0
            bad = _there(array) & np.isnan(values)
        other = ~np.isnan(values) & (values != 0) & (values != 1)
        return np.where(other, np.nan, values), bad | other

    def dates(self, array: pa.Array) -> Parsed:
        """Seconds since 1970, of ISO 8601; without a zone it is UTC."""
        array = self.present(array)
        if not pa.types.is_string(array.type):
            there = _there(array)
            return np.full(len(array), np.nan), there
        try:
            stamps = array.cast(pa.timestamp("us")).cast(pa.int64())
            values = stamps.cast(pa.float64()).to_numpy(zero_copy_only=False) / 1e6
        except pa.ArrowInvalid:
            pairs = array.dictionary_encode()
            known = [_seconds(text) for text in pairs.dictionary.to_pylist()]
            at = pairs.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
            values = np.array([*known, np.nan])[at]
        return values, _there(array) & np.isnan(values)

    def categories(self, array: pa.Array) -> pa.Array:
        """Text, null where there is nothing."""
        array = texts(self.present(array))
        if self.trim:
            array = pc.utf8_trim_whitespace(array)
            if pc.any(pc.match_substring_regex(array, r"\s\s|[^\S ]")).as_py():
                array = pc.replace_substring_regex(array, r"\s+", " ")
            array = pc.if_else(pc.equal(array, ""), None, array)
        return pc.utf8_lower(array) if self.lower else array


def _there(array: pa.Array) -> np.ndarray:
    return np.asarray(pc.is_valid(array), bool)


def _seconds(text: str) -> float:
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        return np.nan
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True)
class Kind:
    """What a column is: number, boolean, category, date, text; or id or constant, which are not
    used. `why` is for people."""

    name: str
    why: str


def infer(chunks: Iterable[pa.Array], reader: Reading, where: str) -> Kind:
    """What the first `SEEN` rows say of a column.

    Args:
        chunks: its cells.
        reader: how text is read.
        where: the column, for messages.

    Raises:
        UserError: numbers have thousands' separators that the recipe does not name.
    """
    some: list[pa.Array] = []
    rows = 0
    for chunk in chunks:
        some.append(chunk[: SEEN - rows])
        rows += len(some[-1])
        if rows >= SEEN:
            break
    present = [reader.present(chunk) for chunk in some]
    there = sum(len(chunk) - chunk.null_count for chunk in present)
    if there == 0:
        return Kind("constant", "no value in the training split")
    first = {text for chunk in present for text in pc.unique(texts(chunk)).to_pylist()} - {None}
    if len(first) == 1 and there == rows:
        return Kind("constant", "one value only")
    if not any(pa.types.is_string(chunk.type) for chunk in present):
        return _of_numbers(present, reader, len(first), rows)
    parsers: dict[str, Callable[[pa.Array], Parsed]] = {
        "boolean": reader.booleans, "number": reader.numbers, "date": reader.dates,
    }  # fmt: skip
    for name, parse in parsers.items():
        if name == "boolean" and first <= {"0", "1"}:
            continue  # numbers as well
        bad = sum(int(parse(chunk)[1].sum()) for chunk in present)
        if bad <= BREAKS * there:
            if name == "number":
                return _of_numbers(present, reader, len(first), rows)
            return Kind(name, "true/false" if name == "boolean" else "dates")
    _check_thousands(first, reader, where)
    words = sum(len(text.split()) for text in first) / len(first)
    if len(first) > 0.5 * there and there >= FEW and words >= 3:
        return Kind("text", f"texts of {words:.0f} words")
    if len(first) == there >= FEW:
        return Kind("id", "another text in every row")
    return Kind("category", f"{len(first):,} values")


def _of_numbers(present: list[pa.Array], reader: Reading, distinct: int, rows: int) -> Kind:
    if all(pa.types.is_boolean(chunk.type) for chunk in present):
        return Kind("boolean", "true/false")
    if distinct == rows >= FEW:
        steps = np.diff(np.concatenate([reader.numbers(chunk)[0] for chunk in present]))
        if (steps >= 1).all() and steps.mean() < 3:
            return Kind("id", "whole numbers that count the rows")
    return Kind("number", "numbers")


def _check_thousands(values: set[str], reader: Reading, where: str) -> None:
    for mark in {",", ".", " ", "'"} - {reader.thousands}:
        whole = re.compile(rf"[+-]?\d{{1,3}}({re.escape(mark)}\d{{3}})+(\D\d*)?")
        plain = re.compile(r"[+-]?\d+(\D\d*)?")
        marked = [value for value in values if whole.fullmatch(value.strip())]
        fits = sum(1 for value in values if plain.fullmatch(value.strip())) + len(marked)
        if marked and fits >= (1 - BREAKS) * len(values):
            raise UserError(
                f'{where}: numbers with thousands\' separators ("{min(marked)}"): say '
                f'data.columns.thousands: "{mark}", or name the column in '
                "data.columns.categorical"
            )


def amounts(values: np.ndarray, distinct: int) -> bool:
    """Whether a target's numbers, float64, are to be predicted as such and not as classes: they
    have fractions, or more than `FEW` different values."""
    return distinct > FEW or bool((values != np.floor(values)).any())
