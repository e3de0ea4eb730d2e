"""Blocks as HTML: six kinds of figures, whatever they are about (gradsmith.blocks)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from ..blocks import Metric
from . import plots
from .page import Html, el, join

MATRIX_NUMBERS = 12  # a matrix of more columns is drawn smaller, and leaves zeros out


def draw(blocks: Iterable[dict[str, Any]]) -> Html:
    """The figures one below the other, charts two and two."""
    parts: list[Any] = []
    for kind, group in groupby(blocks, lambda block: block["kind"]):
        if kind == "chart":
            parts.append(
                el("div", [chart(block) for block in group], class_="charts figures below")
            )
            continue
        for block in group:
            parts += [el("h3", block["title"]), DRAW[kind](block)]
            if block.get("note"):
                parts.append(el("p", block["note"], class_="note"))
    return join(parts)


def shown(value: Any, form: str = ".4g") -> str:
    """A value as it is written: a number in its format, a text as it is, None as nothing."""
    if value is None or isinstance(value, str):
        return value or ""
    return format(value, form) if plots.is_finite(value) else str(value)


def bar(start: float, stop: float, interval: tuple[float, float] | None = None) -> Html:
    """A cell with a bar between two shares of its width, and an interval on it."""

    def at(share: float) -> float:
        return round(100 * min(max(share, 0.0), 1.0), 1) if math.isfinite(share) else 0.0

    start, stop = sorted((at(start), at(stop)))
    shapes = [el("rect", x=start, width=round(stop - start, 1), height=12)]
    if interval:
        low, high = map(at, interval)
        path = f"M{low} 2V10M{low} 6H{high}M{high} 2V10"
        shapes.append(el("path", class_="interval", d=path))
    svg = el("svg", shapes, preserveAspectRatio="none", viewBox="0 0 100 12", aria_hidden="true")
    return el("td", svg, class_="bar")


def number(text: str, tag: str = "td") -> Html:
    """A cell that is set to the right."""
    return el(tag, text, class_="number")


def results(definitions: Sequence[Metric], rows: Sequence[dict[str, Any]]) -> Html:
    """The results as a table, the best first, with a bar for the headline."""
    columns = [m for m in definitions if any(m.name in row["values"] for row in rows)]
    if not columns:
        return Html()
    first = columns[0]

    def headline(row: dict[str, Any]) -> float:
        value = row["values"].get(first.name, math.nan)
        return value if plots.is_finite(value) else math.nan

    def place(row: dict[str, Any]) -> float:
        value = headline(row)
        return math.inf if math.isnan(value) else -value if first.greater_is_better else value

    longest = max((abs(headline(row)) for row in rows if not math.isnan(headline(row))), default=0)
    heads: list[Any] = [el("th")]
    for metric in columns:
        unit = el("span", metric.unit, class_="unit") if metric.unit else None
        heads.append(el("th", metric.title, " ", unit, class_="number"))
        if metric is first:
            heads.append(el("th", class_="bar"))
    body = []
    for row in sorted(rows, key=place):
        name = f"{row['name']} ({row['note']})" if row.get("note") else row["name"]
        cells: list[Any] = [el("th", name)]
        for metric in columns:
            cells.append(number(shown(row["values"].get(metric.name), metric.format)))
            if metric is first:
                cells.append(bar(0, headline(row) / (longest or 1)))
        body.append(el("tr", cells, class_="ours" if row.get("ours") else None))
    table = el("table", el("thead", el("tr", heads)), el("tbody", body), class_="results")
    return el("div", table, class_="panel scroll")


# ------------------------------------------------------------------------------- the six kinds


def samples(block: dict[str, Any]) -> Html:
    """A card for each sample. Those whose own answer is blank are left out, and counted."""
    all_samples = block["samples"]
    told = [s for s in all_samples if not any(p.get("ours") and not p["text"].strip() for p in s)]
    cards = []
    for asked, *answers in told:
        texts = [
            el(
                "div",
                el("h4", part["name"], class_="ours" if part.get("ours") else None),
                el("pre", part["text"] or "(nothing)"),
            )
            for part in answers
        ]
        prompt = el("pre", asked["text"] or "(nothing)", class_="prompt")
        columns = el("div", texts, class_="columns")
        cards.append(el("div", el("h4", asked["name"]), prompt, columns, class_="sample"))
    notes = []
    if block.get("settings"):
        settings = (f"{k.replace('_', ' ')} {shown(v)}" for k, v in block["settings"].items())
        notes.append(f"Drawn once and shown as they came: {', '.join(settings)}.")
    if blank := len(all_samples) - len(told):
        notes.append(f"{blank} of {len(all_samples)} came out blank and are left out.")
    return join([cards, el("p", " ".join(notes), class_="note") if notes else None])


def matrix(block: dict[str, Any]) -> Html:
    """A heat map: each cell shaded by its share of its row."""
    rows, columns = block["rows"], block["columns"]
    dense, same = len(columns) > MATRIX_NUMBERS, rows == columns
    body = []
    for i, (name, values) in enumerate(zip(rows, block["values"], strict=False)):
        total = sum(abs(value) for value in values if plots.is_finite(value)) or 1.0
        cells = []
        for j, (column, value) in enumerate(zip(columns, values, strict=False)):
            share = abs(value) / total if plots.is_finite(value) else 0.0
            words = (
                f"{block['row_title']} {name}, {block['column_title']} {column}: "
                f"{shown(value, ',.6g')}, {share:.1%} of the row"
            )
            kinds = ["wrong"] * (same and i != j)
            kinds += ["half"] * (share > 0.5) + ["strong"] * (share > 0.75)  # for the text
            cells.append(
                el(
                    "td",
                    "" if dense and not value else plots.label(value),
                    class_=" ".join(kinds) or None,
                    style=f"--share:{share:.3f}" if share else None,
                    title=words if value else None,
                )
            )
        body.append(el("tr", el("th", name, scope="row"), cells))
    above = el("tr", el("td"), el("th", block["column_title"], colspan=max(len(columns), 1)))
    names = [el("th", el("span", name), scope="col") for name in columns]
    table = el(
        "table",
        el("thead", above, el("tr", el("th", block["row_title"]), names)),
        el("tbody", body),
        class_="matrix dense" if dense else "matrix",
        aria_label=block["title"],
    )
    return el("div", table, class_="panel scroll")


def bars(block: dict[str, Any]) -> Html:
    """A table with a bar in each row, and the interval around it where there is one."""
    form, rows = block.get("format", ".4g"), block["bars"]
    ends = [0.0, *(row[key] for row in rows for key in ("value", "low", "high") if key in row)]
    finite = [end for end in ends if plots.is_finite(end)]
    low, span = min(finite), max(finite) - min(finite) or 1.0
    body = []
    for row in rows:
        name = f"{row['name']} ({row['note']})" if row.get("note") else row["name"]
        text, interval = shown(row["value"], form), None
        if "low" in row and "high" in row:
            text += f" ({shown(row['low'], form)} to {shown(row['high'], form)})"
            interval = ((row["low"] - low) / span, (row["high"] - low) / span)
        drawn = bar(-low / span, (row["value"] - low) / span, interval)
        kind = "ours" if row.get("ours") else None
        body.append(el("tr", el("th", name), number(text), drawn, class_=kind))
    head = None
    if unit := block.get("unit"):
        head = el("thead", el("tr", el("th"), number(unit, "th"), el("th", class_="bar")))
    table = el("table", head, el("tbody", body), class_="results", aria_label=block["title"])
    return el("div", table, class_="panel scroll")


def chart(block: dict[str, Any]) -> Html:
    """Lines, with bands and references."""
    series = []
    for i, line in enumerate(block["lines"]):
        points = [(x, y) for x, y in line["points"] if plots.is_finite(x)]
        band = [ends for ends in line.get("band", []) if all(map(plots.is_finite, ends))]
        series.append(
            plots.Series(
                line["name"],
                [(x, y if plots.is_finite(y) else math.nan) for x, y in sorted(points)],
                f"s{i % plots.STYLES}",
                dots=line.get("dots", False),
                dashed=line.get("dashed", False),
                band=sorted((x, low, high) for x, low, high in band),
            )
        )
    references = [(r["name"], r["value"]) for r in block.get("references", [])]
    figure = plots.draw(plots.Chart(block["title"], series, block["x"], block["y"], references))
    note = el("p", block["note"], class_="note") if block.get("note") else None
    return el("div", figure, note)


def table(block: dict[str, Any]) -> Html:
    """A table; its columns of numbers are set to the right."""
    heads = [column["name"] for column in block["columns"]]
    forms = [column.get("format") for column in block["columns"]]
    rows = [
        [shown(cell, form or ".4g") for cell, form in zip(row, forms, strict=False)]
        for row in block["rows"]
    ]
    return el("div", plain_table(heads, rows, [form is not None for form in forms]),
              class_="panel scroll")  # fmt: skip


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: list[bool]) -> Html:
    """Texts in rows; the columns of `right` are set to the right."""

    def line(tag: str, cells: Sequence[str]) -> Html:
        kinds = ["number" if is_right else None for is_right in right]
        return el("tr", [el(tag, c, class_=k) for c, k in zip(cells, kinds, strict=False)])

    head = el("thead", line("th", heads)) if heads else None
    return el("table", head, el("tbody", [line("td", row) for row in rows]))


def images(block: dict[str, Any]) -> Html:
    """A grid of pictures with their captions."""
    figures = [
        el(
            "figure",
            el("img", src=f"data:image/png;base64,{image['png']}", alt=image["caption"]),
            el("figcaption", image["caption"]),
            el("p", image["note"], class_="soft") if image.get("note") else None,
        )
        for image in block["images"]
    ]
    return el("div", figures, class_="images")


DRAW: dict[str, Callable[[dict[str, Any]], Html]] = {
    "samples": samples,
    "matrix": matrix,
    "bars": bars,
    "table": table,
    "images": images,
}
