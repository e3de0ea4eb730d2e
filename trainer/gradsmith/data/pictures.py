"""Pictures with a class each: in folders, tar files, and scikit-learn's digits."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import UserError
from ..reading import reading
from ..recipe import Source
from .files import PICTURES, files_of
from .pixels import png

LARGEST_FILE = 1 << 28  # bytes of one picture in a tar
KINDS = ("image_folder", "tar", "digits")

Found = Iterator[tuple[bytes, str, str]]
"""(file, class, where it stands)"""
Leave = Callable[[str], None]
"""Is told why something in a source is left out."""


def pictures(source: Source, where: str, leave: Leave) -> Found:
    """The pictures of a source in the order of their names, or of their places in a tar.

    Raises:
        UserError: there are none, one has no class, or a file cannot be read.
    """
    if source.kind == "digits":
        yield from _digits()
    elif source.kind == "tar":
        for file in files_of(source, where):
            yield from _tar(file, leave)
    else:
        yield from _folder(source, where)


def _folder(source: Source, where: str) -> Found:
    root = Path(str(source.path))
    for file in files_of(source, where):
        if file.parent == root or file == root:
            raise UserError(
                f"{where}.path: {file} lies in no class's folder: a picture's class is the folder "
                f"that it lies in, as {root if root.is_dir() else root.parent}/CLASS/{file.name}"
            )
        yield file.read_bytes(), file.parent.name, str(file)


def _tar(file: Path, leave: Leave) -> Found:
    """A tar's pictures; nothing is unpacked to the disk. The class of `a/cat/7.jpg` is `cat`; that
    of `7.jpg` is the text of `7.cls`, its neighbour, as WebDataset has it."""
    with reading(str(file), "not readable as tar"), tarfile.open(file, "r|*") as archive:
        yield from _samples(file, _members(archive, leave))


def _members(archive: tarfile.TarFile, leave: Leave) -> Iterator[tuple[PurePosixPath, bytes]]:
    for member in archive:
        name = PurePosixPath(member.name)
        suffix = name.suffix.lower()
        if member.isdir():
            continue
        if not member.isfile():
            leave("in the tar: a link or a device")
        elif name.is_absolute() or ".." in name.parts:
            leave("in the tar: a name that leads out of it")
        elif suffix not in (*PICTURES, ".cls") or name.name.startswith("."):
            leave("in the tar: no picture by its name")
        elif member.size > LARGEST_FILE:
            leave(f"in the tar: a file of more than {LARGEST_FILE >> 20} MiB")
        else:
            content = archive.extractfile(member)
            assert content is not None
            yield name, content.read()


def _samples(file: Path, members: Iterator[tuple[PurePosixPath, bytes]]) -> Found:
    """Joins each picture with the .cls of its name, which stands right before or after it."""
    waiting: dict[str, tuple[PurePosixPath, bytes]] = {}  # "picture", "class": of one key
    key: PurePosixPath | None = None

    def complete() -> Found:
        if "picture" not in waiting:
            if waiting:
                raise UserError(f"{file}: {waiting['class'][0]}: a class without its picture")
            return
        name, data = waiting["picture"]
        if "class" in waiting:
            label = waiting["class"][1].decode("utf-8", "replace").strip()
        else:
            label = name.parent.name
        if not label:
            raise UserError(
                f"{file}: {name}: no class: it lies in no folder, and has no "
                f"{name.with_suffix('.cls').name} beside it"
            )
        yield data, label, f"{file}:{name}"

    for name, data in members:
        part = "class" if name.suffix == ".cls" else "picture"
        own = name.with_suffix("")
        if own != key or part in waiting:
            yield from complete()
            waiting, key = {}, own
        waiting[part] = name, data
    yield from complete()


def digits_file() -> Path:
    """Where scikit-learn keeps its handwritten digits.

    Raises:
        UserError: it is not installed.
    """
    try:
        import sklearn.datasets
    except ImportError:
        raise UserError(
            "data.sources: the digits are scikit-learn's, which is not installed: "
            "pip install 'gradsmith[table]'"
        ) from None
    return Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"


def _digits() -> Found:
    """1,797 handwritten digits of 8 x 8 pixels with 17 shades (UCI, Alpaydin and Kaynak 1998)."""
    digits_file()
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    for number, (shades, digit) in enumerate(zip(found.images, found.target, strict=True)):
        pixels = np.round(shades * (255 / 16)).astype(np.uint8)
        yield png(pixels), str(digit), f"digits:{number}"
