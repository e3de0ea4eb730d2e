"""A profile as a page, and as a few lines in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..console import bytes_in_words
from ..report import blocks
from ..report.page import Html, el, join, page
from ..report.plots import label
from .measure import FENCE, GRAVE, LEAK, day, share

SHOWN = 20  # features in a list of bars
WIDTH, HEIGHT = 300, 92  # of a small picture

STYLE = """
.findings { list-style: none; margin: 16px 0 0; padding: 0; display: grid; gap: 8px; }
.findings li {
  background: var(--card); border: 1px solid var(--rule); border-left: 3px solid var(--pale);
  border-radius: 0 8px 8px 0; padding: 8px 14px; overflow-wrap: anywhere;
}
.findings li.grave { border-left-color: var(--ember); background: var(--wash); }
.findings b { color: var(--soft); font-size: 12px; font-weight: 620; margin-right: 8px; }
.findings li.grave b { color: var(--ember); }
.cards { display: grid; gap: 14px; margin-top: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 13px 16px 12px; min-width: 0; }
.card.aim { border-color: var(--ember); }
.card h3 { margin: 0; font-size: 15px; display: flex; gap: 8px; align-items: baseline;
  justify-content: space-between; overflow-wrap: anywhere; }
.card h3 span { font-size: 11.5px; font-weight: 560; color: var(--steel); white-space: nowrap; }
.card.aim h3 span { color: var(--ember); }
.card p { margin: 2px 0 8px; font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere; }
.card svg.small { display: block; width: 100%; height: auto; }
.small rect { fill: var(--pale); }
.small rect:hover { fill: var(--steel); }
.small .mean { fill: none; stroke: var(--ember); stroke-width: 1.8; stroke-linejoin: round; }
.small circle { fill: var(--ember); }
.small text { fill: var(--soft); font-size: 10.5px; }
.small text.end { text-anchor: end; }
.small text.middle { text-anchor: middle; }
.facts { display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px 12px; margin-top: 9px;
  font-size: 12.5px; }
