"""A table between reading and encoding: Arrow files on disk, and for each row its split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, one_line
from ..recipe import TableData, TableRecipe
from .ahead import ahead
from .columns import ColumnWriter, HashedFile
from .example import Ledger
from .split import SPLITS
from .table_cells import texts
from .table_read import Part, aligned, check_columns, parts, reporting
from .table_split import DROPPED, Keys, duplicates, leaks, sides

NUMBER = "#"  # the column of the spool with a row's place in its file


@dataclass(frozen=True)
class Chunk:
    """Some rows of one split, columns of them on demand.

    Attributes:
        origin: the file that they are of.
        batch: the cells of its neighbours too.
        keep: which rows of the batch they are, int64 (rows,).
        numbers: int64 (rows,): where each stands in its file.
        hashes: uint64 (rows,): of their content.
        training: whether they are of the training split.
    """

    origin: str
    batch: pa.RecordBatch
    keep: np.ndarray
    numbers: np.ndarray
    hashes: np.ndarray
    training: bool

    def __len__(self) -> int:
        return len(self.keep)

    @property
    def names(self) -> list[str]:
        return [name for name in self.batch.schema.names if name != NUMBER]

    @cached_property
    def _all(self) -> bool:
        return len(self.keep) == self.batch.num_rows

    def column(self, name: str) -> pa.Array:
        """Cells, as `table_read` has them; nulls where the rows have no such column."""
        if name not in self.batch.schema.names:
            return pa.nulls(len(self))
        column = self.batch.column(name)
        return column if self._all else column.take(pa.array(self.keep))

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        number = int(self.numbers[row])
        return f"{self.origin}:row {number}" if number else self.origin

    def documents(self, which: np.ndarray) -> bytes:
        """Rows as `Example.to_json` writes them, a line each."""
        places = pa.array(self.keep[which])
        head, parts = '{"fields": {', []
        for name in self.names:
            parts += [f"{head}{json.dumps(name, ensure_ascii=False)}: "]
            parts += [_literals(self.batch.column(name).take(places))]
            head = ", "
        origin = json.dumps(f"{self.origin}:row ", ensure_ascii=False)[:-1]
        numbers = pa.array(self.numbers[which]).cast(pa.string())
        lines = pc.binary_join_element_wise(*parts, f'}}, "source": {origin}', numbers, '"}\n', "")
        _, ends, data = lines.buffers()
        if data is None:
            return b""
        first, last = np.frombuffer(ends, np.int32)[[lines.offset, lines.offset + len(lines)]]
        return bytes(data[first:last])


class TableSpool:
    """Rows in the order of the sources, with the split of each.

    Args:
        folder: where the Arrow files are.
        origins: the source file of each of them.
        keys: of all rows.
        data: the recipe's.

    Attributes:
        side: int8 (rows,): the place in SPLITS, or DROPPED.
    """

    def __init__(self, folder: Path, origins: list[str], keys: Keys, data: TableData):
        self.folder, self.origins, self.hashes = folder, origins, keys.features
        self.features, self.on_leak = keys.names, data.split.on_leak
        self.side = np.full(len(keys.features), DROPPED, np.int8)

    @property
    def counts(self) -> dict[str, int]:
        return {name: int((self.side == place).sum()) for place, name in enumerate(SPLITS)}

    @classmethod
    def collect(
        cls, recipe: TableRecipe, scratch: Path, ledger: Ledger, log: Callable[[str], None]
    ) -> Self:
        folder = scratch / "train"
        writer = _Writer(recipe, folder, ledger)
        for part, found_there in ahead(writer.hashed, writer.read()):
            writer.add(part, found_there)
        origins, keys = writer.close()
        found = cls(folder, origins, keys, recipe.data)
        dropped = duplicates(keys, recipe.data.clean, ledger)
        found.side = sides(keys, dropped, recipe.data, found.shown, ledger)
        log("rows: " + ", ".join(f"{name} {n:,}" for name, n in found.counts.items()))
        return found

    def _batches(self) -> Iterator[tuple[str, pa.RecordBatch, int]]:
        """(source file, cells, the number of the first row among all)."""
        first = 0
        for number, origin in enumerate(self.origins):
            with pa.memory_map(str(self.folder / f"spool-{number}.arrow")) as mapped:
                reader = pa.ipc.open_file(mapped)
                for place in range(reader.num_record_batches):
                    batch = reader.get_batch(place)
                    yield origin, batch, first
                    first += batch.num_rows

    def chunks(self, split: str) -> Iterator[Chunk]:
        """A split's rows."""
        wanted = SPLITS.index(split)
        for origin, batch, first in self._batches():
            keep = np.flatnonzero(self.side[first : first + batch.num_rows] == wanted)
            if len(keep):
                numbers = batch.column(NUMBER).to_numpy()[keep]
                hashes = self.hashes[first + keep]
                yield Chunk(origin, batch, keep, numbers, hashes, split == "train")

    def training(self) -> Iterator[Chunk]:
        return self.chunks("train")

    def shown(self, rows: Sequence[int]) -> list[str]:
        """Rows for a message: where each stands, and what is in it."""
        found = dict.fromkeys(rows, "")
        for origin, batch, first in self._batches():
            for row in rows:
                if first <= row < first + batch.num_rows:
                    keep = np.array([row - first])
                    numbers = batch.column(NUMBER).to_numpy()[keep]
                    chunk = Chunk(origin, batch, keep, numbers, self.hashes[:1], False)
                    fields = json.loads(chunk.documents(np.zeros(1, np.int64)))["fields"]
                    found[row] = one_line(
                        f"{chunk.place(0)} {json.dumps(fields, ensure_ascii=False)}"
                    )
        return [found[row] for row in rows]

    def _check_leaks(self, processor: Any, ledger: Ledger) -> None:
        """
        Raises:
            UserError: what a model reads of a held-out row is in the training split too, and the
                recipe says to stop.
        """
        content, read = self.hashes, list(processor.steps)
        if set(read) != set(self.features):  # others do not tell rows apart
            content = np.concatenate([digest(batch, read) for _, batch, _ in self._batches()])
        found = leaks(content, self.side)
        if not found:
            return
        if self.on_leak == "stop":
            some = [self.shown(pair) for pair in found[:3]]
            pairs = "".join(f"\n  {row}\n    {other}" for row, other in some)
            unread = [name for name in self.features if name not in read]
            also = f"put {', '.join(unread)}, which no model reads, into data.columns.drop, or "
            raise UserError(
                f"data.split: {len(found):,} held-out rows are equal to rows of another split in "
                f"all that a model reads; {also if unread else ''}say data.split.on_leak: drop to "
                f"leave them out:{pairs}"
            )
        for row, _ in found:
            ledger.add("encode", "in")
            reason = f"equal to a row of another split, in {SPLITS[self.side[row]]}"
            ledger.add("encode", "dropped", reason=reason)
            self.side[row] = DROPPED

    def encode(self, processor: Any, name: str, ledger: Ledger) -> dict[str, Any]:
        if name == SPLITS[0]:
            self._check_leaks(processor, ledger)
        folder = self.folder.parent / name
        writer = ColumnWriter(folder, processor.columns)
        raw = HashedFile(folder / "documents.jsonl") if name != "train" else None
        documents = 0

        def encoded(chunk: Chunk) -> tuple[dict[str, np.ndarray], int, bytes, Ledger]:
            own = Ledger()
            rows, kept = processor.encode_chunk(chunk, own)
            return rows, len(kept), b"" if raw is None else chunk.documents(kept), own

        for rows, count, lines, own in ahead(encoded, self.chunks(name)):
            writer.extend(rows)
            documents += count
            ledger.merge(own)
            if raw is not None:
                raw.write(lines)
        files = writer.close()
        if raw is not None:
            files[raw.path.name] = raw.close()
        if name == SPLITS[-1]:
            for number in range(len(self.origins)):
                (self.folder / f"spool-{number}.arrow").unlink()
        return {"documents": documents, "files": files}


