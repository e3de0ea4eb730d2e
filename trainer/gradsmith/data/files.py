"""Which files a source means, and their text.

What is in a folder that gradsmith made is never among them: a run that read what `prepare` wrote
would train on the text that it holds out.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from ..errors import UserError
from ..files import OurFolders
from ..recipe import Source

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SUFFIXES = {
    "text": ("",),
    "jsonl": (".jsonl",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "image_folder": (*PICTURES, *map(str.upper, PICTURES)),
    "excel": (".xlsx", ".xlsm"),
}


def files_of(source: Source, where: str) -> list[Path]:
    """The files that a path means: itself, all of a folder's (recursively), or a glob's matches.

    What is in a run's folder, or in another that gradsmith made, is never among them: a run that
    read what `prepare` wrote would train on the text that it holds out.

    Raises:
        UserError: there are none, or the path is within a folder of ours.
    """
    return find(source, where)[0]


def find(source: Source, where: str) -> tuple[list[Path], set[Path], set[Path]]:
    """The files, the folders of ours that were left out, and the linked ones that were."""
    assert source.path is not None
    suffixes = SUFFIXES[source.kind]
    path, around = Path(source.path), OurFolders().around
    fixed = path
    while glob.has_magic(str(fixed)) and not fixed.exists():
        fixed = fixed.parent
    check_not_ours(fixed, around, where)
    if path.is_file():
        return [path], set(), set()
    linked: set[Path] = set()
    if path.is_dir():
        found = list(_walk(path, suffixes, linked))
        ends = f" that end in {' or '.join(suffixes)}" if any(suffixes) else ""
        what = f"files{ends} in the folder {source.path}"
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


def _walk(root: Path, suffixes: tuple[str, ...], linked: set[Path]) -> Iterator[Path]:
    """The files below a folder that end in one of `suffixes`; hidden ones left out."""
    for folder in _folders(root, linked):
        for path in _inside(folder):
            if path.name.endswith(suffixes) and not path.name.startswith(".") and path.is_file():
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


def check_not_ours(path: Path, around: Callable[[Path], Path | None], where: str) -> None:
    place = path.resolve()
    folder = around(place if place.is_dir() else place.parent)
    if folder is not None:
        raise UserError(
            f"{where}.path: {path} lies in {folder}, which gradsmith wrote: held-out text of a run "
            "is in it. Sources are files of your own; copy what you want to use out of there"
        )


def decode(data: bytes, file: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text: {error.reason} at byte {offset + error.start} "
            f"(0x{error.object[error.start]:02x}). Convert the file, or name the files to read "
            "with a glob"
        ) from None


def lines(file: Path) -> Iterator[str]:
    """Decoded lines with their ends; a byte order mark is taken off."""
    offset = 0
    with file.open("rb") as handle:
        for line in handle:
            text = decode(line, file, offset)
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(line)
