"""The ways in which a command ends other than well; __main__.py turns them into exit codes."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """The user's input was wrong (exit code 2).

    The message says what is wrong and where (a dotted recipe key, a file, a row), what was
    found, and what is allowed.
    """


class RunError(Exception):
    """The input was right but the run failed (exit code 1)."""


class Stopped(RunError):  # noqa: N818  # it is no fault
    """A signal asked for the end (exit code 128 + its number, as a shell has it)."""

    def __init__(self, message: str, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}{message}")
        self.number = number


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """' Did you mean "x"?' for the nearest allowed name, or an empty string."""
    names = list(allowed)
    near = [other for other in names if other.lower() == name.lower()]
    near += difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


def one_line(error: object, limit: int = 300) -> str:
    """What an error (or a text) says, in one line that a terminal can show."""
    text = str(error)[: 8 * limit]
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, KeyError | RecursionError | MemoryError | ZeroDivisionError):
        text = f"{type(error).__name__}: {text}" if text != type(error).__name__ else text
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is out; torch says so with a RuntimeError on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


def system_error(error: OSError) -> str:
    """What the system says, and of which file: "run/metrics.jsonl: No space left on device"."""
    told = error.strerror or one_line(error)
    return told if error.filename is None else f"{one_line(error.filename)}: {told}"
