"""The two ways a command ends other than well; cli.py turns them into exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input was wrong (exit code 2).

    The message says what is wrong and where (a dotted recipe key, a file, a row), what was
    found, and what is allowed.
    """


class RunError(Exception):
    """The input was right but the run failed (exit code 1)."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """' Did you mean "x"?' for the nearest allowed name, or an empty string."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
