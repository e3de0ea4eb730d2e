"""Documents from files, folders, globs, the standard library and Hugging Face datasets.

Everything is read as a stream, in sorted order. Files that the user names must be right: what
cannot be read is an error that names the file and the line, row or byte, never a silent drop.
"""

from __future__ import annotations

import ast
import fnmatch
import glob
import hashlib
import io
import os
import sys
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean, one_line
from ..files import OurFolders, file_entry
from ..hub import hub_name
from ..reading import parse_json, reading
from ..recipe import TextData as Data
from ..recipe import TextSource as Source
from .chat import docstring_pairs, prompt_of
from .example import Example, Ledger, Messages, content_digest

SUFFIXES = {"text": "", "jsonl": ".jsonl", "parquet": ".parquet"}
SMALLEST_BLOCK = 1024  # bytes; see `_blocks`
DATASET_KINDS = ("text", "csv", "json", "parquet", "arrow")
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}
STDLIB_TESTS = {"test", "tests", "idle_test"}


def check_sources(data: Data, log: Callable[[str], None] | None = None) -> None:
    """What can be known without reading: the task goes with the sources, and they exist.

    Args:
        data: what the recipe says.
        log: is told which of our own folders among the sources are left out.

    Raises:
        UserError: naming the key.
    """
    for number, source in enumerate(data.sources):
        where = f"data.sources.{number}"
        if data.task == "chat" and source.kind == "text":
            raise UserError(
                f"{where}.kind: text has no questions and answers; task chat takes jsonl, parquet "
                "and hf_dataset (with prompt and response, or messages) and python_stdlib"
            )
        if data.task == "language_modeling":
            for key in ("prompt", "messages"):
                if getattr(source, key) is not None:
                    raise UserError(
                        f"{where}.{key}: goes with data.task chat; the task is language_modeling, "
                        "which reads the key that `text` names"
                    )
        if source.kind in SUFFIXES:
            _, *left_out = _find(source, where)
            whys = ("since gradsmith wrote it", "since links to folders are not followed")
            for why, folders in zip(whys, left_out, strict=True):
                if folders and log:
                    names = ", ".join(str(folder) for folder in sorted(folders))
                    log(f"{where}.path: left out, {why}: {names}")
        elif source.kind == "hf_dataset":
            _check_dataset(Path(str(source.path)), where)


def read(data: Data, ledger: Ledger) -> Iterator[Example]:
    """All documents of all sources.

    Raises:
        UserError: naming the file and the line, row or byte.
    """
    for number, source in enumerate(data.sources):
        documents = _documents(source, data.task, f"data.sources.{number}", ledger)
        for document in islice(_readable(documents), source.limit):
            try:
                document.digest()
                if isinstance(document.content, list) and document.group is None:
                    # conversations with one prompt stay together: no question is on two sides
                    document.group = content_digest(prompt_of(document.messages))
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{document.source}: the text holds half of a surrogate pair "
                    f"({error.object[error.start]!r}), which is no character"
                ) from None
            yield document


def _readable(documents: Iterator[Example]) -> Iterator[Example]:
    try:
        yield from documents
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _documents(source: Source, task: str, where: str, ledger: Ledger) -> Iterator[Example]:
    name = _name(source)
    if source.kind == "python_stdlib":
        yield from _python_stdlib(task, ledger)
        return
    if source.kind == "text":
        documents = _texts(source, where)
    else:
        documents = (_document(row, at, source, task) for row, at in _rows(source, task, where))
    for document in documents:
        ledger.add("read", "in", source=name)
        ledger.add("read", "kept", source=name)
        yield document


def _name(source: Source) -> str:
    return source.kind if source.path is None else f"{source.kind} {source.path}"


# -------------------------------------------------------------------------------------- files


def files_of(source: Source, where: str) -> list[Path]:
    """The files that a path means: itself, all of a folder's (recursively), or a glob's matches.

    What is in a run's folder, or in another that gradsmith made, is never among them: a run that
    read what `prepare` wrote would train on the text that it holds out.

    Raises:
        UserError: there are none, or the path is within a folder of ours.
    """
    return _find(source, where)[0]


def _find(source: Source, where: str) -> tuple[list[Path], set[Path], set[Path]]:
    """The files, the folders of ours that were left out, and the linked ones that were."""
    assert source.path is not None
    suffix = SUFFIXES[source.kind]
    path, around = Path(source.path), OurFolders().around
    fixed = path
    while glob.has_magic(str(fixed)) and not fixed.exists():
        fixed = fixed.parent
    _check_not_ours(fixed, around, where)
    if path.is_file():
        return [path], set(), set()
    linked: set[Path] = set()
    if path.is_dir():
        found = list(_walk(path, suffix, linked))
        what = f"files{f' that end in {suffix}' if suffix else ''} in the folder {source.path}"
    else:
        start = Path(path.anchor)
        matches = _matches(start, path.relative_to(start).parts, linked)
        found = [file for file in dict.fromkeys(matches) if file.is_file()]
        is_glob = glob.has_magic(str(path))
        what = f"files match {source.path}" if is_glob else f"file or folder {source.path}"
    resolved = cache(Path.resolve)  # of folders, in which there are many files
    kept, ours = [], set()
    for file in found:
        folder = around(file.resolve().parent if file.is_symlink() else resolved(file.parent))
        if folder is None:
            kept.append(file)
        else:
            ours.add(folder)
    if not kept:
        besides = f" besides those that gradsmith wrote to {min(ours)}" if ours else ""
        raise UserError(f"{where}.path: no {what}{besides} (from {Path.cwd()})")
    return sorted(kept), ours, linked


