"""Checkpoints as folders: which are there, which are whole, which is the newest, which go.

What is in one, and how it is written, says gradsmith.training.checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import is_ours, read_json, remove, sha256
from .run import Run

FORMAT = 1


LOADED = re.compile(r"model/|optimizer-")  # files that are read because they are there


def keep_newest(run: Run, count: int, best: int = 0) -> None:
    """Deletes all but the newest `count` whole checkpoints and the one of step `best`.

    A damaged one counts for nothing: it goes with the whole ones that are older than those kept,
    and stays where it is newer. One that somebody reads (see `reading`) stays this time.
    """
    kept = 0
    for step, path in run.steps():
        if kept < count:
            kept += damage(path) is None
        elif is_ours(path) and not (step == best and damage(path) is None):
            with _alone(path) as alone:
                if alone:
                    remove(path)


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keeps a training process from deleting a checkpoint while it is read.

    Raises:
        FileNotFoundError: it is gone.
    """
    manifest = checkpoint / "manifest.json"
    with manifest.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        manifest.stat()  # it may have gone while this process waited
        yield


@contextlib.contextmanager
def _alone(checkpoint: Path) -> Iterator[bool]:
    """Whether nobody reads a checkpoint; if so, nobody begins to in the block."""
    alone = True
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((checkpoint / "manifest.json").open("r+b"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except FileNotFoundError:  # damaged, so nobody does
            pass
        yield alone


def newest_in_words(run: Run) -> str:
    """What is left when a run fails."""
    path = next((path for _, path in run.steps() if not damage(path, hashes=False)), None)
    if path is None:
        return "no checkpoint is saved yet"
    return f"saved is {path}, and the same command goes on from there"


def newest(run: Run) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written, and what newer ones lack."""
    while True:
        complaints: list[str] = []
        steps = run.steps()
        for _, path in steps:
            problem = damage(path)
            if problem is None:
                return path, complaints
            complaints.append(f"{path}: {problem}")
        if run.steps() == steps:  # none was written or deleted meanwhile
            return None, complaints


def damage(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None; without `hashes` only sizes are looked at."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}; this version reads {FORMAT}"
        listed: dict[str, Any] = manifest["files"]
        for name in listed:
            if not (checkpoint / name).resolve().is_relative_to(checkpoint.resolve()):
                return f"the manifest names a file outside of the folder: {name}"
        there = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()]
        if unknown := [p for p in there if p not in listed and LOADED.match(p)]:
            return f"{unknown[0]} is not what was written (the manifest does not list it)"
        if "state.json" not in listed or not any(p.startswith("model/") for p in listed):
            return "the manifest lists no state.json or no model"
        for name, expected in listed.items():
            if problem := file_damage(checkpoint / name, expected, hashes):
                return f"{name} {problem}"
        step = read_json(checkpoint / "state.json")["step"]
        if checkpoint.name != f"step-{step:06}":
            return f"state.json says that it is of step {step}"
    except FileNotFoundError as error:
        return f"no {Path(str(error.filename)).name}"
    except Exception as error:  # whatever a damaged file leads to, it names the damage
        return f"manifest.json or state.json cannot be read: {error}"
    return None


def file_damage(file: Path, expected: dict[str, Any], hashes: bool = True) -> str | None:
    """How a file differs from its entry in a manifest, {bytes, sha256}, or None."""
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != expected["bytes"]:
        return f"has {file.stat().st_size} bytes instead of {expected['bytes']}"
    if hashes and sha256(file) != expected["sha256"]:
        return "is not what was written (its SHA-256 differs)"
    return None
