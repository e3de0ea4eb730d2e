"""An evaluation in the terminal: the results, and of its blocks those that are text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..blocks import Metric
from .blocks import shown

SAMPLES, LINES = 2, 6  # as many samples, and lines of each text; the report has them whole
COLUMNS = 16  # of a table or matrix; a wider one does not fit
BAR = 24  # characters of a bar


def format_evaluation(result: dict[str, Any]) -> RenderableType:
    """An evaluation as a rich renderable: a row for the model, its base and each baseline, then
    the blocks."""
    told = [Text(result["note"], "dim")] if result["note"] else []
    figures = [drawn for block in result["blocks"] for drawn in draw(block)]
    return Group(_results(result), *told, *figures)


def _results(result: dict[str, Any]) -> Table:
    definitions = [Metric.read(entry) for entry in result["definitions"]]
    title = f"step {result['step']}, {result['split']} split"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for metric in definitions:
        table.add_column(metric.words, justify="right")
    for row in result["results"]:
        name = f"{row['name']} ({row['note']})" if row.get("note") else row["name"]
        cells = [shown(row["values"].get(metric.name), metric.format) for metric in definitions]
        table.add_row(name, *cells, style="bold" if row.get("ours") else None)
    return table


def draw(block: dict[str, Any]) -> Iterable[RenderableType]:
    """A block; what needs a picture is left to the report, and said to be there."""
    functions = {"samples": _samples, "matrix": _matrix, "bars": _bars, "table": _table}
    function = functions.get(block["kind"])
    if function is None or len(block.get("columns", [])) > COLUMNS:
        yield Text(f"\n{block['title']}: in the report (gradsmith report)", "dim")
        return
    yield Text(f"\n{block['title']}", "bold")
    yield from function(block)
    if block.get("note"):
        yield Text(block["note"], "dim")


def _samples(block: dict[str, Any]) -> Iterable[RenderableType]:
    for sample in block["samples"][:SAMPLES]:
        for part in sample:
            yield Text(part["name"], "bold" if part.get("ours") else "dim")
            lines = (part["text"].rstrip() or "(nothing)").splitlines() or ["(nothing)"]
            more = ["..."] if len(lines) > LINES else []
            yield Padding(Text("\n".join(lines[:LINES] + more)), (0, 0, 0, 4))
        yield Text("")
    if (left := len(block["samples"]) - SAMPLES) > 0:
        yield Text(f"{left} more in the report", "dim")


def _matrix(block: dict[str, Any]) -> Iterable[RenderableType]:
    corner = f"{block['row_title']} \\ {block['column_title']}"
    table = Table(corner)
    for name in block["columns"]:
        table.add_column(name, justify="right")
    for name, values in zip(block["rows"], block["values"], strict=True):
        table.add_row(name, *(shown(value, ",.6g") for value in values))
    yield table


def _bars(block: dict[str, Any]) -> Iterable[RenderableType]:
    form, rows = block.get("format", ".4g"), block["bars"]
    longest = max((abs(row["value"]) for row in rows if row["value"] == row["value"]), default=0)
    table = Table("", "", box=None)
    table.add_column(block.get("unit", ""), justify="right")
    for row in rows:
        text = shown(row["value"], form)
        if "low" in row and "high" in row:
            text += f" ({shown(row['low'], form)} to {shown(row['high'], form)})"
        share = abs(row["value"]) / (longest or 1)
        length = round(BAR * share) if 0 <= share <= 1 else 0
        style = "bold" if row.get("ours") else None
        name = f"{row['name']} ({row['note']})" if row.get("note") else row["name"]
        table.add_row(name, "\u2588" * length, text, style=style)
    yield table


def _table(block: dict[str, Any]) -> Iterable[RenderableType]:
    table = Table()
    forms = [column.get("format") for column in block["columns"]]
    for column, form in zip(block["columns"], forms, strict=True):
        table.add_column(column["name"], justify="left" if form is None else "right")
    for row in block["rows"]:
        table.add_row(*(shown(c, f or ".4g") for c, f in zip(row, forms, strict=True)))
    yield table