class _Writer:
    """Writes what is read, and keeps what duplicates and splits are told by."""

    def __init__(self, recipe: TableRecipe, folder: Path, ledger: Ledger):
        self.data, self.folder, self.ledger = recipe.data, folder, ledger
        self.origins: list[str] = []
        self._schema: pa.Schema | None = None
        self._file: Any = None
        self.names: list[str] = []
        self.features: list[str] = []
        self._hashes: dict[str, list[np.ndarray]] = {"features": [], "keys": []}
        roles = ((key, getattr(recipe.data, key)) for key in ("target", "group", "time", "weight"))
        self.roles = {key: name for key, name in roles if name is not None}
        self._cells: dict[str, list[pa.Array]] = {key: [] for key in self.roles}

    def read(self) -> Iterator[Part]:
        """The sources' rows, with the columns that are used."""
        for number, source in enumerate(self.data.sources):
            where = f"data.sources.{number}"
            for part in parts(source, where, reporting(self.data.on_error, self.ledger)):
                if not self.names:
                    self.names = self._used(part.batch.schema.names, where)
                cells = aligned(part, self.names, source, where)
                yield Part(part.origin, cells, part.numbers)

    def hashed(self, part: Part) -> tuple[Part, dict[str, np.ndarray]]:
        """What tells rows apart, uint64 (rows,)."""
        found = {"features": digest(part.batch, self.features)}
        if self.data.clean.keys is not None:
            found["keys"] = digest(part.batch, self.data.clean.keys)
        return part, found

    def add(self, part: Part, hashes: dict[str, np.ndarray]) -> None:
        self.ledger.add("read", "in", part.batch.num_rows, source=part.origin)
        self.ledger.add("read", "kept", part.batch.num_rows, source=part.origin)
        for key, values in hashes.items():
            self._hashes[key].append(values)
        for key, name in self.roles.items():
            self._cells[key].append(texts(part.batch.column(name)))
        self._write(part.origin, part.batch, part.numbers)

    def _used(self, names: list[str], where: str) -> list[str]:
        """The columns that are read, in the order of the first file.

        Raises:
            UserError: the recipe names one that is not there.
        """
        data = self.data
        needed = {name: f"data.columns.{kind}" for name, kind in data.columns.stated().items()}
        needed |= dict.fromkeys(data.columns.drop, "data.columns.drop")
        needed |= dict.fromkeys(data.clean.keys or (), "data.clean.keys")
        needed |= dict.fromkeys(data.clean.fill, "data.clean.fill")
        needed |= dict.fromkeys(data.features.encoders, "data.features.encoders")
        needed |= {name: f"data.{key}" for key, name in self.roles.items()}
        check_columns(needed, names, where)
        if NUMBER in names:
            raise UserError(f'{where}: a column is called "{NUMBER}", which is kept for our own')
        roles = set(self.roles.values())
        used = [name for name in names if name not in data.columns.drop]
        self.features = [name for name in used if name not in roles]
        if not self.features:
            raise UserError(f"{where}: no column is left to learn from; it has {', '.join(names)}")
        return [name for name in names if name in used or name in (data.clean.keys or ())]

    def _write(self, origin: str, cells: pa.RecordBatch, numbers: np.ndarray) -> None:
        cells = cells.append_column(NUMBER, pa.array(numbers, pa.int64()))
        if not self.origins or origin != self.origins[-1] or cells.schema != self._schema:
            if self._file is not None:
                self._file.close()
            self._schema = cells.schema
            path = self.folder / f"spool-{len(self.origins)}.arrow"
            self._file = pa.ipc.new_file(str(path), self._schema)
            self.origins.append(origin)
        self._file.write_batch(cells)

    def close(self) -> tuple[list[str], Keys]:
        if self._file is None:
            raise UserError("data.sources: there is no row")
        self._file.close()
        hashes = {key: np.concatenate(found) for key, found in self._hashes.items() if found}
        missing = pa.array(self.data.clean.missing_values, pa.string())
        columns = {}
        for key, chunks in self._cells.items():
            whole = pa.chunked_array(chunks, pa.string())
            columns[key] = pc.if_else(pc.is_in(whole, missing), None, whole)
        return self.origins, Keys(self.features, **hashes, **columns)


def _literals(cells: pa.Array) -> pa.Array:
    """Each cell as JSON has it."""
    if not pa.types.is_string(cells.type):
        if pa.types.is_floating(cells.type):
            cells = pc.if_else(pc.is_finite(cells), cells, None)
        return pc.coalesce(cells.cast(pa.string()), "null")
    plain = pc.invert(pc.match_substring_regex(cells, r'["\\\x00-\x1f]'))
    if pc.all(plain, min_count=0).as_py():
        return pc.coalesce(pc.binary_join_element_wise('"', cells, '"', ""), "null")
    return pa.array([json.dumps(cell, ensure_ascii=False) for cell in cells.to_pylist()])


def digest(cells: pa.RecordBatch, names: Sequence[str]) -> np.ndarray:
    """8 bytes of BLAKE2b over the named cells of each row, as uint64 (rows,)."""
    columns = [pc.coalesce(texts(cells.column(name)), "") for name in names]
    joined = pc.binary_join_element_wise(*columns, "\x1f").cast(pa.binary()).to_pylist()
    blake = hashlib.blake2b
    found = b"".join([blake(row, digest_size=8).digest() for row in joined])
    return np.frombuffer(found, ">u8").astype(np.uint64)
