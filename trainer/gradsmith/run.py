"""A run's folder: everything that is needed to trust the run again.

```
runs/NAME/
  .gradsmith         the marker: this folder is gradsmith's (gradsmith.files)
  recipe.yaml        the recipe as resolved, defaults filled in
  provenance.json    versions, machine, git state, command line, seeds
  metrics.jsonl      a line for each logged step
  data/              what `prepare` made (gradsmith.data.prepare)
  base/              what `model.from` was when the run began (gradsmith.models.base)
  reference/         what the model said before training, where the loss compares with it
  checkpoints/       step-000100/, ... (gradsmith.training.checkpoint)
  evaluation.json    what `evaluate` found
  report.html
  logs/              what the libraries below us print, a file for each rank
  lock               held by the process that prepares or trains
  results.lock       held by the process that evaluates or reports
```
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import UserError
from .files import (
    MARKER,
    SCRATCH,
    check_ours,
    is_data,
    is_ours,
    is_run,
    mark,
    remove,
    replacing,
    write_json,
)
from .reading import check, parse_json, read_json, read_text
from .recipe import Recipe, read_recipe

LIBRARIES = (
    "gradsmith", "torch", "triton", "numpy", "deepspeed", "transformers", "peft", "tokenizers",
    "datasets", "safetensors", "pyarrow", "pydantic",
)  # fmt: skip


# A lock's file, and what its holder writes. A run that trains may be evaluated meanwhile.
LOCKS = {
    "run": (
        "lock",
        (
            "data",
            "base",
            "reference",
            "recipe.yaml",
            "provenance.json",
            "metrics.jsonl",
            "checkpoints",
        ),
    ),
    "results": ("results.lock", ("evaluation.json", "report.html", "launch.sbatch")),
}
LOGS = re.compile(r"rank-\d+\.log|evaluate\.log|generate\.log|slurm-.*\.out")


class Run:
    """A run's folder and the files in it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """An existing run.

        Raises:
            UserError: there is no run in that folder.
        """
        run = cls(folder)
        if not run.recipe_path.is_file():
            raise UserError(f"{folder}: no run there (a run's folder holds a recipe.yaml)")
        return run

    @property
    def recipe_path(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def evaluation_path(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def provenance_path(self) -> Path:
        return self.folder / "provenance.json"

    @property
    def report_path(self) -> Path:
        return self.folder / "report.html"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def recipe(self) -> Recipe:
        """
        Raises:
            UserError: it is damaged, or was written by another version.
        """
        try:
            return read_recipe(self.recipe_path)
        except UserError as error:
            raise UserError(
                f"{error}\nThis is the recipe that the run keeps, damaged or of another version; "
                "start over with --fresh, or choose another output=..."
            ) from None

    def write_recipe(self, recipe: Recipe) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.recipe_path) as file:
            yaml.safe_dump(recipe.dump(), file, sort_keys=False, allow_unicode=True)

    def write_provenance(self, **more: Any) -> None:
        write_json(self.provenance_path, {**provenance(), **more})

    # -------------------------------------------------------------------- whose the folder is

    def claim(self) -> None:
        """Makes the folder and marks it as ours; does nothing where it is already.

        Raises:
            UserError: it holds, under a name that we write, what gradsmith did not make.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if is_run(self.folder) and (self.folder / MARKER).is_file():
                return
            if foreign := self._foreign():
                raise UserError(
                    f"output: {self.folder}: gradsmith did not make {', '.join(foreign)} there, "
                    "and would write over it; choose a folder that is new, empty or a run's"
                )
            if not (self.folder / MARKER).is_file():  # another rank may have been faster
                mark(self.folder, "run")
        except OSError as error:
            raise UserError(
                f"output: {self.folder}: cannot be written to: {error.strerror}"
            ) from None

    def _foreign(self) -> list[str]:
        """What stands in our places in a folder that has no marker, and is not ours."""
        if is_run(self.folder):
            return []  # of a version before the marker
        lock = self.folder / "lock"
        held = lock.is_file() and re.fullmatch(rb"\d*", lock.read_bytes())
        if held and is_data(self.data):
            return []  # the same, ended before its first step

        def ours(path: Path) -> bool:
            if path.name == "lock":
                return bool(held)
            if not path.is_dir():
                return False
            inside = list(path.iterdir())
            if path.name == "logs":
                return all(LOGS.fullmatch(p.name) for p in inside)
            if path.name == "checkpoints":
                return all(p.is_dir() and is_ours(p) for p in inside)
            return not inside or is_ours(path)

        names = [name for file, written in LOCKS.values() for name in (file, *written)]
        found = [self.folder / name for name in (*names, "logs", MARKER)]
        return [
            f"{path.name}/ (with {_listing(path)})" if path.is_dir() else path.name
            for path in found
            if (path.exists() or path.is_symlink()) and not ours(path)
        ]

    @contextlib.contextmanager
    def lock(self, what: Literal["run", "results"] = "run") -> Iterator[None]:
        """Holds the folder for this process; the kernel lets go of it when the process dies.

        Args:
            what: `run` for whoever prepares or trains, `results` for whoever evaluates or reports.

        Raises:
            UserError: the folder is not ours, or another process is writing to it.
        """
        self.claim()
        name, written = LOCKS[what]
        try:
            file = (self.folder / name).open("a+")
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be opened: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"{self.folder}: in use by process {holder}; wait for it, stop it, or choose "
                    "another folder with output=..."
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            self._sweep(self.folder, written)
            if what == "run":
                self._sweep(self.checkpoints)
            yield

    def _sweep(self, folder: Path, names: tuple[str, ...] = ()) -> None:
        """Deletes what a crash has left half-written of what the lock's holder writes."""
        for path in folder.glob(f".*{SCRATCH}"):
            if not names or path.name.startswith(tuple(f".{name}." for name in names)):
                remove(path) if path.is_dir() else path.unlink(missing_ok=True)

    def begin(self, recipe: Recipe, fresh: bool | str = False) -> None:
        """Makes the folder the recipe's. The caller holds the lock.

        Args:
            recipe: what is prepared or trained there.
            fresh: forget what was trained there. A text is an order that is carried out once: the
                same text again changes nothing, so a job that is started again goes on.

        Raises:
            UserError: what was trained there is of another recipe.
        """
        from .precision import settle_precision

        self.claim()
        marker = read_json(self.folder / MARKER)
        if fresh and fresh != marker.get("fresh"):
            with self.lock("results"):
                self._clear()
            if isinstance(fresh, str):
                write_json(self.folder / MARKER, {**marker, "fresh": fresh})
        before = self.going_on()
        recipe = settle_precision(recipe, before)
        if before is not None:
            check_same_run(before, recipe, self.folder)
        self.write_recipe(recipe)

    def _clear(self) -> None:
        """Deletes what was trained, and nothing else."""
        if self.checkpoints.is_dir():
            for path in self.checkpoints.iterdir():
                check_ours(path)
            doomed = self.folder / f".checkpoints.old{SCRATCH}"
            remove(doomed)
            self.checkpoints.rename(doomed)  # at once: no half of them is ever gone on from
            remove(doomed)
        remove(self.base)
        remove(self.reference)
        for path in (self.metrics_path, self.evaluation_path, self.report_path):
            path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------ what is in it

    def going_on(self) -> Recipe | None:
        """The recipe with which training would go on here; None: it begins."""
        return self.recipe() if self.recipe_path.is_file() and self.steps() else None

    def steps(self) -> list[tuple[int, Path]]:
        """The checkpoints' folders by step, the newest first, damaged ones too."""
        found = []
        if self.checkpoints.is_dir():
            for path in self.checkpoints.iterdir():
                match = re.fullmatch(r"step-(\d+)", path.name)
                if match and path.is_dir():
                    found.append((int(match[1]), path))
        return sorted(found, reverse=True)

    def trained_on(self) -> str | None:
        """The fingerprint of the data that the checkpoints were trained on."""
        for _, path in self.steps():
            with contextlib.suppress(UserError, OSError):
                state = read_json(path / "state.json")
                if isinstance(state, dict) and isinstance(state.get("data"), str):
                    return str(state["data"])
        return None

    def append_metrics(self, row: dict[str, Any]) -> None:
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows. A last line cut off by a crash is left out; any other bad line is an error."""
        if not self.metrics_path.is_file():
            return []
        from .shapes import MetricsRow

        *lines, last = read_text(self.metrics_path).split("\n")
        rows = []
        for number, line in enumerate(lines, 1):
            where = f"{self.metrics_path}:{number}"
            rows.append(check(parse_json(line, where), MetricsRow, where))
        with contextlib.suppress(UserError):  # what stands behind the last end of a line
            rows.append(check(parse_json(last, ""), MetricsRow, ""))
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Drops the rows after `step`, so that a resumed run logs no step twice."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        with replacing(self.metrics_path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def check_same_run(before: Recipe, now: Recipe, folder: Path) -> None:
    """A run goes on only as what it was.

    Raises:
        UserError: naming the keys that differ. How long to train, what to log and keep, and how
            the work is laid out over machines may change.
    """
    free = re.compile(
        r"name|output|evaluation\..*|model\.kernels|training\.(steps|tokens|epochs|minutes"
        r"|micro_batch|activation_checkpointing|early_stopping"
        r"|(zero|log|validate|checkpoint|early_stopping)\..*)"
    )
    old, new = dict(_leaves(before.dump())), dict(_leaves(now.dump()))
    changed = [
        f"{key}: {old.get(key)} before, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not free.fullmatch(key)
    ]
    if changed:
        raise UserError(
            f"{folder}: the run there was started from another recipe:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nGo on with the old values, start over with --fresh, or choose another output=..."
        )


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree of plain data, by its dotted key."""
    if isinstance(tree, dict | list):
        for name, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(branch, f"{key}.{name}" if key else str(name))
    else:
        yield key, tree


def check_output(recipe: Recipe) -> None:
    """A run's folder is a place of its own: nothing that the user made is in it.

    Raises:
        UserError: it is, or holds, the home folder, or holds what the recipe reads.
    """
    output = Path(recipe.output)
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"output: {recipe.output}: {path} is a file")
    place = output.resolve()
    if place == Path(place.anchor) or Path("~").expanduser().resolve().is_relative_to(place):
        raise UserError(
            f"output: {recipe.output} is {place}, and a run's folder holds nothing else; give it "
            "a folder of its own, for example runs/NAME"
        )
    for key, text in recipe.paths().items():
        fixed = Path(text)
        while glob.has_magic(str(fixed)) and not fixed.exists():
            fixed = fixed.parent
        if fixed.exists() and fixed.resolve().is_relative_to(place):
            raise UserError(
                f"{key}: {text} lies in the run's own folder (output: {recipe.output}), in which "
                "gradsmith writes and deletes; move it out, or choose another output"
            )


def _listing(folder: Path) -> str:
    inside = sorted(path.name for path in folder.iterdir())
    return ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")


def provenance() -> dict[str, Any]:
    """What this process runs on: versions, machine, git state, command line."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "git": _git_state(),
    }


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the code that runs, where it runs from a checkout."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
