"""The running Python's standard library as a source: its modules, or functions with docstrings."""

from __future__ import annotations

import ast
import io
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .chat import docstring_pairs
from .example import Example, Ledger

STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


STDLIB_TESTS = {"test", "tests", "idle_test"}


def stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def modules() -> list[Path]:
    root, files = stdlib(), []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_LEFT_OUT)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise UserError(f"data.sources: python_stdlib: no .py files in {root}")
    return files


def is_test(file: Path) -> bool:
    return not STDLIB_TESTS.isdisjoint(file.relative_to(stdlib()).parts)


def read_stdlib(task: str, ledger: Ledger) -> Iterator[Example]:
    """The running Python's own modules, or their function -> docstring pairs."""
    root, name = stdlib(), "python_stdlib"
    for file in modules():
        ledger.add("read", "in", source=name)
        text, reason = "", "test"
        tree: ast.Module | None = None
        if not is_test(file):
            text, tree, reason = _parse(file)
        if tree is None:
            ledger.add("read", "dropped", reason=reason, source=name)
            continue
        ledger.add("read", "kept", source=name)
        document = Example(f"{name}:{file.relative_to(root).as_posix()}", text)
        if task == "language_modeling":
            yield document
        else:
            document.group = document.digest()
            yield from docstring_pairs(tree, document, ledger)


def _parse(file: Path) -> tuple[str, ast.Module | None, str]:
    """(text, syntax tree or None, why there is none)."""
    data = file.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = io.IncrementalNewlineDecoder(None, True).decode(data.decode(encoding), final=True)
        text.encode("utf-8")
    except (SyntaxError, UnicodeError):
        return "", None, "does not decode"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return text, ast.parse(text), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "", None, f"does not parse as Python {sys.version_info[0]}.{sys.version_info[1]}"
