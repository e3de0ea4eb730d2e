"""`gradsmith report`: what runs did, as one HTML file that needs nothing from outside.

A section for each run: headline figures, results, curves, data ledger, samples, what it ran on.
Whatever a run does not have yet is left out or said to be missing.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..console import bytes_in_words
from ..errors import UserError
from ..evaluation.evaluate import yardstick_rows
from ..files import replacing
from ..reading import read_json
from ..run import Run
from ..shapes import DataSummary, Evaluation, Provenance
from .page import page
from .plots import Chart, Series, draw, is_finite, label, smooth

SPLITS = ("train", "validation", "test")


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
    links = "".join(f'<a href="#run-{i}">{escape(c.heading)}</a>' for i, c in enumerate(contents))
    body = [
        '<header><p class="eyebrow">gradsmith report</p>',
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>',
        f"<nav>{links}</nav>" if len(contents) > 1 else "",
        "</header><main>",
        *(_section(c, i) for i, c in enumerate(contents)),
        "</main>",
        f"<footer>Written by gradsmith on {time.strftime('%Y-%m-%d %H:%M')}. "
        "This file loads nothing from outside.</footer>",
    ]
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    own = next((run for run in runs if run.report_path.resolve() == out.resolve()), None)
    with own.lock("results") if own else contextlib.nullcontext(), replacing(out) as file:
        file.write(page(title, "\n".join(body)))
    return out


class _Contents:
    """What there is to tell about a run; {} or [] for what is not there."""

    def __init__(self, run: Run):
        self.run = run
        self.recipe: dict[str, Any] = run.recipe().dump()
        # A later row for the same step replaces the earlier one.
        rows = {(row["kind"], row["step"]): row for row in run.read_metrics()}
        ordered = sorted(rows.values(), key=lambda row: row["step"])
        self.train = [row for row in ordered if row["kind"] == "train"]
        self.validation = [row for row in ordered if row["kind"] == "validation"]
        self.evaluation = _read(run.evaluation_path, Evaluation)
        self.provenance = _read(run.provenance_path, Provenance)
        self.manifest = _read(run.data / "manifest.json", DataSummary)

    @property
    def heading(self) -> str:
        return f"{'Fine-tune' if self.recipe['model']['from'] else 'Pretrain'}: {self.name}"

    @property
    def name(self) -> str:
        return str(self.recipe["name"])


def _read(path: Path, shape: type) -> dict[str, Any]:
    return read_json(path, shape) if path.is_file() else {}


def _section(c: _Contents, index: int) -> str:
    parts = [
        f'<section id="run-{index}"><h2>{escape(c.heading)}</h2>',
        f'<p class="soft">{escape(_summary(c))}</p>',
        _warnings(c),
        _improvement(c),
        _tiles(c),
        _results(c),
        _curves(c),
        _ledger(c),
        _samples(c),
        _machinery(c),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


# ----------------------------------------------------------------------------------- figures


def _summary(c: _Contents) -> str:
    model, training, data = c.recipe["model"], c.recipe["training"], c.recipe["data"]
    what = model["architecture"] or f"from {model['from']}"
    if model["adapter"]:
        what += f", LoRA rank {model['adapter']['rank']}"
    total, trained = c.provenance.get("parameters"), c.provenance.get("trainable_parameters")
    if total:
        what += f", {_count(total)} parameters"
        if trained and trained != total:
            what += f" ({_count(trained)} trained)"
    asked = (c.provenance.get("precision") or {}).get("asked")
    auto = " (auto)" if asked == "auto" else ""
    return (
        f"{what[0].upper()}{what[1:]}. {data['task'].replace('_', ' ').capitalize()}, "
        f"{training['global_batch']} sequences of {data['sequence_length']} tokens in a step, "
        f"{training['precision']}{auto}, ZeRO stage {training['zero']['stage']}."
    )


def _warnings(c: _Contents) -> str:
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
    step = c.evaluation.get("step")
    if step is not None and c.train and step < c.train[-1]["step"]:
        out.append(
            f"Evaluated at step {step:,}, but trained on since, to step {c.train[-1]['step']:,}: "
            "gradsmith evaluate brings the results up to date."
        )
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in out)


def _improvement(c: _Contents) -> str:
    """What fine-tuning has changed, in a sentence."""
    metrics, base = c.evaluation.get("metrics"), c.evaluation.get("base")
    if not metrics or not base or not is_finite(metrics["loss"]) or not is_finite(base["loss"]):
        return ""
    what = "answers" if c.evaluation.get("task") == "chat" else "text"
    before, after = base["loss"], metrics["loss"]
    text = (
        f"Loss on held-out {what}: {before:.2f} nats per token before fine-tuning, {after:.2f} "
        f"after ({after / before - 1:+.0%}). Next-token accuracy: {base['accuracy']:.1%} before, "
        f"{metrics['accuracy']:.1%} after."
    )
    return f'<p class="lead">{escape(text)}</p>'


def _tiles(c: _Contents) -> str:
    tiles: list[tuple[str, str, str]] = []
    metrics, base = c.evaluation.get("metrics"), c.evaluation.get("base")
    if metrics and is_finite(metrics["bits_per_byte"]):
        ours = metrics["bits_per_byte"]
        beside = [("its base", base["bits_per_byte"])] if base else []
        beside += yardstick_rows(c.evaluation)
        text = ", ".join(_compared(ours, value, name) for name, value in beside[:1])
        ngram = [row for row in beside[1:] if "gram" in row[0]]
        text += "".join(", " + _compared(ours, v, n.split(" (")[0]) for n, v in ngram)
        what = "held-out answers" if c.evaluation.get("task") == "chat" else "held-out text"
        tiles.append((f"Bits per byte of {what}", f"{ours:.3f}", text))
        if "rouge_l" in metrics:
            text = f"base {base['rouge_l']:.3f}; " if base and "rouge_l" in base else ""
            text += f"{metrics['rouge_l_pairs']} held-out pairs, greedy"
            tiles.append(("ROUGE-L of its answers", f"{metrics['rouge_l']:.3f}", text))
        else:
            text = f"perplexity {label(metrics['perplexity'])}"
            tiles.append(("Next-token accuracy", f"{metrics['accuracy']:.1%}", text))
    elif c.validation and is_finite(c.validation[-1].get("loss")):
        last = c.validation[-1]
        text = f"nats per token, step {last['step']:,}"
        tiles.append(("Validation loss", f"{last['loss']:.3f}", text))
    if c.train:
        last = c.train[-1]
        text = f"{last['step']:,} steps"
        if c.provenance.get("seconds"):
            text += f" in {_duration(c.provenance['seconds'])}"
        if minutes := c.recipe["training"].get("minutes"):
            text += f", of {minutes:g} minutes"
        tiles.append(("Tokens trained on", _count(last.get("tokens", 0)), text))
        speeds = sorted(
            row["tokens_per_second"] for row in c.train if is_finite(row.get("tokens_per_second"))
        )
        if speeds:
            world = c.provenance.get("world", 1)
            text = f"tokens per second, median{f', {world} ranks' if world > 1 else ''}"
            tiles.append(("Speed", label(speeds[len(speeds) // 2]), text))
    cells = [
        f'<div class="tile{" first" if i == 0 else ""}"><span>{escape(what)}</span>'
        f"<b>{escape(value)}</b><span>{escape(text)}</span></div>"
        for i, (what, value, text) in enumerate(tiles)
    ]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def _compared(ours: float, other: float, name: str) -> str:
    if not other > 0:
        return f"{name} {other:g}"
    share = ours / other - 1
    if abs(share) < 0.005:
        return f"level with {name}"
    return f"{abs(share):.0%} {'below' if share < 0 else 'above'} {name}"


def _results(c: _Contents) -> str:
    if not c.evaluation:
        return ""
    metrics, base = c.evaluation["metrics"], c.evaluation.get("base")
    rows = [("this model", metrics["bits_per_byte"], metrics, "ours")]
    if base:
        rows.append(("base, before fine-tuning", base["bits_per_byte"], base, ""))
    rows += [(name, value, {}, "") for name, value in yardstick_rows(c.evaluation)]
    rows.sort(key=lambda row: row[1] if is_finite(row[1]) else math.inf)
    longest = max((value for _, value, _, _ in rows if is_finite(value)), default=1.0) or 1.0
    rouge = "rouge_l" in metrics
    heads = ["Loss, nats/token", "Perplexity", "Next-token accuracy"] + ["ROUGE-L"] * rouge
    body = []
    for name, value, more, kind in rows:
        cells = ["", "", ""] + [""] * rouge
        if more:
            cells = [label(more["loss"]), label(more["perplexity"]), f"{more['accuracy']:.1%}"]
            cells += [f"{more['rouge_l']:.3f}" if "rouge_l" in more else ""] * rouge
        body.append(
            f'<tr class="{kind}"><th>{escape(name)}</th><td class="number">{value:.3f}</td>'
            f"{_bar(value / longest)}"
            + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
            + "</tr>"
        )
    note = (
        f"The {escape(c.evaluation['split'])} split: {metrics['bytes']:,} bytes, "
        f"{metrics['target_tokens']:,} target tokens, held out from training. "
        "Lower bits per byte is better. "
    )
    if c.evaluation.get("task") == "chat":
        note += (
            "Only the answers count; the models see the questions, the yardsticks do not. "
            "ROUGE-L is the F1 of the longest common subsequence of words of a greedy answer "
            f"and the reference, the mean over {metrics.get('rouge_l_pairs', 0)} held-out pairs. "
        )
    note += (
        "xz compresses the same bytes as one stream; the n-gram is trained on the training "
        "split's text and predicts each byte from those before it. The model pays for the ends "
        "of documents too, the yardsticks do not."
    )
    return (
        '<h3>Results</h3><div class="panel scroll"><table class="results"><thead><tr><th></th>'
        '<th class="number">Bits per byte</th><th class="bar"></th>'
        + "".join(f'<th class="number">{head}</th>' for head in heads)
        + f'</tr></thead><tbody>{"".join(body)}</tbody></table></div><p class="note">{note}</p>'
    )


def _bar(share: float) -> str:
    width = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return (
        '<td class="bar"><svg preserveAspectRatio="none" viewBox="0 0 100 12" aria-hidden="true">'
        f'<rect width="{width:.1f}" height="12"/></svg></td>'
    )


# ------------------------------------------------------------------------------------ curves


def _curves(c: _Contents) -> str:
    if not c.train and not c.validation:
        return ""
    losses = _points(c.train, "loss")
    validation = _points(c.validation, "loss")
    window = len(losses) // 20
    training = [Series("training", losses)]
    if window > 2:
        smoothed = Series("training, smoothed", smooth(losses, window))
        training = [Series("each step", losses, faint=True), smoothed]
    large = [
        Chart(
            "Loss",
            [*training, Series("validation", validation, "s1", dots=True)],
            "step",
            "nats per target token",
            log_y=_spread([*losses, *validation]) > 2.5,
        )
    ]
    if c.validation:
        chat = c.recipe["data"]["task"] == "chat"
        yardsticks = [(n.split(" (")[0], v) for n, v in yardstick_rows(c.evaluation)]
        bits = _points(c.validation, "bits_per_byte")
        unit = "of validation answers" if chat else "of validation text"
        if yardsticks:
            unit += f"; dashed: yardsticks on the {c.evaluation['split']} split"
        large.append(
            Chart(
                "Bits per byte",
                [Series("validation", bits, "s1", dots=True)],
                "step",
                unit,
                references=yardsticks,
                log_y=_spread(bits) > 2.5,
            )
        )
    small = []
    for name, key, unit in (
        ("Learning rate", "lr", "at each step"),
        ("Gradient norm", "grad_norm", "before clipping"),
        ("Speed", "tokens_per_second", "tokens per second"),
    ):
        points = _points(c.train, key)
        small.append(
            Chart(
                name,
                [Series(name.lower(), points)],
                "step",
                unit,
                log_y=key == "grad_norm" and _spread(points) > 8,
                from_zero=key != "grad_norm",
                width=340,
                height=215,
            )
        )
    return (
        f'<h3>Curves</h3><div class="charts two">{"".join(map(draw, large))}</div>'
        f'<div class="charts three">{"".join(map(draw, small))}</div>'
    )


def _points(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (row["step"], row[key] if is_finite(row.get(key)) else math.nan)
        for row in rows
        if key in row
    ]


def _spread(points: Iterable[tuple[float, float]]) -> float:
    values = [y for _, y in points if math.isfinite(y) and y > 0]
    return max(values) / min(values) if values else 1.0


# -------------------------------------------------------------------------------------- data

_ORDER = ("in", "dropped", "joined", "truncated", "masked", "kept", *SPLITS)


def _ledger(c: _Contents) -> str:
    if not c.manifest:
        return ""
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in c.manifest.get("ledger", []):
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
            why = f"{why} ({source})" if why and source else why or source
            head = f'<th rowspan="{len(rows)}">{escape(step)}</th>' if row is rows[0] else ""
            lines.append(
                f'<tr class="{kind}">{head}<td>{escape(what)}</td>'
                f'<td class="number">{f"{documents:,}" if documents or not tokens else ""}</td>'
                f'{_bar(share)}<td class="number">{f"{tokens:,}" if tokens else ""}</td>'
                f"<td>{escape(why)}</td></tr>"
            )
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    ledger = (
        '<div class="panel scroll"><table class="ledger"><thead><tr><th>Step</th><th></th>'
        '<th class="number">Documents</th><th class="bar"></th><th class="number">Tokens</th>'
        f"<th>Reason, source</th></tr></thead>{''.join(bodies)}</table></div>"
    )
    splits = c.manifest.get("splits", {})
    sizes = [
        [
            name,
            f"{splits[name]['documents']:,}",
            f"{splits[name]['tokens']:,}",
            f"{splits[name]['target_tokens']:,}",
            bytes_in_words(splits[name]["bytes"]),
        ]
        for name in SPLITS
        if name in splits
    ]
    sources = [
        [
            source.get("kind", ""),
            source.get("path") or "",
            f"{source.get('files', 0):,}" if isinstance(source.get("files"), int) else "",
            bytes_in_words(source["bytes"]) if source.get("bytes") is not None else "",
        ]
        for source in c.manifest.get("sources", [])
    ]
    return (
        "<h3>Data: what came in, what left, what was trained on</h3>"
        + (ledger if bodies else "")
        + '<div class="columns below">'
        + _table("Splits", ["", "Documents", "Tokens", "Targets", "Text"], sizes, numbers=1)
        + _table("Sources", ["Kind", "Path", "Files", "Size"], sources, numbers=2)
        + "</div>"
    )


def _table(title: str, heads: list[str], rows: list[list[str]], numbers: int) -> str:
    """A small table in a panel; the columns from `numbers` on are right-aligned."""
    if not rows:
        return ""

    def line(tag: str, cells: list[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if i >= numbers else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return (
        f'<div class="panel scroll"><h3>{escape(title)}</h3><table>'
        + (f"<thead><tr>{line('th', heads)}</tr></thead>" if heads else "")
        + f"<tbody>{body}</tbody></table></div>"
    )


# ----------------------------------------------------------------------------------- samples


def _samples(c: _Contents) -> str:
    drawn = c.evaluation.get("samples") or []
    samples = [sample for sample in drawn if sample["output"].strip()]
    if not drawn:
        return ""
    chat = c.evaluation.get("task") == "chat"
    names = ("The question", "its answer") if chat else ("It begins", "the model goes on")
    cards = []
    for sample in samples:
        texts = [(names[1], sample["output"], " class=ours")]
        if sample.get("base_output") is not None:
            texts.append(("the base, before fine-tuning", sample["base_output"], ""))
        if sample.get("reference") is not None:
            texts.append(("the reference" if chat else "as it was", sample["reference"], ""))
        blocks = "".join(
            f"<div><h4{kind}>{escape(name)}</h4><pre>{escape(text) or '(nothing)'}</pre></div>"
            for name, text, kind in texts
        )
        cards.append(
            f'<div class="sample"><h4>{names[0]}</h4><pre class="prompt">'
            f'{escape(sample["prompt"]) or "(nothing)"}</pre><div class="columns">{blocks}</div>'
            "</div>"
        )
    settings = c.evaluation.get("generation") or {}
    note = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items())
    blank = len(drawn) - len(samples)
    left_out = f" {blank} of {len(drawn)} came out blank and are left out." if blank else ""
    return (
        f"<h3>Samples</h3>{''.join(cards)}"
        f'<p class="note">Drawn once and shown as they came: {escape(note)}.{left_out}</p>'
    )


# ---------------------------------------------------------------------------- what it ran on


def _machinery(c: _Contents) -> str:
    p = c.provenance
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
        ("seed", c.recipe["seed"]),
        ("command", " ".join(p.get("command", []))),
        ("data", c.manifest.get("data_hash", "")[:16]),
    ]
    tables = [
        _table(
            "Kernels",
            ["Op", "Backend"],
            [[op, str(backend)] for op, backend in (p.get("backends") or {}).items()]
            + _replaced(p.get("accelerate") or {}),
            numbers=2,
        ),
        _table("Machine", [], [[k, str(v)] for k, v in facts if v], numbers=2),
        _table(
            "Versions",
            [],
            [[name, version] for name, version in versions.items()],
            numbers=2,
        ),
    ]
    recipe = yaml.safe_dump(c.recipe, sort_keys=False, allow_unicode=True)
    return (
        f'<h3>What it ran on</h3><div class="columns">{"".join(tables)}</div>'
        "<details><summary>The recipe, as resolved</summary>"
        f"<pre>{escape(recipe)}</pre></details>"
    )


def _replaced(report: dict[str, Any]) -> list[list[str]]:
    """What `accelerate` put under the model, and what it left alone and why, counted."""
    counts = Counter(
        (f"{op} under the model", backend)
        for op, backend in (report.get("replaced") or {}).values()
    )
    counts.update(("left alone", why) for why in (report.get("left_alone") or {}).values())
    rows = [
        [what, f"{how}, {count} module{'s' * (count > 1)}"] for (what, how), count in counts.items()
    ]
    return rows + [["freed memory", "kept for the next tensors"]] * bool(report.get("memory"))


def _flat(value: Any) -> str:
    """A value of provenance in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return value if isinstance(value, str) else json.dumps(value)


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
