"""Files and folders: what a path in a recipe means, what is ours, and how it is replaced.

Whatever the trainer writes over or deletes goes through here. Two rules hold for all callers:

- A file or folder is replaced whole: it is written beside its place, flushed to disk and renamed.
  After a crash the old one is there or the new one, never half of one.
- Only what is ours is deleted. Each folder that we make carries a marker; a folder without one is
  somebody else's, whatever its name is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

from .errors import UserError
from .reading import read_json as read_json

MARKER = ".gradsmith"
SCRATCH = ".gradsmith-tmp"  # how the names of half-written files and folders end


def expand(path: str) -> str:
    """A recipe's path with `~`, `~user`, `$NAME` and `${NAME}` put in.

    Raises:
        ValueError: it is empty, or names a user or a variable that is not there.
    """
    if not path.strip():
        raise ValueError("the path is empty")
    if "\0" in path:
        raise ValueError("a path holds no NUL character")
    for name in re.findall(r"\$(\w+|\{[^}]*\})", path):
        if name.strip("{}") not in os.environ:
            raise ValueError(f"${name} in {path} is not set in the environment")
    found = os.path.expanduser(os.path.expandvars(path))
    if found.startswith("~"):
        raise ValueError(f"{path}: no such user; a folder of that name is ./{path}")
    return found


# -------------------------------------------------------------------------------------- marker


def mark(folder: Path, what: str) -> None:
    """Says that a folder is ours. `what` is run, data, base or checkpoint."""
    write_json(folder / MARKER, {"gradsmith": what})


def is_ours(folder: Path) -> bool:
    """Whether gradsmith made a folder: by its marker, or by what versions before it wrote there."""
    kinds = ("run", "data", "base", "checkpoint")
    if _value(folder / MARKER, "gradsmith") in kinds:
        return True
    files = _value(folder / "manifest.json", "files")  # a checkpoint's
    if isinstance(files, dict) and "state.json" in files:
        return True
    return is_data(folder) or is_data(folder / "data") or _is_older_run(folder)


def is_data(folder: Path) -> bool:
    """Whether `prepare` made a folder."""
    return str(_value(folder / "manifest.json", "format")).startswith("gradsmith-data-")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, of this version or of one before the marker."""
    return _value(folder / MARKER, "gradsmith") == "run" or _is_older_run(folder)


def _is_older_run(folder: Path) -> bool:
    versions = _value(folder / "provenance.json", "versions")
    return isinstance(versions, dict) and "gradsmith" in versions


def _value(path: Path, key: str) -> Any:
    """What a JSON object has under a key; None for whatever else there may be."""
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return tree.get(key) if isinstance(tree, dict) else None


def check_apart(recipe: Path, output: Path) -> None:
    """
    Raises:
        UserError: a recipe's file lies in its run's folder, and is not the run's own copy.
    """
    file, place = recipe.resolve(), output.resolve()
    own = file == place / "recipe.yaml" and is_run(place)
    if place in file.parents and not own:
        raise UserError(
            f"output: {output} holds the recipe {recipe}, and a run's folder is gradsmith's alone; "
            "give it a folder of its own, for example runs/NAME"
        )


class OurFolders:
    """Which folders lie within one of ours, for many that lie close together."""

    def __init__(self) -> None:
        self.around = cache(self._outermost)

    def _outermost(self, folder: Path) -> Path | None:
        """The outermost of our folders that a folder (no link) is in, or is."""
        parent = folder.parent
        above = self.around(parent) if parent != folder else None
        return above or (folder if is_ours(folder) else None)


# ------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that takes the place of `path` at the end of the block; on an error nothing changes.

    The half-written file has a name that nobody else has, so two writers do not mix.
    """
    encoding = None if "b" in mode else "utf-8"
    handle, name = tempfile.mkstemp(SCRATCH, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            os.fchmod(handle, 0o666 & ~umask())  # mkstemp's is for one user alone
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(name, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@cache
def umask() -> int:
    """The bits that new files and folders of this process lack."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    with replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def scratch_of(final: Path) -> Path:
    """Where a folder of ours is written until it is whole. The caller holds the run's lock."""
    return final.with_name(f".{final.name}{SCRATCH}")


def new_scratch(final: Path, what: str) -> Path:
    """An empty folder, marked, that becomes `final` by `publish`; a crash's leftover is dropped."""
    scratch = scratch_of(final)
    remove(scratch)
    scratch.mkdir(parents=True)
    mark(scratch, what)
    return scratch


@contextlib.contextmanager
def building(final: Path, what: str) -> Iterator[Path]:
    """A scratch folder that takes its place at the end of the block, or goes on an error."""
    scratch = new_scratch(final, what)
    try:
        yield scratch
        publish(scratch, final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextlib.contextmanager
def making(out: Path) -> Iterator[Path]:
    """A scratch folder, with a name that nobody else has, that becomes the user's folder `out`,
    which is not there or empty; on an error it goes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(SCRATCH, f".{out.name}.", out.parent))
    try:
        scratch.chmod(0o777 & ~umask())  # mkdtemp's is for one user alone
        yield scratch
        if out.exists():
            out.rmdir()
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def publish(scratch: Path, final: Path) -> None:
    """Puts a folder in its place; one of ours that is there already goes.

    Raises:
        UserError: what is there is not ours; it is left as it is.
    """
    if final.exists() or final.is_symlink():
        old = final.with_name(f".{final.name}.old{SCRATCH}")
        remove(old)
        check_ours(final)
        final.rename(old)
        scratch.rename(final)
        remove(old)
    else:
        scratch.rename(final)
    sync(final.parent)


def check_ours(folder: Path) -> None:
    """
    Raises:
        UserError: a folder (or file) is there that gradsmith did not make.
    """
    if not folder.is_symlink() and folder.is_dir():
        if is_ours(folder) or folder.name.endswith(SCRATCH) or not any(folder.iterdir()):
            return
        inside = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
        raise UserError(
            f"{folder}: gradsmith did not make this folder, so it is left as it is (in it: "
            f"{shown}); move it, or choose another output=..."
        )
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: gradsmith did not make this; move it, or choose another output")


def remove(folder: Path) -> None:
    """Deletes a folder of ours, if it is there; half of one never stays behind its name.

    Raises:
        UserError: it is not ours.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    check_ours(folder)
    if not folder.name.endswith(SCRATCH):
        doomed = folder.with_name(f".{folder.name}.old{SCRATCH}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        folder = doomed
    shutil.rmtree(folder, ignore_errors=True)


_hashed: dict[tuple[int, ...], str] = {}  # a file as it was -> its SHA-256


def sha256(path: Path) -> str:
    """A file's SHA-256. Read once in a process, and again when its size or a time has changed."""
    identity = _identity(path)
    if identity not in _hashed:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - max(identity[-2:]) < 1e8:  # the clock may not show the next write
            return digest
        _hashed[identity] = digest
    return _hashed[identity]


def sha256_is(path: Path, digest: str) -> None:
    """Notes what another process has found, so that this one need not read the file."""
    _hashed[_identity(path)] = digest


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_entry(path: Path) -> dict[str, Any]:
    """A file's {bytes, sha256}."""
    try:
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def files_in(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> {bytes, sha256} of those of the files that are there."""
    return {name: file_entry(folder / name) for name in names if (folder / name).is_file()}


def fingerprint_of(files: dict[str, dict[str, Any]]) -> str:
    """One hash over files: equal means the same names and the same bytes."""
    digests = {path: entry["sha256"] for path, entry in files.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
