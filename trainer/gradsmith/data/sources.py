"""Documents from files, folders, globs, the standard library and Hugging Face datasets.

Everything is read as a stream, in sorted order. Files that the user names must be right: what
cannot be read is an error that names the file and the line, row or byte, never a silent drop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import file_entry
from ..recipe import Data, Source
from .example import Example, Ledger
from .files import SUFFIXES, files_of, find
from .pictures import KINDS, digits_file, pictures
from .processor import Processor, processor_class
from .readers import check_dataset, rows, texts
from .stdlib import is_test, modules, read_stdlib, stdlib


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
        processor_class(data.task).check_source(source, where)
        if source.kind in SUFFIXES:
            _, *left_out = find(source, where)
            whys = ("since gradsmith wrote it", "since links to folders are not followed")
            for why, folders in zip(whys, left_out, strict=True):
                if folders and log:
                    names = ", ".join(str(folder) for folder in sorted(folders))
                    log(f"{where}.path: left out, {why}: {names}")
        elif source.kind == "hf_dataset":
            check_dataset(Path(str(source.path)), where)


def read(data: Data, ledger: Ledger) -> Iterator[Example]:
    """All documents of all sources.

    Raises:
        UserError: naming the file and the line, row or byte.
    """
    kind = processor_class(data.task)
    for number, source in enumerate(data.sources):
        examples = _examples(source, data.task, f"data.sources.{number}", ledger)
        for document in islice(_readable(examples), source.limit):
            try:
                document.digest()
                if document.group is None:
                    document.group = kind.group_of(document)
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


def _examples(source: Source, task: str, where: str, ledger: Ledger) -> Iterator[Example]:
    name = _name(source)
    if source.kind == "python_stdlib":
        yield from read_stdlib(task, ledger)
        return
    if source.kind == "text":
        examples = texts(source, where)
    elif source.kind in KINDS:
        kind = processor_class(task)
        examples = _pictured(source, kind, where, name, ledger)
    else:
        kind = processor_class(task)
        found = rows(source, kind.reads(source), where)
        examples = (kind.example(row, at, source) for row, at in found)
    for example in examples:
        ledger.add("read", "in", source=name)
        ledger.add("read", "kept", source=name)
        yield example


def _pictured(
    source: Any, kind: type[Processor], where: str, name: str, ledger: Ledger
) -> Iterator[Example]:
    def leave(reason: str) -> None:
        ledger.add("read", "in", source=name)
        ledger.add("read", "dropped", source=name, reason=reason)

    for file, label, at in pictures(source, where, leave):
        yield kind.example({source.image: file, source.label: label}, at, source)


def _name(source: Source) -> str:
    return source.kind if source.path is None else f"{source.kind} {source.path}"


def fingerprint(source: Source, where: str) -> dict[str, Any]:
    """What identifies a source's content: its files' names, sizes and SHA-256 as one hash.

    A dataset from the hub, or one that ships with scikit-learn, has no files here and is identified
    by its name.
    """
    if source.kind == "sql":
        from . import sql  # Arrow, which others need not load

        return sql.fingerprint(source, where)
    if source.kind == "python_stdlib":
        root: Path | None = stdlib()
        files = [file for file in modules() if not is_test(file)]
    elif source.kind == "digits":
        root, files = digits_file().parent, [digits_file()]
    elif source.kind == "hf_dataset":
        assert source.path is not None
        root = Path(source.path)
        files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else []
    elif source.kind == "sklearn":
        root, files = None, []
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