def _walk(root: Path, suffix: str, linked: set[Path]) -> Iterator[Path]:
    """The files below a folder that end in `suffix`; hidden ones left out."""
    for folder in _folders(root, linked):
        for path in _inside(folder):
            if path.name.endswith(suffix) and not path.name.startswith(".") and path.is_file():
                yield path


def _folders(root: Path, linked: set[Path]) -> Iterator[Path]:
    """A folder and all below it. Hidden ones are left out, and linked ones, which may lead in
    circles or out of what was named; those are noted."""
    yield root
    for path in _inside(root):
        if path.name.startswith(".") or not path.is_dir():
            continue
        if path.is_symlink():
            linked.add(path)
        else:
            yield from _folders(path, linked)


def _matches(folder: Path, parts: Sequence[str], linked: set[Path]) -> Iterator[Path]:
    """What a glob's parts match below a folder, by the same rules: `**` follows no links."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for below in _folders(folder, linked):
            yield from _matches(below, rest or ("*",), linked)
    elif glob.has_magic(first):
        for path in _inside(folder) if folder.is_dir() else ():
            hidden = path.name.startswith(".") and not first.startswith(".")
            if not hidden and fnmatch.fnmatchcase(path.name, first):
                yield from _matches(path, rest, linked)
    elif (folder / first).exists():
        yield from _matches(folder / first, rest, linked)


def _inside(folder: Path) -> list[Path]:
    """
    Raises:
        UserError: the folder cannot be read: nothing of it is left out in silence.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def _check_not_ours(path: Path, around: Callable[[Path], Path | None], where: str) -> None:
    place = path.resolve()
    folder = around(place if place.is_dir() else place.parent)
    if folder is not None:
        raise UserError(
            f"{where}.path: {path} lies in {folder}, which gradsmith wrote: held-out text of a run "
            "is in it. Sources are files of your own; copy what you want to use out of there"
        )


def _check_dataset(root: Path, where: str) -> None:
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
            _check_not_ours(Path(folder), around, where)


def fingerprint(source: Source, where: str) -> dict[str, Any]:
    """What identifies a source's content: its files' names, sizes and SHA-256 as one hash.

    A dataset from the hub has no files here and is identified by its name.
    """
    if source.kind == "python_stdlib":
        root: Path | None = _stdlib()
        files = [file for file in _stdlib_files() if not _is_test(file)]
    elif source.kind == "hf_dataset":
        assert source.path is not None
        root = Path(source.path)
        files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else []
    else:
        root, files = None, files_of(source, where)
    whole, size = hashlib.sha256(), 0
    for file in files:
        entry = file_entry(file)
        size += entry["bytes"]
        name = file.relative_to(root) if root else file.name
        whole.update(f"{name}\0{entry['sha256']}\n".encode())
    return {
        "kind": source.kind,
        "path": source.path,
        "files": len(files),
        "bytes": size,
        "sha256": whole.hexdigest(),
    }


def decode(data: bytes, file: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text: {error.reason} at byte {offset + error.start} "
            f"(0x{error.object[error.start]:02x}). Convert the file, or name the files to read "
            "with a glob"
        ) from None


def _lines(file: Path) -> Iterator[str]:
    """Decoded lines with their ends; a byte order mark is taken off."""
    offset = 0
    with file.open("rb") as handle:
        for line in handle:
            text = decode(line, file, offset)
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(line)


# --------------------------------------------------------------------------------------- text


def _texts(source: Source, where: str) -> Iterator[Example]:
    """A folder's or glob's files are a document each; one named file is a corpus, in blocks."""
    assert source.path is not None
    files = files_of(source, where)
    if Path(source.path).is_file():
        for number, block in enumerate(_blocks(_lines(files[0]))):
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


# --------------------------------------------------------------------------------------- rows


def _columns(source: Source, task: str) -> list[str]:
    if task == "language_modeling":
        return [source.text]
    if source.prompt is not None and source.response is not None:
        return [source.prompt, source.response]
    return [source.messages or "messages"]


