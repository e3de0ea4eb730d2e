"""Rows on disk: a file for each column, and for rows of any length one more with their ends.

A split of `rows` rows has, for each column, `<name>.bin`: its entries one behind the other, little
endian. A ragged column's row i is entries offsets[i] to offsets[i + 1] of it; `<offsets>.bin` holds
those rows + 1 numbers as uint64, and columns of equal lengths share one. A row of a fixed column is
`shape` entries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        dtype: of its entries, as numpy writes it: "<u2".
        shape: of a row's entries; () is one number. For a ragged column, of each entry.
        offsets: the name of the file with the rows' ends; None: every row is `shape`.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    offsets: str | None = None


class HashedFile:
    """A file that is written once, front to back, with its size and SHA-256."""

    def __init__(self, path: Path):
        self.path, self.size, self._hash = path, 0, hashlib.sha256()
        self._file: IO[bytes] = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}


class ColumnWriter:
    """Appends rows to a split's folder."""

    def __init__(self, folder: Path, columns: Mapping[str, Column]):
        self._columns = columns
        self._files: dict[str, HashedFile] = {}
        self._ends: dict[str, int] = {}
        for name, column in columns.items():
            self._files[name] = HashedFile(folder / f"{name}.bin")
            if column.offsets and column.offsets not in self._ends:
                self._ends[column.offsets] = 0
                self._files[column.offsets] = HashedFile(folder / f"{column.offsets}.bin")
                self._files[column.offsets].write(np.zeros(1, "<u8").tobytes())

    def add(self, row: Mapping[str, np.ndarray]) -> None:
        """
        Raises:
            ValueError: a column has another shape than it should, or those that share their
                offsets have other lengths.
        """
        lengths: dict[str, int] = {}
        for name, column in self._columns.items():
            values = np.asarray(row[name])
            shape = values.shape[1:] if column.offsets else values.shape
            if shape != column.shape:
                raise ValueError(f"{name}: a row of shape {values.shape}; allowed is {column}")
            self._files[name].write(values.astype(column.dtype).tobytes())
            if column.offsets and lengths.setdefault(column.offsets, len(values)) != len(values):
                raise ValueError(f"{name}: {len(values)} entries, unlike others of its row")
        for name, length in lengths.items():
            self._ends[name] += length
            self._files[name].write(np.array([self._ends[name]], "<u8").tobytes())

    def extend(self, rows: Mapping[str, np.ndarray]) -> None:
        """Rows of fixed columns, each (rows, *shape).

        Raises:
            ValueError: a column has another shape than it should, or offsets.
        """
        for name, column in self._columns.items():
            values = rows[name]
            if column.offsets or values.shape[1:] != column.shape:
                raise ValueError(f"{name}: rows of shape {values.shape}; allowed is {column}")
            self._files[name].write(np.ascontiguousarray(values, column.dtype).tobytes())

    def close(self) -> dict[str, dict[str, Any]]:
        """The files' sizes and hashes, by name."""
        return {file.path.name: file.close() for file in self._files.values()}


class Columns:
    """A split, memory-mapped: its columns and offsets are attributes by their names."""

    def __init__(self, folder: Path, columns: Mapping[str, Column]):
        self.columns = columns
        for name, column in columns.items():
            flat = _map(folder / f"{name}.bin", column.dtype)
            size = math.prod(column.shape)
            setattr(self, name, flat.reshape(-1, *column.shape) if size else flat)
            if column.offsets is None:
                self._rows = len(getattr(self, name))
            elif not hasattr(self, column.offsets):
                setattr(self, column.offsets, _map(folder / f"{column.offsets}.bin", "<u8"))
                self._rows = len(getattr(self, column.offsets)) - 1

    def __len__(self) -> int:
        return self._rows

    def row(self, i: int) -> dict[str, np.ndarray]:
        """Row i, a view for each column."""
        found = {}
        for name, column in self.columns.items():
            values = getattr(self, name)
            if column.offsets is None:
                found[name] = values[i]
            else:
                ends = getattr(self, column.offsets)
                found[name] = values[int(ends[i]) : int(ends[i + 1])]
        return found


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
