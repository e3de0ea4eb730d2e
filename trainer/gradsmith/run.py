"""A run's folder: everything that is needed to trust the run again.

```
runs/NAME/
  recipe.yaml        the recipe as resolved, defaults filled in
  provenance.json    versions, machine, git state, command line, seeds
  metrics.jsonl      a line for each logged step
  data/              what `prepare` made (gradsmith.data.prepare)
  checkpoints/       step-000100/, ... (gradsmith.training.checkpoint)
  evaluation.json    what `evaluate` found
  report.html
  logs/              what the libraries below us print, a file for each rank
  lock               held while a process writes here
```
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .reading import check, parse_json, read_text
from .reading import read_json as read_json
from .recipe import Recipe, load_recipe

LIBRARIES = (
    "gradsmith", "torch", "triton", "numpy", "deepspeed", "transformers", "peft", "tokenizers",
    "datasets", "safetensors", "pyarrow", "pydantic",
)  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


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
            return load_recipe(self.recipe_path)
        except UserError as error:
            raise UserError(
                f"{error}\nThis is the recipe that the run keeps, damaged or of another version; "
                "start over with --fresh, or choose another output=..."
            ) from None

    def write_recipe(self, recipe: Recipe) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True)
        self.recipe_path.write_text(text, encoding="utf-8")

    def write_provenance(self, **more: Any) -> None:
        write_json(self.provenance_path, {**provenance(), **more})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the kernel lets go of it when the process dies.

        Raises:
            UserError: another process is writing to the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+") as file:
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
            yield

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
        scratch = self.metrics_path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        scratch.replace(self.metrics_path)


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