def _rows(source: Source, task: str, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, where it stands) of jsonl, parquet and hf_dataset."""
    if source.kind == "jsonl":
        for file in files_of(source, where):
            yield from _jsonl_rows(file)
    elif source.kind == "parquet":
        for file in files_of(source, where):
            yield from _parquet_rows(file, _columns(source, task))
    else:
        yield from _dataset_rows(source, where)


def _jsonl_rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        at = f"{file}:{number}"
        row = parse_json(line, at)
        if not isinstance(row, dict):
            raise UserError(f"{at}: each line is a JSON object; found {_kind(row)}")
        yield row, at


def _parquet_rows(file: Path, columns: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    import pyarrow.parquet

    with reading(str(file), "not readable as Parquet"):
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        for column in columns:
            _value(dict.fromkeys(names), column, str(file))
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
        else:
            builder = datasets.load_dataset_builder(name)
            _check_builder(builder, path.resolve() if path.is_dir() else None, name, where)
            found = builder.as_streaming_dataset(split=source.split)
        for number, row in enumerate(found, 1):
            yield row, f"{source.path}:{source.split}:row {number}"


def _check_builder(builder: Any, folder: Path | None, name: str, where: str) -> None:
    """
    Raises:
        UserError: a dataset's card names files that are not its own, or files that are read by
            other code than that for text, CSV, JSON, Parquet and Arrow.
    """
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in DATASET_KINDS:
        raise UserError(
            f"{where}.path: {name} is read as {kind}; allowed are {', '.join(DATASET_KINDS)}"
        )
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if folder is None:
                own = file.startswith(f"hf://datasets/{name}@")
            else:
                own = "://" not in file and Path(file).resolve().is_relative_to(folder)
            if not own:
                raise UserError(
                    f"{where}.path: {name} names a file that is not its own: {one_line(file)}"
                )


def _document(row: dict[str, Any], at: str, source: Source, task: str) -> Example:
    if task == "language_modeling":
        return Example(at, _string(row, source.text, at))
    if source.prompt is not None and source.response is not None:
        messages = [
            {"role": "user", "content": _string(row, source.prompt, at)},
            {"role": "assistant", "content": _string(row, source.response, at)},
        ]
    else:
        messages = _messages(row, source.messages or "messages", at)
    return Example(at, messages)


def _value(row: dict[str, Any], key: str, at: str) -> Any:
    if key not in row:
        keys = [str(name) for name in row]
        found = f"found {', '.join(keys)}" if keys else "found none"
        raise UserError(f'{at}: no key "{key}"; {found}.{did_you_mean(key, keys)}')
    return row[key]


def _string(row: dict[str, Any], key: str, at: str) -> str:
    value = _value(row, key, at)
    if not isinstance(value, str):
        raise UserError(f'{at}: "{key}" must be text; found {_kind(value)}')
    return value


def _messages(row: dict[str, Any], key: str, at: str) -> Messages:
    value = _value(row, key, at)
    if not isinstance(value, list) or not value:
        raise UserError(
            f'{at}: "{key}" must be a list of {{"role": ..., "content": ...}}; '
            f"found {'an empty list' if value == [] else _kind(value)}"
        )
    messages = []
    for number, message in enumerate(value):
        here = f"{at}: {key}[{number}]"
        if not isinstance(message, dict):
            raise UserError(f"{here}: must be an object; found {_kind(message)}")
        messages.append({name: _string(message, name, here) for name in ("role", "content")})
    return messages


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true/false", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


# ------------------------------------------------------------------------------ python_stdlib


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> list[Path]:
    root, files = _stdlib(), []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_LEFT_OUT)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise UserError(f"data.sources: python_stdlib: no .py files in {root}")
    return files


def _is_test(file: Path) -> bool:
    return not STDLIB_TESTS.isdisjoint(file.relative_to(_stdlib()).parts)


def _python_stdlib(task: str, ledger: Ledger) -> Iterator[Example]:
    """The running Python's own modules, or their function -> docstring pairs."""
    root, name = _stdlib(), "python_stdlib"
    for file in _stdlib_files():
        ledger.add("read", "in", source=name)
        text, reason = "", "test"
        tree: ast.Module | None = None
        if not _is_test(file):
            text, tree, reason = _parse(file)
        if tree is None:
            ledger.add("read", "dropped", reason=reason, source=name)
            continue
        ledger.add("read", "kept", source=name)
        document = Example(f"{name}:{file.relative_to(root).as_posix()}", text)
        if task == "language_modeling":
            yield document
        else:
            document.group = document.digest()
            yield from docstring_pairs(tree, document, ledger)


def _parse(file: Path) -> tuple[str, ast.Module | None, str]:
    """(text, syntax tree or None, why there is none)."""
    data = file.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = io.IncrementalNewlineDecoder(None, True).decode(data.decode(encoding), final=True)
        text.encode("utf-8")
    except (SyntaxError, UnicodeError):
        return "", None, "does not decode"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return text, ast.parse(text), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "", None, f"does not parse as Python {sys.version_info[0]}.{sys.version_info[1]}"
