"""`gradsmith report`: what runs did, as one HTML file that needs nothing from outside.

A section for each run: headline figures, results, curves, data ledger, samples, what it ran on.
It reads what a run has written and knows no task: numbers are named and written as the metrics'
definitions say, figures are drawn as blocks (`report.blocks`). Whatever a run does not have yet is
left out or said to be missing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..blocks import BASE, Metric
from ..errors import UserError
from ..files import replacing
from ..reading import read_json
from ..run import Run
from ..shapes import DataSummary, Evaluation, Provenance, State
from . import blocks
from .page import Html, el, join, page
from .plots import Chart, Series, draw, is_finite, label, smooth
from .tables import count, duration, ledger, machinery

# Runs of before provenance.json had its metrics were language models.
EARLIER = (
    Metric("loss", "Loss", "nats per target token"),
    Metric("bits_per_byte", "Bits per byte", "of target text"),
    Metric("accuracy", "Next-token accuracy", "of target tokens", True, ".1%"),
)
LARGE = 2  # metrics with a large curve each; those of the others are small


def build_report(runs: Sequence[Run], out: Path, title: str | None = None) -> Path:
    """Writes a report about `runs`, in their order, to `out`, and returns `out`.

    Raises:
        UserError: a run's file cannot be read.
    """
    contents = [_Contents(run) for run in runs]
    title = title or " and ".join(c.recipe["name"] for c in contents)
    provenance = contents[0].provenance
    subtitle = " · ".join(
        str(part)
        for part in (
            provenance.get("cpu"),
            f"{provenance['cores']} cores" if provenance.get("cores") else None,
            str(provenance.get("created", "")).replace("T", " ")[:16],
        )
        if part
    )
    links = [el("a", c.heading, href=f"#run-{i}") for i, c in enumerate(contents)]
    header = el(
        "header",
        el("p", "gradsmith report", class_="eyebrow"),
        el("h1", title),
        el("p", subtitle, class_="soft"),
        el("nav", links) if len(contents) > 1 else None,
    )
    main = el("main", [_section(c, i) for i, c in enumerate(contents)])
    when = time.strftime("%Y-%m-%d %H:%M")
    footer = el("footer", f"Written by gradsmith on {when}. This file loads nothing from outside.")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    own = next((run for run in runs if run.report_path.resolve() == out.resolve()), None)
    with own.lock("results") if own else contextlib.nullcontext(), replacing(out) as file:
        file.write(page(title, join([header, main, footer])))
    return out


class _Contents:
    """What there is to tell about a run; {} or [] for what is not there."""

    def __init__(self, run: Run):
        self.recipe: dict[str, Any] = run.recipe().dump()
        # A later row for the same step replaces the earlier one.
        rows = {(row["kind"], row["step"]): row for row in run.read_metrics()}
        ordered = sorted(rows.values(), key=lambda row: row["step"])
        self.train = [row for row in ordered if row["kind"] == "train"]
        self.validation = [row for row in ordered if row["kind"] == "validation"]
        self.evaluation = _read(run.evaluation_path, Evaluation)
        self.provenance = _read(run.provenance_path, Provenance)
        self.manifest = _read(run.data / "manifest.json", DataSummary)
        self.best: dict[str, Any] = {}  # {metric, step} of the best checkpoint, where it is kept
        for _, newest in run.steps()[:1]:
            with contextlib.suppress(UserError):  # a damaged one, which is said elsewhere
                self.best = _read(newest / "state.json", State).get("best") or {}
        self.unit: str = self.provenance.get("unit") or "tokens"
        stored = self.provenance.get("metrics") or []
        self.metrics = [Metric.read(entry) for entry in stored] or list(EARLIER)
        self.definitions = [Metric.read(d) for d in self.evaluation.get("definitions") or []]
        self.results: list[dict[str, Any]] = self.evaluation.get("results") or []
        self.blocks: list[dict[str, Any]] = self.evaluation.get("blocks") or []

    @property
    def heading(self) -> str:
        from_nothing = "Pretrain" if self.unit == "tokens" else "Train"
        return f"{'Fine-tune' if self.recipe['model']['from'] else from_nothing}: {self.name}"

    @property
    def name(self) -> str:
        return str(self.recipe["name"])


def _read(path: Path, shape: type) -> dict[str, Any]:
    return read_json(path, shape) if path.is_file() else {}


def _section(c: _Contents, index: int) -> Html:
    lead = c.evaluation.get("lead")
    texts = [block for block in c.blocks if block["kind"] in ("samples", "images")]
    return el(
        "section",
        el("h2", c.heading),
        el("p", _summary(c), class_="soft"),
        [el("p", text, class_="warning") for text in _warnings(c)],
        el("p", lead, class_="lead") if lead else None,
        _tiles(c),
        _results(c),
        blocks.draw(block for block in c.blocks if block not in texts),
        _curves(c),
        ledger(c.manifest),
        blocks.draw(texts),
        machinery(c.recipe, c.provenance, c.manifest),
        id=f"run-{index}",
    )


def _summary(c: _Contents) -> str:
    model, training, data = c.recipe["model"], c.recipe["training"], c.recipe["data"]
    what = model["architecture"] or f"from {model['from']}"
    if model["adapter"]:
        what += f", LoRA rank {model['adapter']['rank']}"
    total, trained = c.provenance.get("parameters"), c.provenance.get("trainable_parameters")
    if total:
        what += f", {count(total)} parameters"
        if trained and trained != total:
            what += f" ({count(trained)} trained)"
    auto = " (auto)" if (c.provenance.get("precision") or {}).get("asked") == "auto" else ""
    rows = c.unit
    if length := data.get("sequence_length"):
        rows = f"sequences of {length} tokens"
    return (
        f"{what[0].upper()}{what[1:]}. {data['task'].replace('_', ' ').capitalize()}, "
        f"{training['global_batch']} {rows} in a step, "
        f"{training['precision']}{auto}, ZeRO stage {training['zero']['stage']}."
    )


def _warnings(c: _Contents) -> list[str]:
    out = []
    if price := (c.provenance.get("precision") or {}).get("price"):
        out.append(f"{price}. training.precision: auto takes the faster one.")
    if not c.train:
        out.append("No training step has been logged yet.")
    odd = [row["step"] for row in c.train if not is_finite(row.get("loss"))]
    if odd:
        steps = ", ".join(map(str, odd[:8])) + (", ..." if len(odd) > 8 else "")
        out.append(f"The loss was not a finite number in {len(odd)} logged steps: {steps}.")
    skipped = sum(bool(row.get("skipped")) for row in c.train)
    if skipped:
        out.append(f"{skipped} logged steps changed nothing: their gradient was not finite.")
    if c.train and not c.evaluation:
        out.append("Not evaluated yet: gradsmith evaluate adds results and samples.")
    elif c.evaluation and not c.results:
        out.append("Evaluated by an earlier version: gradsmith evaluate shows its results here.")
    step = c.evaluation.get("step")
    if step is not None and c.train and step < c.train[-1]["step"] and step != c.best.get("step"):
        out.append(
            f"Evaluated at step {step:,}, but trained on since, to step {c.train[-1]['step']:,}: "
            "gradsmith evaluate brings the results up to date."
        )
    return out


def _tiles(c: _Contents) -> Html | None:
    """Headline figures: (what, value, how to read it)."""
    tiles: list[tuple[str, str, str]] = []
    for metric in c.definitions[:2]:
        ours, *others = [
            (row["name"], row["values"][metric.name])
            for row in sorted(c.results, key=lambda row: not row.get("ours"))
            if is_finite(row["values"].get(metric.name))
        ] or [("", math.nan)]
        if is_finite(ours[1]):
            beside = others[:1] + others[1:][-1:]  # the base or simplest, and the strongest
            told = ", ".join(_compared(metric, ours[1], value, name) for name, value in beside)
            text = "; ".join(part for part in (metric.unit, told) if part)
            tiles.append((metric.title, blocks.shown(ours[1], metric.format), text))
    monitored = c.metrics[0]
    if not tiles and c.validation and is_finite(c.validation[-1].get(monitored.name)):
        last = c.validation[-1]
        unit = f"{monitored.unit}, " if monitored.unit else ""
        value = blocks.shown(last[monitored.name], monitored.format)
        tiles.append((f"Validation {monitored.words}", value, f"{unit}step {last['step']:,}"))
    if c.train:
        last = c.train[-1]
        text = f"{last['step']:,} steps"
        if c.provenance.get("seconds"):
            text += f" in {duration(c.provenance['seconds'])}"
        if minutes := c.recipe["training"].get("minutes"):
            text += f", of {minutes:g} minutes"
        tiles.append((f"{c.unit.capitalize()} trained on", count(last.get(c.unit, 0)), text))
        key = f"{c.unit}_per_second"
        speeds = sorted(row[key] for row in c.train if is_finite(row.get(key)))
        if speeds:
            world = c.provenance.get("world", 1)
            text = f"{c.unit} per second, median{f', {world} ranks' if world > 1 else ''}"
            waits = [row["waiting"] for row in c.train if is_finite(row.get("waiting"))]
            if waits:
                text += f"; {sum(waits) / len(waits):.1%} of the time waiting for data"
            tiles.append(("Speed", label(speeds[len(speeds) // 2]), text))
    cells = [
        el("div", el("span", what), el("b", value), el("span", text),
           class_="tile" if i else "tile first")
        for i, (what, value, text) in enumerate(tiles)
    ]  # fmt: skip
    return el("div", cells, class_="tiles") if cells else None


def _compared(metric: Metric, ours: float, other: float, name: str) -> str:
    """ "50% below NAME" of errors, which have no top; of what is to be great the difference."""
    level, apart = blocks.shown(0.0, metric.format), abs(ours - other)
    if metric.format.endswith("%"):
        size = f"{100 * apart:.1f} points"
        level = "0.0 points"
    elif metric.greater_is_better:
        size = blocks.shown(apart, metric.format)
    elif other > 0:
        level, size = "0%", f"{apart / other:.0%}"
    else:
        return f"{name} {blocks.shown(other, metric.format)}"
    side = "below" if ours < other else "above"
    return f"level with {name}" if size == level else f"{size} {side} {name}"


def _results(c: _Contents) -> Html | None:
    if not c.results or not c.definitions:
        return None
    first = c.definitions[0]
    better = "Higher" if first.greater_is_better else "Lower"
    note = f"{better} {first.words} is better. "
    step = c.evaluation.get("step")
    if step is not None and step == c.best.get("step"):
        note += f"Of step {step:,}, the best of the run by its validation {c.best['metric']}. "
    return join(
        [
            el("h3", "Results"),
            blocks.results(c.definitions, c.results),
            el("p", note, c.evaluation.get("note"), class_="note"),
        ]
    )


# ------------------------------------------------------------------------------------ curves


def _curves(c: _Contents) -> Html | None:
    if not c.train and not c.validation:
        return None
    named = [m for m in c.metrics if any(m.name in row for row in c.validation)]
    large = named[:LARGE]
    if not any(m.name == "loss" for m in large):
        large = [next((m for m in c.metrics if m.name == "loss"), Metric("loss", "Loss")), *large]
    small = [
        Chart(
            name,
            [Series(name.lower(), points)],
            "step",
            unit,
            log_y=key == "grad_norm" and _spread(points) > 8,
            from_zero=key != "grad_norm",
        )
        for name, key, unit in (
            ("Learning rate", "lr", "at each step"),
            ("Gradient norm", "grad_norm", "before clipping"),
            ("Speed", f"{c.unit}_per_second", f"{c.unit} per second"),
        )
        for points in [_points(c.train, key)]
    ]
    small = [*(_metric_chart(c, m) for m in named if m not in large), *small]
    for chart in small:
        chart.width, chart.height = (270, 190) if len(small) == 4 else (340, 215)
    many = " many" if len(small) > 4 else ""
    return join(
        [
            el("h3", "Curves"),
            el("div", [draw(_metric_chart(c, m)) for m in large], class_="charts two"),
            el("div", [draw(chart) for chart in small], class_=f"charts three{many}"),
        ]
    )


def _metric_chart(c: _Contents, metric: Metric) -> Chart:
    """A metric over the run; the loss of training too, and the levels of the baselines."""
    validation = _points(c.validation, metric.name)
    series = [Series("validation", validation, "s1", dots=True)]
    points, references, unit = validation, [], metric.unit
    if metric.name == "loss":
        losses = _points(c.train, "loss")
        points = [*losses, *validation]
        window = len(losses) // 20
        if window > 2:
            smoothed = Series("training, smoothed", smooth(losses, window))
            series = [Series("each step", losses, faint=True), smoothed, *series]
        else:
            series = [Series("training", losses), *series]
    else:
        references = [
            (row["name"], row["values"][metric.name])
            for row in c.results
            if metric.name in row["values"] and not row.get("ours") and row["name"] != BASE
        ]
        if references:
            dashed = f"dashed: baselines on the {c.evaluation['split']} split"
            unit = f"{unit}; {dashed}" if unit else dashed
    log_y = not metric.greater_is_better and _spread(points) > 2.5
    return Chart(metric.title, series, "step", unit, references=references, log_y=log_y)


def _points(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (row["step"], row[key] if is_finite(row.get(key)) else math.nan)
        for row in rows
        if key in row
    ]


def _spread(points: Iterable[tuple[float, float]]) -> float:
    values = [y for _, y in points if math.isfinite(y) and y > 0]
    return max(values) / min(values) if values else 1.0