.facts span { display: block; color: var(--soft); font-size: 11.5px; }
.facts .warn { color: var(--ember); }
.card table { font-size: 12.5px; table-layout: fixed; }
.card td { padding: 2px 8px 2px 0; }
.card tr { border: 0 !important; }
.card td:first-child { width: 34%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.card td.number { width: 60px; padding-right: 4px; }
.card td.bar { width: auto; min-width: 0; }
.card .bar svg { margin-top: 3px; }
.means { color: var(--ember); }
.gaps { display: grid; grid-template-columns: minmax(90px, max-content) 1fr max-content;
  gap: 5px 12px; align-items: center; font-size: 13px; padding: 14px 16px; }
.gaps svg { width: 100%; height: 15px; display: block; border-radius: 3px;
  background: var(--grid); }
.gaps rect { fill: var(--ember); }
.panel.pad { padding: 14px 16px; }
.pad .matrix thead tr th { font-style: normal; }
.pad .matrix.dense td { min-width: 27px; height: 24px; }
.pair { display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.pair h3 { margin-top: 20px; }
.recipe { padding: 16px 18px; }
.recipe pre { overflow-x: auto; white-space: pre; overflow-wrap: normal; }
.recipe .why { color: var(--soft); }
"""


def draw(p: dict[str, Any]) -> str:
    """The page: a whole document."""
    sampled = p["sampled"] < p["rows"]
    subtitle = " · ".join([", ".join(p["sources"]), p["created"]])
    nav = [("findings", "What stands out"), ("columns", "Columns"), ("missing", "Missing values"),
           ("relations", "What goes together")]  # fmt: skip
    nav += [("target", "The target")] if p["target"] and p["target"]["learnable"] else []
    nav += [("time", "Over time")] if p["trends"] else []
    nav += [("recipe", "A recipe")]
    header = el(
        "header",
        el("p", "gradsmith profile", class_="eyebrow"),
        el("h1", p["title"]),
        el("p", subtitle, class_="soft"),
        el("nav", [el("a", text, href=f"#{name}") for name, text in nav]),
    )
    over = (
        f"Rows, missing and different values, least and most, and duplicates are of all "
        f"{p['rows']:,} rows; the rest is of {p['sampled']:,} rows that were drawn once, evenly."
        if sampled
        else "Everything is of all rows."
    )
    main = el(
        "main",
        _tiles(p),
        el("p", over, class_="note"),
        _section("findings", "What stands out", _found(p)),
        _section("columns", "Columns", el("div", [_card(p, c) for c in p["columns"]],
                                          class_="cards")),
        _section("missing", "Missing values", _gaps(p)),
        _section("relations", "What goes together", _relations(p)),
        _target(p),
        _time(p),
        _section("recipe", "A recipe", _recipe(p)),
    )  # fmt: skip
    told = "This page shows frequent values of the table: share it as you would share the table."
    footer = el("footer", f"Written by gradsmith on {p['created']}. {told}")
    return page(f"{p['title']}: profile", join([header, main, footer]), STYLE)


def _section(name: str, title: str, *inside: Any) -> Html:
    return el("section", el("h2", title), *inside, id=name)


def _tiles(p: dict[str, Any]) -> Html:
    cells = p["rows"] * len(p["columns"])
    gone = sum(c["missing"] for c in p["columns"])
    kinds: dict[str, int] = {}
    for c in p["columns"]:
        kinds[c["kind"]] = kinds.get(c["kind"], 0) + 1
    of_kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda k: -k[1]))
    size = bytes_in_words(p["bytes"]) if p["files"] else "-"
    files = f"in {p['files']} file{'s' * (p['files'] != 1)}" if p["files"] else "not a file"
    tiles = [
        ("Rows", f"{p['rows']:,}", ""),
        ("Columns", f"{len(p['columns'])}", of_kinds),
        ("Size", size, files),
        ("Missing cells", share(gone / cells if cells else 0), f"{gone:,} of {cells:,}"),
        ("Duplicate rows", f"{p['duplicates']:,}", share(p["duplicates"] / p["rows"])),
    ]
    drawn = [
        el("div", el("span", name), el("b", text), el("span", more),
           class_="tile")
        for name, text, more in tiles
    ]  # fmt: skip
    return el("div", drawn, class_="tiles")


def _found(p: dict[str, Any]) -> Html:
    if not p["findings"]:
        return el("p", "Nothing.", class_="soft")
    items = [
        el("li", el("b", f["what"]), f["text"], class_="grave" if f["what"] in GRAVE else None)
        for f in p["findings"]
    ]
    return el("ul", items, class_="findings")


# --------------------------------------------------------------------------------------- columns


def _card(p: dict[str, Any], c: dict[str, Any]) -> Html:
    aim = bool(p["target"]) and c["name"] == p["target"]["name"]
    words = p["target"]["words"] if p["target"] else ""
    picture = _top(c, words) if not c["numeric"] else _numbers(c, words)
    return el(
        "div",
        el("h3", c["name"], el("span", "target, " * aim + c["kind"])),
        el("p", c["why"]),
        picture,
        el("div", [_fact(*fact) for fact in _facts(p, c)], class_="facts"),
        class_="card aim" if aim else "card",
    )


def short(value: float) -> str:
    """A mean: 0.742, 3.1, 1,520, 12k."""
    return f"{value:.3g}" if abs(value) < 1000 else label(value)


def _fact(name: str, text: str, warn: bool = False) -> Html:
    return el("div", el("span", name), el("b", text, class_="warn" if warn else None))


def _facts(p: dict[str, Any], c: dict[str, Any]) -> list[tuple[str, str] | tuple[str, str, bool]]:
    about = "" if c["distinct_exact"] else "about "
    part = c["missing"] / p["rows"]
    facts: list[Any] = []
    if c["numeric"] and c.get("median") is not None and c["kind"] != "boolean":
        write = day if c["kind"] == "date" else label
        facts += [(n, write(c[k])) for n, k in (("min", "least"), ("median", "median"),
                                                ("max", "most"))]  # fmt: skip
    facts += [
        ("missing", share(part), part > 0.5),
        ("different", f"{about}{c['distinct']:,}"),
    ]
    if c["kind"] == "number" and c.get("median") is not None:
        facts.append((f"beyond {FENCE} IQR", share(c["outlier_share"])))
    if c["bad"]:
        facts.append((f"no {c['kind']}", f"{c['bad']:,}", True))
    found = p["target"]["features"].get(c["name"]) if p["target"] else None
    if found and found["score"] is not None:
        alone = found["score"]
        facts.append((f"{p['target']['metric']} alone", f"{alone:.3f}", alone >= LEAK))
    return facts


def _numbers(c: dict[str, Any], words: str) -> Html:
    h = c["histogram"]
    if h is None:
        return el("p", "no value")
    if "values" in h:
        names = [label(v) for v in h["values"]]
        if c["kind"] == "boolean":
            names = ["true" if v else "false" for v in h["values"]]
        ends = names if len(names) <= 8 else [names[0], names[-1]]
    else:
        write = day if c["kind"] == "date" else label
        edges = [write(edge) for edge in h["edges"]]
        names = [f"{a} to {b}" for a, b in pairwise(edges)]
        ends = [edges[0], edges[-1]]
    picture = columns(h["counts"], names, ends, h["means"])
    beyond = f"{h['beyond']:,} more lie beyond. " if h["beyond"] else ""
    return join([picture, _note(beyond, h["means"], words)])


def _note(text: str, means: Sequence[float | None] | None, words: str = "") -> Html | None:
    some = [m for m in means or () if m is not None]
    told = None
    if some:
        ends = f"{short(min(some))} to {short(max(some))}"
        told = el("span", f"line: {words}, {ends}", class_="means")
    return el("p", text, told) if text or told else None


def columns(
    counts: Sequence[float],
    names: Sequence[str],
    ends: Sequence[str],
    means: Sequence[float | None] | None = None,
) -> Html:
    """Upright bars as SVG, with a line of means over them.

    Args:
        counts: how high each is.
        names: what each is, for the pointer.
        ends: what stands below: a text for each bar, or for the first and last alone.
        means: of the target where a bar stands.
    """
    base, top = HEIGHT - 16, 4
    wide = WIDTH / max(len(counts), 1)
    gap = min(1.0, wide / 8) if len(counts) > 12 else min(6.0, wide / 8)
    most = max(counts, default=0) or 1
    total = sum(counts) or 1
    some = [m for m in means or () if m is not None]
    low, span = (min(some), max(some) - min(some) or 1.0) if some else (0.0, 1.0)
    shapes, dots = [], []
    for i, count in enumerate(counts):
        high = max((base - top) * count / most, 1.0 if count else 0.0)
        told = f"{names[i]}: {count:,} ({share(count / total)})"
        mean = means[i] if means else None
        if mean is not None:
            told += f", mean of the target {short(mean)}"
            y = base - 4 - (base - top - 8) * (mean - low) / span
            dots.append((round(i * wide + wide / 2, 1), round(y, 1)))
        shapes.append(el("rect", el("title", told), x=round(i * wide + gap / 2, 1),
                         y=round(base - high, 1), width=round(wide - gap, 1),
                         height=round(high, 1)))  # fmt: skip
    if dots:
        path = "M" + "L".join(f"{x} {y}" for x, y in dots)
        shapes += [el("path", class_="mean", d=path)]
        shapes += [el("circle", cx=x, cy=y, r=2.2) for x, y in dots]
    if len(ends) == len(counts):
        shapes += [
            el("text", text, x=round(i * wide + wide / 2, 1), y=HEIGHT - 3, class_="middle")
            for i, text in enumerate(ends)
        ]
    elif ends:
        shapes += [el("text", ends[0], x=0, y=HEIGHT - 3)]
        shapes += [el("text", ends[-1], x=WIDTH, y=HEIGHT - 3, class_="end")]
    return el("svg", shapes, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="small", role="img",
              aria_label=f"distribution: {', '.join(map(str, ends))}")  # fmt: skip


def _top(c: dict[str, Any], words: str) -> Html:
    if not c["top"]:
        return el("p", "no value")
    rows = []
    means = c.get("means") or [None] * len(c["top"])
    has_means = any(mean is not None for mean in means)
    for (text, count), mean in zip(c["top"], means, strict=True):
        part = count / c["top_of"]
        cells = [el("td", text, title=text), blocks.bar(0, part), blocks.number(share(part))]
        if has_means:
            mark = el("span", "" if mean is None else short(mean), class_="means")
            cells.append(el("td", mark, class_="number"))
        rows.append(el("tr", cells))
    left = c["distinct"] - len(c["top"])
    notes = [f"{left:,} more values. "] if left > 0 else []
    told = el("span", f"right: {words}", class_="means") if has_means else None
    note = el("p", notes, told) if notes or told else None
    return join([el("table", el("tbody", rows)), note])


# -------------------------------------------------------------------------------------- relations


def _gaps(p: dict[str, Any]) -> Html:
    if not p["missing_map"]:
        return el("p", "No value is missing.", class_="soft")
    of_columns = {c["name"]: c for c in p["columns"]}
    lines: list[Any] = []
    for name, shares in p["missing_map"].items():
        shapes = [
            el("rect", x=i, y=0, width=1.02, height=1, opacity=f"{max(part, 0.06):.2f}")
            for i, part in enumerate(shares)
            if part
        ]
        box = f"0 0 {len(shares)} 1"
        svg = el("svg", shapes, viewBox=box, preserveAspectRatio="none", role="img",
                 aria_label=f"where {name} is missing")  # fmt: skip
        lines += [el("span", name), svg, el("b", share(of_columns[name]["missing"] / p["rows"]))]
    note = "From the first row on the left to the last on the right; the darker, the more is gone."
    return join([el("div", lines, class_="gaps panel"), el("p", note, class_="note")])


def heat(title: str, found: dict[str, Any]) -> Html:
    """Correlations from -1 to 1, shaded by their size; negative ones in another colour."""
    names = found["names"]
    dense = len(names) > blocks.MATRIX_NUMBERS
    body = []
    for name, values in zip(names, found["values"], strict=True):
        cells = []
        for other, r in zip(names, values, strict=True):
            size = abs(r or 0.0)
            kinds = ["wrong"] * ((r or 0) < 0) + ["half"] * (size > 0.5)
            kinds += ["strong"] * (size > 0.75)
            text = "" if r is None else f"{r:.2f}"
            text = text.replace("0.", ".") if dense else text
            told = f"{name}, {other}: {'does not vary' if r is None else f'{r:.4f}'}"
            kind = " ".join(kinds) or None
            cells.append(el("td", text, class_=kind, style=f"--share:{size:.3f}", title=told))
        body.append(el("tr", el("th", name, scope="row"), cells))
    heads = el("tr", el("td"), [el("th", el("span", name), scope="col") for name in names])
    kind = "matrix dense" if dense else "matrix"
    table = el("table", el("thead", heads), el("tbody", body), class_=kind, aria_label=title)
    return el("div", el("h3", title), el("div", table, class_="panel scroll pad"))


def _relations(p: dict[str, Any]) -> Html:
    found = p["correlations"]
    titles = {"pearson": "Pearson: on a straight line", "spearman": "Spearman: in the same order",
              "cramers_v": "Cramér's V: between categories"}  # fmt: skip
    maps: list[Any] = [heat(title, found[key]) for key, title in titles.items() if key in found]
    if not maps:
        return el("p", "There are no two columns to compare.", class_="soft")
    left = [f"{len(names)} {kind}" for kind, names in found["left_out"].items() if names]
    note = f"Left out, beyond the first: {', '.join(left)}. " if left else ""
    note += "Of two columns the rows count that have both. Numbers of few values are among both."
    return join([el("div", maps[:2], class_="pair"), maps[2:], el("p", note, class_="note")])


def _target(p: dict[str, Any]) -> Html | None:
    target = p["target"]
    if not target or not target["learnable"]:
        return None
    features = target["features"]
    by_score = sorted(
        (n for n in features if features[n]["score"] is not None),
        key=lambda n: -features[n]["score"],
    )
    by_information = sorted(features, key=lambda n: -features[n]["mutual_information"])
    scores = [
        {"name": n, "value": features[n]["score"], "ours": features[n]["score"] >= LEAK}
        for n in by_score[:SHOWN]
    ]
    nats = [{"name": n, "value": features[n]["mutual_information"]} for n in by_information[:SHOWN]]
    figures = []
    if scores:
        note = (
            f"{target['metric']} of one feature alone, on rows that it was not fitted on "
            f"(5 folds). From {LEAK} on it is suspected to be known only afterwards."
        )
        block = {"title": "Each feature alone", "format": ".3f", "bars": scores}
        figures.append(el("div", el("h3", block["title"]), blocks.bars(block),
                          el("p", note, class_="note")))  # fmt: skip
    note = (
        f"In nats, of the {target['entropy']:.3f} that {target['name']} has; numbers in bins at "
        "quantiles."
    )
    if nats:
        block = {"title": "Mutual information with the target", "format": ".3f", "bars": nats}
        figures.append(el("div", el("h3", block["title"]), blocks.bars(block),
                          el("p", note, class_="note")))  # fmt: skip
    title = f"The target: {target['name']}, a {target['problem']}"
    classes = None
    if target["problem"] == "classification":
        total = sum(target["classes"].values())
        rows = [{"name": n, "value": c / total} for n, c in target["classes"].items()]
        classes = join([el("h3", "Classes"), blocks.bars(
            {"title": "Classes", "format": ".1%", "bars": rows})])  # fmt: skip
    return _section("target", title, classes, el("div", figures, class_="pair"))


def _time(p: dict[str, Any]) -> Html | None:
    if not p["trends"]:
        return None
    cards, words = [], p["target"]["words"] if p["target"] else ""
    for trend in p["trends"]:
        edges = trend["edges"]
        names = [f"{a} to {b}" for a, b in pairwise(edges)]
        picture = columns(trend["rows"], names, [edges[0], edges[-1]], trend["means"])
        rho = trend["spearman"]
        told = f"Spearman of the target with it: {rho:.2f}. " if rho is not None else ""
        cards.append(el("div", el("h3", trend["column"], el("span", "rows over time")), picture,
                        _note(told, trend["means"], words), class_="card"))  # fmt: skip
    return _section("time", "Over time", el("div", cards, class_="cards"))


def _recipe(p: dict[str, Any]) -> Html:
    if p["recipe"] is None:
        return el("p", f"{_no_recipe(p)}.", class_="soft")
    lines = []
    for text in p["recipe"].splitlines(keepends=True):
        code, mark, why = text.partition("  # ")
        lines.append(join([code, el("span", mark + why, class_="why") if mark else None]))
    told = "Save it as a file, FILE.yaml, then: "
    commands = el("code", "gradsmith train FILE.yaml")
    panel = el("div", el("pre", lines), class_="panel recipe")
    return join([el("p", told, commands, class_="soft"), panel])


def _no_recipe(p: dict[str, Any]) -> str:
    if not p["target"]:
        return "Say --target COLUMN for what predicts it, leakage suspects and a recipe"
    return "No recipe: the target has one value, there are too few rows, or no column is left"


# --------------------------------------------------------------------------------------- terminal


def terminal(p: dict[str, Any]) -> RenderableType:
    """A row for each column, and what stands out."""
    size = f", {bytes_in_words(p['bytes'])}" if p["files"] else ""
    title = f"{p['title']}: {p['rows']:,} rows, {len(p['columns'])} columns{size}"
    table = Table(title=title, title_justify="left")
    features = p["target"]["features"] if p["target"] else {}
    heads = ["column", "kind", "missing", "different", "values"]
    for name in heads:
        table.add_column(name, justify="right" if name in ("missing", "different") else "left")
    if features:
        table.add_column(f"{p['target']['metric']} alone", justify="right")
    for c in p["columns"]:
        alone = features.get(c["name"], {}).get("score")
        cells = [c["name"], c["kind"], share(c["missing"] / p["rows"]),
                 "~" * (not c["distinct_exact"]) + f"{c['distinct']:,}", _values(c)]  # fmt: skip
        cells += ["" if alone is None else f"{alone:.3f}"] if features else []
        is_target = p["target"] and c["name"] == p["target"]["name"]
        table.add_row(*map(Text, cells), style="bold" if is_target else None)
    told = [
        Text.assemble((f"{f['what']}: ", "bold red" if f["what"] in GRAVE else "bold"), f["text"])
        for f in p["findings"]
    ]
    hint = [] if p["recipe"] else [Text(_no_recipe(p), "dim")]
    return Group(table, *told, *hint)


def _values(c: dict[str, Any]) -> str:
    if not c["numeric"]:
        return ", ".join(f"{text[:24]}" for text, _ in c["top"][:4])
    if c.get("median") is None:
        return ""
    if c["kind"] == "boolean":
        return f"{share(c['mean'])} true"
    write = day if c["kind"] == "date" else label
    return f"{write(c['least'])} .. {write(c['median'])} .. {write(c['most'])}"
