"""What people see in the terminal: rich where there is one, plain lines where there is not.

Of several processes only rank 0 prints.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from .blocks import Metric

PLAIN_EVERY = 10.0  # seconds between two plain progress lines

# Where people read, while `quiet` has taken over standard output and error.
_stream: TextIO | None = None
_errors: TextIO | None = None


def is_main() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Sends standard output and error to `log`, except for what this module prints.

    On the level of file descriptors, because what floods a terminal (DeepSpeed, gloo, compilers)
    writes from C++ and from child processes too. An exception leaves the block before it is shown,
    so error messages reach the terminal. May be nested.
    """
    global _stream, _errors
    outer, outer_errors = _stream, _errors
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        shown = os.dup(sys.stdout.fileno())  # standard error, where a command has redirected it
    except (AttributeError, OSError, ValueError):
        shown = os.dup(1)
    with (
        log.open("a") as file,
        os.fdopen(shown, "w", buffering=1) as terminal,
        os.fdopen(os.dup(2), "w", buffering=1) as errors,
    ):
        _stream, _errors = outer or terminal, outer_errors or errors
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, original in zip((1, 2), saved, strict=True):
                os.dup2(original, fd)
                os.close(original)
            _stream, _errors = outer, outer_errors


def say(text: str) -> None:
    """Prints a line of plain text (no markup)."""
    if is_main():
        Console(file=_stream, soft_wrap=True).print(text, markup=False, highlight=False)


def warn(text: str) -> None:
    """Prints a line beside the results: on standard error."""
    if is_main():
        print(text, file=_errors or sys.stderr)


def show(renderable: RenderableType) -> None:
    """Prints a rich renderable, on wide lines where nobody's window sets the width."""
    if is_main():
        console = Console(file=_stream, markup=False)
        if not console.is_terminal:
            console = Console(file=_stream, markup=False, width=160)
        console.print(renderable)


def duration(seconds: float) -> str:
    """90 -> "1:30", 3700 -> "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bytes_in_words(value: float) -> str:
    """1500000 -> "1.5 MB"."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


class TrainingProgress:
    """The progress of one training run.

    In a terminal: a live bar with loss, tokens per second and the time left. Elsewhere: a line
    at the first and the last step, and every ten seconds between.

    Args:
        name: The run's name.
        total_steps: The last step, or None for a run limited by time.
        start_step: The step from which a resumed run goes on.
        minutes: The length of a run limited by time.
        metrics: What a validation says, as the task defines it.
        unit: What speed is told in.
    """

    def __init__(
        self,
        name: str,
        total_steps: int | None,
        start_step: int = 0,
        *,
        minutes: float | None = None,
        metrics: Sequence[Metric] = (),
        unit: str = "tokens",
    ):
        if (total_steps is None) == (minutes is None):
            raise ValueError("give exactly one of total_steps and minutes")
        self._name, self._metrics, self._unit = name, metrics, unit
        self._total_steps = total_steps
        self._start_step = self._step = start_step
        self._seconds = minutes * 60 if minutes is not None else None
        self._console = Console(file=_stream, quiet=not is_main(), soft_wrap=True)
        self._rich: Progress | None = None
        self._began = self._said = time.monotonic()
        self._unsaid = ""

    def __enter__(self) -> TrainingProgress:
        self._began = time.monotonic()
        if self._console.is_terminal and is_main():
            self._rich = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[place]}", style="bold"),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._rich.add_task(
                self._name, total=1.0, place="", numbers="first step ..."
            )
            self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich:
            self._rich.stop()
        elif self._unsaid:
            self._print(self._unsaid)

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Shows one row of metrics.jsonl; `step` is the number of steps done."""
        if row.get("kind") == "validation":
            values = [
                f"{metric.words} {row[metric.name]:{metric.format}}"
                for metric in self._metrics
                if row.get(metric.name) is not None
            ]
            self.note(f"{self._place(step)}  validation {', '.join(values)}")
            return
        first = self._step == self._start_step
        self._step = step
        place, numbers = self._place(step), self._numbers(step, row)
        if self._rich:
            completed = self._share(step, row)
            self._rich.update(self._task, completed=completed, place=place, numbers=numbers)
            return
        now = time.monotonic()
        self._unsaid = f"{place}  {numbers}"
        if first or now - self._said >= PLAIN_EVERY:
            self._print(self._unsaid)
            self._said, self._unsaid = now, ""

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._unsaid:
            self._print(self._unsaid)
            self._unsaid = ""
        self._print(text)

    def _print(self, text: str) -> None:
        prefix = "" if self._rich else f"{self._name}: "
        self._console.print(prefix + text, markup=False, highlight=False)

    def _place(self, step: int) -> str:
        return f"step {step}" + (f"/{self._total_steps}" if self._total_steps else "")

    def _share(self, step: int, row: dict[str, Any]) -> float:
        if self._total_steps is not None:
            return step / self._total_steps
        assert self._seconds is not None
        return min(1.0, float(row["time"]) / self._seconds)

    def _numbers(self, step: int, row: dict[str, Any]) -> str:
        if self._total_steps is not None:
            elapsed = time.monotonic() - self._began
            done = max(1, step - self._start_step)
            left = elapsed / done * (self._total_steps - step)
        else:
            assert self._seconds is not None
            left = max(0.0, self._seconds - row["time"])
        numbers = [f"loss {row['loss']:.4f}"]
        speed = row.get(f"{self._unit}_per_second")
        if speed is not None:
            numbers.append(f"{speed:,.0f} {self._unit}/s")
        return "  ".join([*numbers, f"{duration(left)} left"])
