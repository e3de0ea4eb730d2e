"""What a report tells in tables: what became of the data, and what the run ran on."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import yaml

from ..console import bytes_in_words
from .blocks import bar, number, plain_table
from .page import Html, el, join

SPLITS = ("train", "validation", "test")
_ORDER = ("in", "dropped", "joined", "truncated", "masked", "kept", *SPLITS)
_SIZES = {"documents": "Documents", "tokens": "Tokens", "target_tokens": "Targets", "bytes": "Text"}


def ledger(manifest: dict[str, Any]) -> Html | None:
    """What came in, what left and why, and how large the splits and sources are."""
    if not manifest:
        return None
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in manifest.get("ledger", []):
        steps.setdefault(row["step"], []).append(row)
    bodies = []
    for step, rows in steps.items():
        rows.sort(key=lambda r: _ORDER.index(r["what"]) if r["what"] in _ORDER else 4)
        most_documents = max(row["documents"] for row in rows)
        most_tokens = max(row.get("tokens", 0) for row in rows)
        lines = []
        for row in rows:
            what, documents, tokens = row["what"], row["documents"], row.get("tokens", 0)
            kind = "" if what == "in" else "on" if what in ("kept", *SPLITS) else "out"
            share = documents / most_documents if most_documents else tokens / (most_tokens or 1)
            why, source = row.get("reason", ""), row.get("source", "")
            cells = [
                el("th", step, rowspan=len(rows)) if row is rows[0] else None,
                el("td", what),
                number(f"{documents:,}" if documents or not tokens else ""),
                bar(0, share),
                number(f"{tokens:,}" if tokens else ""),
                el("td", f"{why} ({source})" if why and source else why or source),
            ]
            lines.append(el("tr", cells, class_=kind))
        bodies.append(el("tbody", lines))
    heads = [
        el("th", "Step"), el("th"), number("Documents", "th"), el("th", class_="bar"),
        number("Tokens", "th"), el("th", "Reason, source"),
    ]  # fmt: skip
    table = el("table", el("thead", el("tr", heads)), bodies, class_="ledger")
    return join(
        [
            el("h3", "Data: what came in, what left, what was trained on"),
            el("div", table, class_="panel scroll") if bodies else None,
            el("div", _splits(manifest), _sources(manifest), class_="columns below"),
        ]
    )


def _splits(manifest: dict[str, Any]) -> Html | None:
    splits = {name: manifest.get("splits", {}).get(name) for name in SPLITS}
    there = {name: sizes for name, sizes in splits.items() if sizes}
    keys = [key for key in _SIZES if any(key in sizes for sizes in there.values())]

    def cell(key: str, value: int | None) -> str:
        return "" if value is None else bytes_in_words(value) if key == "bytes" else f"{value:,}"

    rows = [[n, *(cell(key, sizes.get(key)) for key in keys)] for n, sizes in there.items()]
    return _panel("Splits", ["", *(_SIZES[key] for key in keys)], rows, numbers=1)


def _sources(manifest: dict[str, Any]) -> Html | None:
    rows = [
        [
            source.get("kind", ""),
            source.get("path") or "",
            f"{source.get('files', 0):,}" if isinstance(source.get("files"), int) else "",
            bytes_in_words(source["bytes"]) if source.get("bytes") is not None else "",
        ]
        for source in manifest.get("sources", [])
    ]
    return _panel("Sources", ["Kind", "Path", "Files", "Size"], rows, numbers=2)


def _panel(title: str, heads: list[str], rows: list[list[str]], numbers: int) -> Html | None:
    """A small table in a panel; the columns from `numbers` on are set to the right."""
    if not rows:
        return None
    table = plain_table(heads, rows, [i >= numbers for i in range(len(rows[0]))])
    return el("div", el("h3", title), table, class_="panel scroll")


def machinery(recipe: dict[str, Any], p: dict[str, Any], manifest: dict[str, Any]) -> Html:
    """Kernels, machine, versions and the recipe; `p` is provenance.json."""
    git = p.get("git") or {}
    commit = git.get("commit", "")[:12] + (" with local changes" if git.get("dirty") else "")
    versions = {"python": p.get("python", "unknown"), **p.get("versions", {})}
    facts = [
        ("processor", p.get("cpu")),
        ("accelerator", p.get("gpu")),
        ("cores", p.get("cores")),
        ("threads", p.get("threads")),
        ("ranks", p.get("world")),
        ("ZeRO", _flat(p["zero"]) if p.get("zero") else None),
        ("platform", p.get("platform")),
        ("commit", commit),
        ("seed", recipe["seed"]),
        ("command", " ".join(p.get("command", []))),
        ("data", manifest.get("data_hash", "")[:16]),
    ]
    kernels = [[op, str(backend)] for op, backend in (p.get("backends") or {}).items()]
    kernels += _replaced(p.get("accelerate") or {})
    tables = [
        _panel("Kernels", ["Op", "Backend"], kernels, numbers=2),
        _panel("Machine", [], [[k, str(v)] for k, v in facts if v], numbers=2),
        _panel("Versions", [], [[name, version] for name, version in versions.items()], numbers=2),
    ]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return join(
        [
            el("h3", "What it ran on"),
            el("div", tables, class_="columns"),
            el("details", el("summary", "The recipe, as resolved"), el("pre", text)),
        ]
    )


def _replaced(report: dict[str, Any]) -> list[list[str]]:
    """What `accelerate` put under the model, and what it left alone and why, counted."""
    counts = Counter(
        (f"{op} under the model", backend)
        for op, backend in (report.get("replaced") or {}).values()
    )
    counts.update(("left alone", why) for why in (report.get("left_alone") or {}).values())
    rows = [
        [what, f"{how}, {times} module{'s' * (times > 1)}"] for (what, how), times in counts.items()
    ]
    return rows + [["freed memory", "kept for the next tensors"]] * bool(report.get("memory"))


def _flat(value: Any) -> str:
    """A value of provenance in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return value if isinstance(value, str) else json.dumps(value)


def count(value: float) -> str:
    """12345678 -> "12.3 M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,}"


def duration(seconds: float) -> str:
    """3700 -> "1 h 01 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
