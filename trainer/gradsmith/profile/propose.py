"""A recipe that follows from a profile, with the reason for each line as its comment."""

from __future__ import annotations

from typing import Any

import yaml

from ..errors import one_line
from .measure import CERTAIN, LEAK, MOSTLY, OUTLYING, RARE, share

LEAST = 40  # rows; of fewer no share can be held out that says anything
SMALL = 5_000  # rows; a smaller network learns them as well
STEPS = 3_000  # of a small table's training, at least; a large one is read 10 times
KEYS = {"number": "numeric", "boolean": "boolean", "category": "categorical", "date": "dates",
        "text": "text"}  # fmt: skip


def value(found: Any) -> str:
    """As YAML has it, on one line."""
    text = yaml.safe_dump([found], default_flow_style=True, allow_unicode=True, width=10**9)
    return text.strip()[1:-1]


def line(depth: int, text: str, why: str = "") -> str:
    whole = "  " * depth + text
    return f"{whole}  # {one_line(why, 160)}" if why else whole


def propose(p: dict[str, Any], name: str, data: dict[str, Any]) -> str | None:
    """The recipe, YAML; None without a target that can be learned.

    Args:
        p: the profile, see `measure`.
        name: the run's.
        data: sources, group, time, weight, thousands and decimal, broken and drop, as they are
            known.
    """
    target = p["target"]
    if not target or not target["learnable"] or p["rows"] < LEAST:
        return None
    roles = {target["name"], data.get("group"), data.get("time"), data.get("weight")}
    drop = {name: why for name, why in _dropped(p, data).items() if name not in roles}
    used = [c for c in p["columns"] if c["name"] not in drop and c["name"] not in roles]
    if not used:
        return None
    lines = [
        line(0, f"name: {value(name)}"),
        line(0, f"output: {value(f'runs/{name}')}", "where the run's folder is made"),
        line(0, "data:"),
        line(1, "task: table"),
        line(1, "sources:"),
        *(line(2, f"- {value(source)}") for source in data["sources"]),
        line(1, f"target: {value(target['name'])}", _target_words(p)),
        line(1, f"problem: {target['problem']}"),
        *_roles(p, data),
        line(1, "columns:"),
        *_columns(p, data, drop, used),
        *_cleaning(p, data, used),
        *_split(p, data),
        *_model(p, used),
    ]
    return "\n".join(lines) + "\n"


def _target_words(p: dict[str, Any]) -> str:
    target = p["target"]
    if target["problem"] == "regression":
        column = next(c for c in p["columns"] if c["name"] == target["name"])
        return f"a number from {column['least']:.6g} to {column['most']:.6g}"
    count = len(target["classes"]) + target["more_classes"]
    parts = (f"{label} {rows:,}" for label, rows in target["classes"].items())
    return f"{count} classes: {', '.join(parts)}"


def _dropped(p: dict[str, Any], data: dict[str, Any]) -> dict[str, str]:
    """Column -> why it is not used; the first reason counts."""
    target, found = p["target"], dict.fromkeys(data.get("drop", ()), "as your recipe says")
    for feature, of in target["features"].items():
        if (of["score"] or 0) >= CERTAIN:
            told = f"predicts {target['name']} alone ({target['metric']} {of['score']:.3f})"
            found.setdefault(feature, f"{told}: known only afterwards? Else take it back")
    for name, other in p["copies"]:
        if other not in found:
            found.setdefault(name, f"says the same as {other}")
    ids = {name for f in p["findings"] if f["what"] == "id" for name in f["columns"]}
    for c in p["columns"]:
        name = c["name"]
        if c["kind"] == "constant":
            found.setdefault(name, f"never changes: {c['why']}")
        elif name in ids:
            found.setdefault(name, f"names rows instead of describing them: {c['why']}")
        elif c["missing"] > MOSTLY * p["rows"]:
            found.setdefault(name, f"missing in {share(c['missing'] / p['rows'])} of the rows")
    return found


def _roles(p: dict[str, Any], data: dict[str, Any]) -> list[str]:
    found = [
        line(1, f"{key}: {value(data[key])}", "as your recipe says")
        for key in ("group", "time", "weight")
        if data.get(key)
    ]
    if not data.get("time") and not data.get("group") and p["trends"]:
        column = p["trends"][0]["column"]
        told = "if rows are events in time: train on the past, test on the future"
        found.append(line(1, f"# time: {value(column)}", told))
    return found


def _columns(
    p: dict[str, Any], data: dict[str, Any], drop: dict[str, str], used: list[dict[str, Any]]
) -> list[str]:
    lines = []
    if drop:
        lines += [line(2, "drop:"), *(line(3, f"- {value(n)}", why) for n, why in drop.items())]
    for kind, key in KEYS.items():
        own = [c for c in used if c["kind"] == kind]
        if own:
            lines.append(line(2, f"{key}:", "stated, so that other rows change no type"))
            lines += [line(3, f"- {value(c['name'])}", _column_words(c, p["target"])) for c in own]
    if data.get("thousands"):
        lines.append(line(2, f"thousands: {value(data['thousands'])}", "as the numbers have it"))
    if data.get("decimal", ".") != ".":
        lines.append(line(2, f"decimal: {value(data['decimal'])}", "as the numbers have it"))
    return lines


