"""What stands in files: texts, and the rows of JSON lines, CSV, Parquet and datasets.

Everything is read as a stream. Files that the user names must be right: what cannot be read is an
error that names the file and the line, row or byte, never a silent drop.
"""

from __future__ import annotations

import csv
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean, one_line
from ..files import OurFolders
from ..hub import hub_name
from ..reading import parse_json, reading
from ..recipe import Source
from .example import Example, Messages
from .files import check_not_ours, decode, files_of, lines

SMALLEST_BLOCK = 1024  # bytes; see `_blocks`


DATASET_KINDS = ("text", "csv", "json", "parquet", "arrow")


def texts(source: Source, where: str) -> Iterator[Example]:
    """A folder's or glob's files are a document each; one named file is a corpus, in blocks."""
    assert source.path is not None
    files = files_of(source, where)
    if Path(source.path).is_file():
        for number, block in enumerate(_blocks(lines(files[0]))):
            yield Example(str(files[0]), block, follows=number > 0)
    else:
        for file in files:
            yield Example(str(file), decode(file.read_bytes(), file).removeprefix("\ufeff"))


def _blocks(lines: Iterator[str]) -> Iterator[str]:
    """Cuts a long text into blocks of some paragraphs, 1 KiB and more.

    Where a block ends depends on the text right there (a hash of its last line), so an insertion
    moves the cuts around it only and all other blocks stay on their side of the split. Blocks end
    at a blank line; a text without any is cut at line ends, in blocks of 4 KiB and more.
    """
    block: list[str] = []
    size, last = 0, b""
    for line in lines:
        block.append(line)
        raw = line.strip().encode()
        size += len(line)
        last = raw or last
        chosen = zlib.crc32(last) % 4 == 0
        if size >= SMALLEST_BLOCK * 16 or (
            chosen and size >= (SMALLEST_BLOCK * 4 if raw else SMALLEST_BLOCK)
        ):
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def rows(source: Source, columns: list[str], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, where it stands) of jsonl, csv, parquet and hf_dataset.

    Args:
        source: what the recipe names.
        columns: those that are needed.
        where: the recipe's key, for messages.
    """
    if source.kind == "jsonl":
        for file in files_of(source, where):
            yield from _jsonl_rows(file)
    elif source.kind == "csv":
        for file in files_of(source, where):
            yield from _csv_rows(file, source, columns)
    elif source.kind == "parquet":
        for file in files_of(source, where):
            yield from _parquet_rows(file, columns)
    else:
        yield from _dataset_rows(source, where)


def _csv_rows(file: Path, source: Any, columns: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of text; their names are in the first line, or in the recipe.

    Raises:
        UserError: a row that is longer or shorter than the names, or a quote that does not end.
    """
    tabs = file.suffix == ".tsv"  # which has no quotes: a quote in it is a character
    reader = csv.reader(
        lines(file),
        delimiter=source.delimiter or ("\t" if tabs else ","),
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    names, started = source.columns, 0
    try:
        for values in reader:
            at, started = f"{file}:{started + 1}", reader.line_num
            if not values:
                continue
            if names is None:
                names = values
                if len(set(names)) < len(names) or not all(names):
                    raise UserError(f"{at}: a column's name is empty or there twice: {names}")
                for column in columns:
                    value_of(dict.fromkeys(names), column, at)
                continue
            if len(values) != len(names):
                raise UserError(
                    f"{at}: {len(values)} values in this row; allowed are as many as there are "
                    f"columns, {len(names)} ({one_line(', '.join(names), 80)})"
                )
            yield dict(zip(names, values, strict=True)), at
    except csv.Error as error:
        raise UserError(f"{file}:{started + 1}: not readable as CSV: {error}") from None


def _jsonl_rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        at = f"{file}:{number}"
        row = parse_json(line, at)
        if not isinstance(row, dict):
            raise UserError(f"{at}: each line is a JSON object; found {kind_of(row)}")
        yield row, at


def _parquet_rows(file: Path, columns: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    import pyarrow.parquet

    with reading(str(file), "not readable as Parquet"):
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        for column in columns:
            value_of(dict.fromkeys(names), column, str(file))
        number = 0
        for batch in table.iter_batches(1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{file}:row {number}"


def _dataset_rows(source: Source, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets

    datasets.disable_progress_bars()
    assert source.path is not None
    path = Path(source.path)
    name = str(path.resolve())  # a name alone might be that of one of the library's readers
    if not path.is_dir():
        name = hub_name(source.path, f"{where}.path", "a dataset")
    saved = any((path / n).is_file() for n in ("dataset_info.json", "dataset_dict.json"))
    with reading(f"{where}.path", f"cannot load the dataset {source.path}"):
        if saved:
            found = datasets.load_from_disk(str(path))
            if isinstance(found, datasets.DatasetDict):
                if source.split not in found:
                    raise UserError(
                        f'{where}.split: {source.path} has no split "{source.split}"; '
                        f"allowed are {', '.join(found)}"
                    )
                found = found[source.split]
            _check_own([part["filename"] for part in found.cache_files], path, name, where)
        else:
            builder = datasets.load_dataset_builder(name)
            _check_builder(builder, path if path.is_dir() else None, name, where)
            found = builder.as_streaming_dataset(split=source.split)
        for column, feature in (found.features or {}).items():
            if getattr(feature, "decode", None) is True:  # a picture is wanted as its file
                found = found.cast_column(column, type(feature)(decode=False))
        for number, row in enumerate(found, 1):
            yield row, f"{source.path}:{source.split}:row {number}"


def _check_builder(builder: Any, folder: Path | None, name: str, where: str) -> None:
    """
    Raises:
        UserError: a dataset's card names files that are not its own, or that are read by other
            code than that for text, CSV, JSON, Parquet and Arrow.
    """
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in DATASET_KINDS:
        raise UserError(
            f"{where}.path: {name} is read as {kind}; allowed are {', '.join(DATASET_KINDS)}"
        )
    files = [str(f) for of in (builder.config.data_files or {}).values() for f in of]
    _check_own(files, folder, name, where)


def _check_own(files: list[str], folder: Path | None, name: str, where: str) -> None:
    """
    Raises:
        UserError: one of a dataset's files is outside its folder, or of another dataset.
    """
    for file in files:
        if folder is None:
            own = file.startswith(f"hf://datasets/{name}@")
        else:
            own = "://" not in file and Path(file).resolve().is_relative_to(folder.resolve())
        if not own:
            raise UserError(
                f"{where}.path: {name} names a file that is not its own: {one_line(file)}"
            )


def check_dataset(root: Path, where: str) -> None:
    """
    Raises:
        UserError: a local dataset is in a folder of ours, or has one in it, which the library
            that reads it would not leave out.
    """
    if not root.is_dir():
        hub_name(str(root), f"{where}.path", "a dataset")
    else:
        around = OurFolders().around
        for folder, _, _ in os.walk(root):
            check_not_ours(Path(folder), around, where)


def value_of(row: dict[str, Any], key: str, at: str) -> Any:
    if key not in row:
        keys = [str(name) for name in row]
        found = f"found {', '.join(keys)}" if keys else "found none"
        raise UserError(f'{at}: no key "{key}"; {found}.{did_you_mean(key, keys)}')
    return row[key]


def string(row: dict[str, Any], key: str, at: str) -> str:
    value = value_of(row, key, at)
    if not isinstance(value, str):
        raise UserError(f'{at}: "{key}" must be text; found {kind_of(value)}')
    return value


def label_of(row: dict[str, Any], key: str, at: str) -> str:
    """A row's class: text, or a whole number."""
    label = value_of(row, key, at)
    if isinstance(label, float) and label.is_integer():  # as a table with gaps has them
        label = int(label)
    if label is None or label == "" or not isinstance(label, str | int):
        raise UserError(
            f'{at}: "{key}", the class, must be text or a whole number; found '
            f"{'nothing' if label in (None, '') else kind_of(label)}"
        )
    return str(label)


def messages_of(row: dict[str, Any], key: str, at: str) -> Messages:
    value = value_of(row, key, at)
    if not isinstance(value, list) or not value:
        raise UserError(
            f'{at}: "{key}" must be a list of {{"role": ..., "content": ...}}; '
            f"found {'an empty list' if value == [] else kind_of(value)}"
        )
    messages = []
    for number, message in enumerate(value):
        here = f"{at}: {key}[{number}]"
        if not isinstance(message, dict):
            raise UserError(f"{here}: must be an object; found {kind_of(message)}")
        messages.append({name: string(message, name, here) for name in ("role", "content")})
    return messages


def kind_of(value: Any) -> str:
    names = {type(None): "null", bool: "true/false", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
