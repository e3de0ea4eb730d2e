"""Names that may be a folder here or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from .console import warn
from .errors import UserError, did_you_mean, one_line

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def hub_name(name: str, key: str, what: str) -> str:
    """`name`, where there is no such folder: a hub name, and people are told that the hub is asked.

    Args:
        name: as the recipe or the command line has it.
        key: for the message.
        what: a model, a tokenizer, a dataset.

    Raises:
        UserError: it is not OWNER/NAME, or there is a folder OWNER here, so a path was meant.
    """
    parent = Path(name).expanduser().parent
    if not NAME.fullmatch(name) or parent.is_dir():
        names = [p.name for p in parent.glob("*")] if parent.is_dir() else []
        near = did_you_mean(Path(name).name, names)
        raise UserError(f"{key}: no folder {one_line(name)} (from {Path.cwd()}).{near}")
    warn(f"{key}: there is no folder {name} here ({Path.cwd()}): asking the hub for {what}")
    return name