def _column_words(c: dict[str, Any], target: dict[str, Any]) -> str:
    parts = [c["why"]]
    if c["kind"] == "number" and c.get("median") is not None:
        parts = [f"{c['least']:.4g} to {c['most']:.4g}, median {c['median']:.4g}"]
    if c["missing"]:
        parts.append(f"{c['missing']:,} missing")
    if c["bad"]:
        parts.append(f"{c['bad']:,} are no {c['kind']}")
    alone = target["features"].get(c["name"], {}).get("score") or 0
    if alone >= LEAK:
        told = f"{target['metric']} {alone:.3f} alone"
        parts.append(f"{told}: drop it if it is known only after {target['name']}")
    return ", ".join(parts)


def _cleaning(p: dict[str, Any], data: dict[str, Any], used: list[dict[str, Any]]) -> list[str]:
    lines = []
    bad = sum(c["bad"] for c in used)
    if bad or data.get("broken"):
        told = f"{bad:,} cells of another type, {data.get('broken', 0):,} broken rows: left out"
        lines.append(line(1, "on_error: skip", told))
    gaps = [c["name"] for c in used if c["missing"]]
    why = "nothing is missing now; what is later gets the median"
    if gaps:
        why = f"{', '.join(gaps)}: the median and a column that says so, or a value of its own"
    again = f"rows that equal an earlier one: {p['duplicates']:,}"
    lines += [
        line(1, "clean:"),
        line(2, "missing: auto", why),
        line(2, "duplicates: drop", again if p["duplicates"] else "there are none now"),
        line(1, "features:"),
    ]
    heavy = [c["name"] for c in used if c.get("outlier_share", 0) > OUTLYING]
    if heavy:
        told = f"by rank, since {', '.join(heavy)} have values far from the others"
        lines.append(line(2, "scale: quantile", told))
    else:
        lines.append(line(2, "scale: zscore", "no number has many values far from the others"))
    texts = [c for c in used if c["kind"] == "category"]
    widest = max(texts, key=lambda c: c["distinct"], default=None)
    why = f"an embedding for each; {widest['name']} has {widest['distinct']:,}" if widest else ""
    return [*lines, line(2, "encode: index", why)]


def _split(p: dict[str, Any], data: dict[str, Any]) -> list[str]:
    target, by = p["target"], "random"
    why = "equal rows stay on one side"
    if data.get("time") or data.get("group"):
        by = "time" if data.get("time") else "group"
        why = "as your recipe says"
    elif target["problem"] == "classification":
        by, why = "stratified", "each class has its share in every split"
    rows = p["rows"]
    held = 0.15 if rows < 100_000 else 0.05
    return [
        line(1, "split:"),
        line(2, f"by: {by}", why),
        line(2, f"validation: {held}", f"about {round(rows * held):,} rows, to choose by"),
        line(2, f"test: {held}", f"about {round(rows * held):,} rows, to judge by once"),
    ]


def _model(p: dict[str, Any], used: list[dict[str, Any]]) -> list[str]:
    rows, target = p["rows"], p["target"]
    small = rows < SMALL
    sizes, dropout, cut = ([64, 64], 0.2, 8) if small else ([256, 256], 0.1, 32)
    if not any(c["kind"] in ("number", "date") for c in used):
        cut = 0
    batch = 64 if small else 256 if rows < 200_000 else 2048
    epochs = max(10, min(100, round(STEPS * batch / (0.7 * rows)))) if rows > 0 else 10
    classes = target.get("classes") or {}
    rare = classes and min(classes.values()) < RARE * sum(classes.values())
    objective = ["objective:", line(1, "class_weights: balanced", "a class is rare")]
    size, most = f"{rows:,} rows", 10_000  # held-out rows that are looked at on the way
    return [
        line(0, "model:"),
        line(1, "architecture: mlp", "the simplest that learns interactions"),
        line(1, "config:"),
        line(2, f"hidden_sizes: {sizes}", size),
        line(2, f"dropout: {dropout}", "a small table is learned by heart" if small else size),
        line(2, f"bins: {cut}", "numbers in bins at quantiles" if cut else "there are no numbers"),
        line(2, "embedding_size: 8"),
        *(objective if rare else []),
        line(0, "training:"),
        line(1, f"epochs: {epochs}", f"about {round(epochs * rows * 0.7 / batch):,} steps"),
        line(1, f"global_batch: {batch}", size),
        line(1, f"micro_batch: {batch}"),
        line(1, "optimizer: {name: adamw, lr: 1.0e-3, weight_decay: 0.01}"),
        line(1, "schedule: {name: cosine, warmup: 0.05}"),
        line(1, "precision: fp32", "numbers of many digits stay what they are"),
        line(1, f"validate: {{every: 100, sequences: {most}, monitor: loss}}"),
        line(1, "checkpoint: {every: 1000, keep: 1}"),
    ]
