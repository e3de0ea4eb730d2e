"""`gradsmith profile`: from a file, a glob or a recipe to numbers, a page and a recipe."""

from __future__ import annotations

import glob
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ..data import sql
from ..data.example import Ledger
from ..data.files import SUFFIXES, files_of
from ..data.sources import check_sources
from ..data.table_fit import reading_of
from ..data.table_read import COMPRESSED, Report, check_columns, reporting
from ..errors import UserError
from ..files import replacing
from ..recipe import load_recipe
from ..recipe.table import TableSource
from .draw import draw
from .measure import measure
from .propose import propose
from .scan import scan

RECIPES = (".yaml", ".yml")
ALIKE = {".ndjson": "jsonl"}  # other suffixes of a kind


@dataclass
class Asked:
    """What to look at.

    Attributes:
        sources: as a recipe has them.
        title: what the page is called.
        data: the recipe's `data`, where there is one.
        broken: rows that could not be read, where and why, the first of them.
    """

    sources: list[Any]
    title: str
    data: Any = None
    broken: list[str] = field(default_factory=list)
    lost: int = 0

    @classmethod
    def of(cls, source: str, overrides: Sequence[str]) -> Asked:
        """
        Raises:
            UserError: it is no table, or a recipe of another task.
        """
        if source.lower().endswith(RECIPES):
            recipe = load_recipe(source, overrides)
            if recipe.data.task != "table":
                raise UserError(
                    f"{source}: data.task is {recipe.data.task}; a profile is of a table"
                )
            return cls(list(recipe.data.sources), recipe.name, recipe.data)
        if overrides:
            raise UserError(f"{source}: overrides go with a recipe file; this is a table")
        title = Path(source).name
        return cls([TableSource.model_validate({"kind": kind_of(source), "path": source})], title)

    def on_broken(self, at: str, why: str) -> None:
        self.lost += 1
        if len(self.broken) < 5:
            self.broken.append(f"{at}: {why}")


def kind_of(source: str) -> str:
    """The kind of source that a file's, a glob's or a folder's files are.

    Raises:
        UserError: none is known by that suffix.
    """
    tables = get_args(TableSource.model_fields["kind"].annotation)
    by_suffix = {end: kind for kind, ends in SUFFIXES.items() if kind in tables for end in ends}
    by_suffix |= ALIKE

    def of(path: Path) -> str | None:
        ends = [end.lower() for end in path.suffixes]
        if ends and ends[-1] in COMPRESSED:
            ends.pop()
        return by_suffix.get(ends[-1]) if ends else None

    path = Path(source)
    if not path.exists() and not glob.has_magic(source):
        raise UserError(f"{source}: no such file, folder or recipe (from {Path.cwd()})")
    inside = path.rglob("*") if path.is_dir() else []
    found = {of(file) for file in inside if file.is_file()} if path.is_dir() else {of(path)}
    kinds = sorted(kind for kind in found if kind)
    if len(kinds) != 1:
        what = f"files of the kinds {', '.join(kinds)}" if kinds else "no kind that is known"
        raise UserError(
            f"{source}: {what}; allowed are files, globs and folders of {', '.join(by_suffix)}, "
            f"or a recipe, {' or '.join(RECIPES)}"
        )
    return kinds[0]


def profile(
    source: str, overrides: Sequence[str] = (), target: str | None = None
) -> dict[str, Any]:
    """Everything there is to say of a table, plain data: see `measure`; and title, sources, files,
    bytes, broken and recipe (YAML, or None without a target).

    Raises:
        UserError: it cannot be read, or has no such column.
    """
    asked = Asked.of(source, overrides)
    data = asked.data
    if data is not None:
        check_sources(data)
        target = target or data.target
    files = [
        file
        for number, one in enumerate(asked.sources)
        if one.kind in SUFFIXES
        for file in files_of(one, source if data is None else f"data.sources.{number}")
    ]
    reader, stated = None, {}
    broken: Report = asked.on_broken
    if data is not None:
        reader, stated = reading_of(data), data.columns.stated()
        if data.on_error == "stop":
            broken = reporting("stop", Ledger())
    table = scan(asked.sources, reader, stated, broken)
    if target is not None:
        check_columns({target: "--target"}, list(table.columns), source)
    found = measure(table, target, data.problem if data is not None else None)
    if asked.lost:
        told = f"rows that could not be read and are left out: {asked.lost:,}; {asked.broken[0]}"
        found["findings"].insert(0, {"what": "broken", "columns": [], "text": told})
    known = {
        "sources": [one.model_dump(exclude_defaults=True) for one in asked.sources],
        "broken": asked.lost,
        "thousands": table.reader.thousands,
        "decimal": table.reader.decimal,
    }
    if data is not None:
        known |= {key: getattr(data, key) for key in ("group", "time", "weight")}
        known["drop"] = data.columns.drop
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", asked.title.split(".")[0]).strip("-._") or "table"
    return {
        "title": asked.title,
        "sources": [_name(one) for one in asked.sources],
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        **found,
        "broken": {"rows": asked.lost, "first": asked.broken},
        "recipe": propose(found, name[:100], known),
    }


def _name(source: Any) -> str:
    return sql.name_of(source.url) if source.kind == "sql" else str(source.path)


def write(found: dict[str, Any], source: str, out: Path | None) -> Path:
    """Writes the page, by default into the folder where the command runs.

    Raises:
        UserError: it would replace what was read.
    """
    stem = Path(source).name.split(".")[0].replace("*", "").strip("-_. ") or "table"
    out = out or Path(f"{stem}.profile.html")
    if out.is_dir():
        raise UserError(f"--output: {out} is a folder; name the file to write")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output: found {out}; the page is a file that ends in .html")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(draw(found))
    return out
