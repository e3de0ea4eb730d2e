"""Reading what somebody else may have written: recipes, JSON, tables of hosts, models' folders.

All of it comes in here. What is wrong with the content is a UserError of one line that names the
file and the key or the line, so nothing in a file can end a command with a stack trace.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import RunError, UserError, is_out_of_memory, one_line


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            told = f"not UTF-8 text ({error.reason} at byte {error.start})"
        else:  # a ValueError: a NUL in the path
            told = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UserError(f"{_shown(path)}: {told}") from None


def parse_json(text: str, where: str) -> Any:
    """Plain data from JSON text.

    Raises:
        UserError: it is not JSON, or holds a number of thousands of digits, or of brackets.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        place = f"{error.msg} at {line}column {error.colno}"
        raise UserError(f"{where}: not readable as JSON: {place}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSON: {one_line(error)}") from None


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2 and every tool that users know: 1.1 reads 3e-4 as text, 010 as 8 and
    1:30 as 90, and 2026-01-01 as a date."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # yaml's own, but for these:

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            problem = None
            if key_node.tag == "tag:yaml.org,2002:merge":
                problem = "merge keys (<<) are refused: write the keys out"
            else:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    problem = "a key must be a name, not a list or a mapping"
                elif key in seen:
                    problem = f'the key "{key}" stands there twice'
                else:
                    seen.add(key)
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > 100:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text, 0) if re.match("[-+]?0[xo]", text) else int(text)


_NUMBERS = ("int", "float", "timestamp")
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [
        (tag, pattern) for tag, pattern in _resolvers if tag.rpartition(":")[2] not in _NUMBERS
    ]
for _tag, _pattern in (
    ("int", r"[-+]?(0|[1-9][\d_]*|0\d[\d_]*|0o[0-7]+|0x[\da-fA-F]+)"),
    ("float", r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|(\d[\d_]*|\.\d+)([eE][-+]?\d+)|\.\d+)"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), list("-+0123456789.")
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data from YAML text.

    Raises:
        UserError: it is not YAML, or names a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        told = one_line(getattr(error, "problem", None) or error)
        raise UserError(f"{where}: not readable as YAML: {told}{place}") from None
    except Exception as error:  # a number of 5000 digits, 1000 brackets, a 13th month
        raise UserError(f"{where}: not readable as YAML: {one_line(error)}") from None


def read_json(path: Path, shape: Any = None) -> Any:
    """A JSON file as plain data.

    Args:
        path: the file.
        shape: what it must look like, one of `gradsmith.shapes`; None takes anything.

    Raises:
        UserError: it cannot be read, or a key of it is missing or of another type.
    """
    value = parse_json(read_text(path), str(path))
    return value if shape is None else check(value, shape, str(path))


def check(value: Any, shape: Any, where: str) -> Any:
    """Returns `value`, plain data, if it has that shape.

    Raises:
        UserError: naming the first key that does not fit, what was found and what is allowed.
    """
    from pydantic import ValidationError

    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        said = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
        found = "" if problem["type"] == "missing" else f"found {describe(problem['input'])}; "
        raise UserError(f"{where}: {f'{key}: ' if key else ''}{found}{said}") from None
    return value


@functools.cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


@contextlib.contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """A library reads a stranger's files: whatever it raises is the fault of what is in them.

    Args:
        where: the key or the file, for the message.
        what: what failed, as in "no model can be read there".
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{where}: {what}: {one_line(error)}") from None


def describe(value: Any) -> str:
    """What was found, in words: "text ("8")", "a list ([1, 2])", cut to a line."""
    if value is None:
        return "nothing"
    names: dict[type, str] = {
        bool: "true/false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping",
        list: "a list",
    }
    try:
        shown = json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):  # thousands of digits or of brackets
        shown = "too long to show"
    kind = names.get(type(value), "a value")
    return f"{kind} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


def _shown(path: Path) -> str:
    """A path in a message: a long one cut, no control characters."""
    return one_line(str(path), 200)
