"""The cells of a table, as Arrow has them: whole numbers, numbers, true/false, text or nothing.

Dates are text in ISO 8601.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .readers import kind_of

CHUNK = 65_536  # rows of a batch, at most
RECORDS = 8_192  # where they come one by one


def cells(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch of whole numbers, numbers, true/false and text alone.

    Raises:
        UserError: a column of lists, objects or bytes.
    """
    arrays = []
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        kind = array.type
        if pa.types.is_dictionary(kind):
            array = array.dictionary_decode()
            kind = array.type
        if pa.types.is_integer(kind):
            wanted = pa.float64() if kind == pa.uint64() else pa.int64()
        elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            wanted = pa.float64()
        elif pa.types.is_boolean(kind) or pa.types.is_null(kind):
            wanted = kind
        elif (
            pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_temporal(kind)
        ):
            wanted = pa.string()
        else:
            raise UserError(
                f'column "{name}": of type {kind}; allowed are numbers, text, dates and true/false'
            )
        arrays.append(array if kind == wanted else array.cast(wanted))
    return pa.RecordBatch.from_arrays(arrays, batch.schema.names)


def texts(array: pa.Array) -> pa.Array:
    """Cells as text, the same for a number whatever it came as: 3, 3.0 and "3" are "3"."""
    if pa.types.is_string(array.type):
        return array
    if pa.types.is_floating(array.type):
        whole = pc.equal(array, pc.floor(array))
        small = pc.and_(whole, pc.less(pc.abs(array), 2.0**53))
        numbers = pc.if_else(small, array, None).cast(pa.int64()).cast(pa.string())
        return pc.coalesce(numbers, array.cast(pa.string()))
    return array.cast(pa.string())


def text_of(value: Any) -> str:
    """One cell as text; see `texts`."""
    found: str = texts(pa.array([value]))[0].as_py()
    return found


def from_rows(some: list[dict[str, Any]], names: list[str]) -> pa.RecordBatch:
    """Mappings as a batch of cells; a key that a row lacks is a missing value.

    Raises:
        UserError: a cell is a list or an object.
    """
    return from_columns([[row.get(name) for row in some] for name in names], names)


def from_columns(columns: Sequence[Sequence[Any]], names: list[str]) -> pa.RecordBatch:
    """Columns of Python's values as a batch of cells.

    Raises:
        UserError: a cell is a list or an object.
    """
    arrays = []
    for name, values in zip(names, columns, strict=True):
        for value in values:
            if isinstance(value, list | dict):
                raise UserError(
                    f'column "{name}": found {kind_of(value)}; allowed are text, numbers and '
                    "true/false"
                )
        try:
            array = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # of several types
            array = pa.array([None if value is None else text_of(value) for value in values])
        arrays.append(array)
    return cells(pa.RecordBatch.from_arrays(arrays, names))
