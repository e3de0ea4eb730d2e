from __future__ import annotations

import html
import json
import math
import os
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from gradsmith.blocks import BASE, OURS
from gradsmith.recipe import parse_recipe
from gradsmith.report.build import build_report
from gradsmith.report.plots import Chart, Series, draw, label, log_ticks, smooth, thin, ticks
from gradsmith.run import Run, read_json, write_json
from gradsmith.tasks.language_modeling.examine import definitions, lead, note

EVIL = '</pre><script>alert("x")</script><img src=x onerror=alert(1)> & \'quoted\' "'
VOID = {"meta", "line", "circle", "path", "rect", "img", "br"}


class Page(HTMLParser):
    """Tags that match, the text, the scripts, and whatever could load something."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data


def recipe_for(folder, **model):
    chat = "from" in model
    return parse_recipe(
        {
            "name": "tiny",
            "output": str(folder),
            "data": {
                "task": "chat" if chat else "language_modeling",
                "sources": [{"kind": "text", "path": f"{folder}/{EVIL.replace('/', '')}"}],
                "tokenizer": None if chat else {"train": {"vocab_size": 300}},
            },
            "model": model or {"architecture": "llama"},
            "training": {"steps": 100},
        }
    )


def make_run(folder, steps=60, evaluated=True, prepared=True, **model) -> Run:
    run = Run(folder)
    run.write_recipe(recipe_for(folder, **model))
    for step in range(1, steps + 1):
        row = {
            "kind": "train", "step": step, "tokens": step * 4096, "loss": 9 / math.sqrt(step),
            "lr": 1e-3 * (1 - step / 100), "grad_norm": 3 / step, "time": float(step),
            "tokens_per_second": 5000.0 + step,
        }  # fmt: skip
        run.append_metrics(row)
        if step % 10 == 0:
            run.append_metrics(row | {"kind": "validation", "bits_per_byte": 4 / math.sqrt(step)})
    run.write_provenance(
        parameters=12_345_678,
        world=2,
        seconds=3700,
        zero={"stage": 1, "offload": "none"},
        backends={"rms_norm": EVIL},
        accelerate={"replaced": {"a": ["rms_norm", "cpu"], "b": ["rms_norm", "cpu"]},
                    "left_alone": {"c": EVIL}},
    )  # fmt: skip
    if prepared:
        run.data.mkdir()
        sizes = {"documents": 7, "tokens": 4321, "target_tokens": 4314, "bytes": 123_456}
        ledger = [
            {"step": "read", "what": "in", "documents": 10, "source": EVIL},
            {"step": "read", "what": "dropped", "documents": 3, "reason": EVIL},
            {"step": "read", "what": "kept", "documents": 7},
            {"step": "targets", "what": "masked", "documents": 0, "tokens": 7, "reason": "BOS"},
        ]
        sources = [{"kind": "text", "path": EVIL, "files": 2, "bytes": 5_000_000}]
        write_json(
            run.data / "manifest.json",
            {"data_hash": "ab" * 32, "sources": sources, "ledger": ledger,
             "splits": dict.fromkeys(("train", "validation", "test"), sizes)},
        )  # fmt: skip
    if evaluated:
        metrics = {
            "loss": 2.0, "perplexity": math.exp(2), "bits_per_byte": 1.25, "accuracy": 0.5,
            "target_tokens": 4314, "bytes": 123_456, "sequences": 9,
        }  # fmt: skip
        before = {"bits_per_byte": 2.0, "loss": 4.0, "accuracy": 0.25}
        results = [{"name": OURS, "values": metrics, "ours": True}]
        if model:
            results.append({"name": BASE, "values": metrics | before, "note": "before fine-tuning"})
        baselines = [
            {"name": "xz -9e", "values": {"bits_per_byte": 2.5}},
            {"name": "xz -9e behind 8.4 MB of training text", "values": {"bits_per_byte": 1.0}},
            {"name": "byte 8-gram", "values": {"bits_per_byte": 1.0}, "note": "Kneser-Ney"},
        ]
        sample = [
            {"name": "It begins", "text": EVIL},
            {"name": "on", "text": EVIL, "ours": True},
            {"name": "as it was", "text": EVIL},
        ]
        if model:
            sample.append({"name": "the base", "text": EVIL})
        chat = bool(model)
        write_json(
            run.evaluation_path,
            {"split": "test", "task": "chat" if chat else "language_modeling",
             "metrics": metrics, "results": [*results, *baselines],
             "definitions": [asdict(m) for m in definitions(metrics, chat)],
             "blocks": [{"kind": "samples", "title": "Samples", "samples": [sample],
                         "settings": {"temperature": 0.7, "seed": 1}}],
             "lead": lead(results, chat), "note": note(metrics, "test", baselines, chat)},
        )  # fmt: skip
    return run


def build(runs, folder, **more) -> tuple[str, Page]:
    text = build_report(runs, folder / "out" / "report.html", **more).read_text()
    return text, Page(text)


def test_a_whole_report_of_two_runs(tmp_path):
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", **{"from": "runs/a", "adapter": {"rank": 4}}),
    ]
    _, page = build(runs, tmp_path, title="Both")
    for expected in (
        "Both", "Pretrain: tiny", "Fine-tune: tiny", "1.250", "50% below xz -9e",
        "25% above byte 8-gram", "38% below its base", "12.3 M parameters", "246 k",
        "1 h 01 min", "rms_norm under the model", "cpu, 2 modules", "123.5 kB", "stage: 1",
        "LoRA rank 4", "abababababababab",
        "held-out answers: 4.00 nats per token before fine-tuning, 2.00 after (-50%)",
        "accuracy: 25.0% before, 50.0% after",
    ):  # fmt: skip
        assert expected in page.text, expected
    charts = [a for _, a in page.tags if "data-chart" in a]
    assert len(charts) == 10
    names = [[s["name"] for s in json.loads(c["data-chart"])["series"]] for c in charts]
    assert names[0] == ["training, smoothed", "validation"]
    assert names[1] == ["validation"]


def test_blank_samples_are_left_out_and_counted(tmp_path):
    run = make_run(tmp_path / "a")
    found = read_json(run.evaluation_path)

    def sample(prompt: str, output: str) -> list[dict]:
        return [{"name": "p", "text": prompt}, {"name": "o", "text": output, "ours": True}]

    blank = sample("of a blank one", " \n\t")
    (block,) = found["blocks"]
    samples = [sample("a prompt", "an output"), blank, blank]
    write_json(run.evaluation_path, {**found, "blocks": [{**block, "samples": samples}]})
    _, page = build([run], tmp_path)
    assert "an output" in page.text
    assert "of a blank one" not in page.text
    assert "2 of 3 came out blank and are left out." in page.text


def test_minutes_and_what_they_reached(tmp_path):
    run = make_run(tmp_path / "a")
    recipe = run.recipe()
    lengths = {"steps": None, "minutes": 61.5}
    training = recipe.training.model_copy(update=lengths)
    run.write_recipe(recipe.model_copy(update={"training": training}))
    _, page = build([run], tmp_path)
    assert "60 steps in 1 h 01 min, of 61.5 minutes" in page.text
    assert "246 k" in page.text


def test_nothing_is_loaded_and_only_our_script_runs(tmp_path):
    text, page = build([make_run(tmp_path / "a")], tmp_path, title=EVIL)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None
                assert value.startswith("#"), (tag, name, value)
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_what_users_wrote_is_shown_and_not_run(tmp_path):
    adapter = {"from": "runs/a", "adapter": {}}
    text, page = build([make_run(tmp_path / "a", **adapter)], tmp_path, title=EVIL)
    assert EVIL not in text
    # title twice, ledger twice, source, backend, left alone, and a sample's four texts
    assert page.text.count(EVIL) >= 11


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_young_run(tmp_path, steps):
    _, page = build([make_run(tmp_path / "a", steps, evaluated=False, prepared=False)], tmp_path)
    if steps:
        assert "Not evaluated yet" in page.text
    else:
        assert "No training step has been logged yet" in page.text


def test_a_run_that_is_only_a_recipe(tmp_path):
    run = Run(tmp_path / "a")
    run.write_recipe(recipe_for(run.folder))
    _, page = build([run], tmp_path)
    assert "No training step" in page.text


def test_results_of_an_earlier_step_are_said_to_be_that(tmp_path):
    run = make_run(tmp_path / "a", steps=40)
    for step, warned in ((40, False), (30, True)):
        write_json(run.evaluation_path, {**read_json(run.evaluation_path), "step": step})
        assert ("Evaluated at step 30" in build([run], tmp_path)[1].text) == warned


def test_results_of_the_best_step_are_no_old_ones(tmp_path):
    run = make_run(tmp_path / "a", steps=40)
    write_json(run.evaluation_path, {**read_json(run.evaluation_path), "step": 30})
    folder = run.checkpoints / "step-000040"
    folder.mkdir(parents=True)
    best = {"metric": "loss", "value": 1.5, "step": 30, "since": 1}
    for found in (best, {**best, "step": 20}):
        write_json(folder / "state.json", {"step": 40, "best": found})
        text = build([run], tmp_path)[1].text
        assert ("Of step 30, the best of the run by its validation loss." in text) == (
            found["step"] == 30
        )
        assert ("Evaluated at step 30" in text) == (found["step"] != 30)


def test_steps_without_a_finite_loss_are_said_and_interrupt_the_line(tmp_path):
    run = make_run(tmp_path / "a", steps=40)
    for step, value in ((41, math.nan), (42, None), (43, math.inf), (44, 2.0)):
        run.append_metrics({"kind": "train", "step": step, "tokens": 1, "loss": value})
    text, page = build([run], tmp_path)
    assert "not a finite number in 3 logged steps: 41, 42, 43" in page.text
    drawing = "".join(re.findall(r'(?:d|cx|cy|x1|y1|points)="([^"]*)"', text))
    assert "nan" not in drawing.lower()
    assert "inf" not in drawing.lower()


def test_a_resumed_run_shows_each_step_once(tmp_path):
    run = make_run(tmp_path / "a", steps=30)
    for step in range(20, 50):
        run.append_metrics({"kind": "train", "step": step, "tokens": step, "loss": 5.0, "lr": 1.0})
    _, page = build([run], tmp_path)
    figures = [json.loads(a["data-chart"]) for _, a in page.tags if "data-chart" in a]
    rates = next(s for f in figures for s in f["series"] if s["name"] == "learning rate")
    steps = [point[2] for point in rates["points"]]
    assert steps == [str(step) for step in range(1, 50)]


def test_a_long_run_stays_small(tmp_path):
    run = make_run(tmp_path / "a", steps=1)
    rows = (
        {"kind": "train", "step": s, "tokens": s, "loss": 3 + math.sin(s), "lr": 1e-4,
         "grad_norm": 1.0, "tokens_per_second": 100.0}
        for s in range(2, 20_000)
    )  # fmt: skip
    with run.metrics_path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    text, _ = build([run], tmp_path)
    assert len(text) < 400_000


# ------------------------------------------------------------------------------------- plots


def test_thinning_keeps_the_extremes_and_the_gaps():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[777] = (777.0, -5.0)
    points[5000] = (5000.0, math.nan)
    kept = thin(points, 400)
    assert len(kept) <= 600
    assert (4321.0, 99.0) in kept
    assert (777.0, -5.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thin(points[:50], 400) == points[:50]


def test_smoothing_is_centred():
    line = [(float(x), 3.0 * x + 1) for x in range(50)]
    assert smooth(line, 9)[:-4] == [pytest.approx(point) for point in line[:-4]]
    noisy = [(float(x), float(x % 2)) for x in range(100)]
    assert all(0.4 < y < 0.6 for _, y in smooth(noisy, 20)[20:])
    assert smooth([(1.0, math.nan), (2.0, 5.0)], 3) == [(2.0, 5.0)]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 300), (-3, 7), (1.2e-4, 3e-3), (7390, 7410), (5, 5)]
)
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert len({label(t) for t in found}) == len(found)


def test_log_ticks():
    assert log_ticks(0.9, 120) == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    assert log_ticks(1e-6, 1) == pytest.approx([10.0**p for p in range(-6, 1)])
    assert len(log_ticks(3, 9)) >= 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.4213, "1.421"), (0.003, "0.003"), (3e-5, "3e-5"), (1.25e-4, "0.000125"),
     (3200, "3,200"), (12_000, "12k"), (1_500_000, "1.5M"), (-2.5, "-2.5")],
)  # fmt: skip
def test_labels_are_short(value, text):
    assert label(value) == text


def test_a_chart_places_its_points():
    series = Series("loss", [(0, 10.0), (50, math.nan), (100, 20.0)])
    drawn = draw(Chart("T", [series], "step", "unit", references=[("xz", 15.0)], from_zero=True))
    data = json.loads(html.unescape(re.search(r'data-chart="([^"]*)"', drawn)[1]))
    (x0, y0, *_), (x1, y1, *_) = data["series"][0]["points"]
    assert x0 < x1
    assert y0 > y1, "larger values stand higher"
    reference = float(re.search(r'class="reference"[^>]* y1="([\d.]+)"', drawn)[1])
    assert reference == pytest.approx((y0 + y1) / 2, abs=0.2)
    assert drawn.count("<circle") == 2, "points without neighbours are drawn as dots"


def test_an_empty_chart_says_so():
    drawn = draw(Chart("T", [Series("loss", [(1, math.nan)])], "step", "unit"))
    assert "nothing logged yet" in drawn


# ------------------------------------------------------------------------------------- blocks

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFElEQVR42mP8z8Dwn4EIwDiqkL4KAQCl"
    "/AcBmgvKJQAAAABJRU5ErkJggg=="
)
BLOCKS = {
    "samples": {
        "samples": [[{"name": "asked", "text": EVIL}, {"name": "said", "text": "b", "ours": True}]],
    },
    "matrix": {
        "rows": ["cat", EVIL], "columns": ["cat", EVIL], "row_title": "class",
        "column_title": "predicted", "values": [[30, 10], [0, 4]],
    },
    "bars": {
        "unit": "gain", "format": ".2f",
        "bars": [{"name": EVIL, "value": 3.0, "low": 2.5, "high": 4.0},
                 {"name": "harmful", "value": -1.0}],
    },
    "chart": {
        "x": "x", "y": EVIL,
        "lines": [{"name": "a", "points": [[2, 1.0], [0, 3.0], [1, math.nan]],
                   "band": [[0, 2.0, 4.0], [2, 0.5, 1.5]]},
                  {"name": "b", "points": [[0, 0], [2, 2]], "dashed": True}],
        "references": [{"name": EVIL, "value": 1.5}],
    },
    "table": {
        "columns": [{"name": "word"}, {"name": EVIL, "format": ".1%"}],
        "rows": [[EVIL, 0.25], [None, 1]],
    },
    "images": {"images": [{"png": PNG, "caption": EVIL, "note": "sure: 99 %"}]},
}  # fmt: skip


def block_of(kind: str) -> dict:
    return {"kind": kind, "title": f"A {kind}", "note": EVIL, **BLOCKS[kind]}


def drawn(blocks: list[dict]) -> Page:
    """Blocks, checked as those of a file are, as a page."""
    from pydantic import TypeAdapter

    from gradsmith.blocks import Block
    from gradsmith.report.blocks import draw as draw_blocks

    stored = json.loads(json.dumps(blocks))
    TypeAdapter(list[Block]).validate_python(stored, strict=True)
    return Page(draw_blocks(stored))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_drawn_and_what_it_says_is_not_run(kind):
    page = drawn([block_of(kind)])
    assert f"A {kind}" in page.text
    assert EVIL in page.text
    assert not page.scripts
    assert [a["src"][:22] for t, a in page.tags if t == "img"] == (
        ["data:image/png;base64,"] if kind == "images" else []
    )


def test_every_kind_of_block_is_tried():
    from typing import get_args

    from gradsmith.blocks import Block

    assert len(get_args(get_args(Block)[0])) == len(BLOCKS)


def test_a_matrix_is_shaded_by_row_and_its_diagonal_set_apart():
    page = drawn([block_of("matrix")])
    cells = [a for t, a in page.tags if t == "td" and "title" in a]
    assert [(a["style"], a.get("class")) for a in cells] == [
        ("--share:0.750", "half"), ("--share:0.250", "wrong"), ("--share:1.000", "half strong")
    ]  # fmt: skip
    assert cells[0]["title"] == "class cat, predicted cat: 30, 75.0% of the row"


def test_bars_start_at_zero_and_may_go_either_way():
    page = drawn([block_of("bars")])
    (up, down) = [a for t, a in page.tags if t == "rect"]
    assert (float(up["x"]), float(up["width"])) == (20.0, 60.0)  # from 0 to 3 in -1 to 4
    assert (float(down["x"]), float(down["width"])) == (0.0, 20.0)
    assert "3.00 (2.50 to 4.00)" in page.text
    (interval,) = [a["d"] for t, a in page.tags if t == "path"]
    assert interval == "M70.0 2V10M70.0 6H100.0M100.0 2V10"


def test_a_chart_of_a_block_is_in_order_and_has_its_band():
    page = drawn([block_of("chart")])
    (figure,) = [json.loads(a["data-chart"]) for _, a in page.tags if "data-chart" in a]
    assert [p[2:] for p in figure["series"][0]["points"]] == [["0", "3"], ["2", "1"]]
    assert len([a for t, a in page.tags if t == "path" and a["class"] == "band s0"]) == 1
    assert len([a for t, a in page.tags if t == "path" and "dashed" in a["class"]]) == 1


def test_the_terminal_draws_what_is_text_and_says_where_the_rest_is():
    from rich.console import Console, Group

    from gradsmith.report.terminal import draw as draw_text

    with open(os.devnull, "w") as nowhere:
        console = Console(width=100, record=True, file=nowhere)
        for kind in BLOCKS:
            console.print(Group(*draw_text(block_of(kind))))
    text = console.export_text()
    for expected in ("A samples", "said", "predicted", "30", "3.00 (2.50 to 4.00)", "25.0%"):
        assert expected in text, expected
    assert text.count("in the report") == 2, "a chart and pictures"


def test_a_report_follows_from_the_metrics_definitions(tmp_path):
    """Of a task that the report has never heard of."""
    run = make_run(tmp_path / "a", steps=0)
    metrics = [
        {"name": "loss", "title": "Loss", "unit": "nats per image"},
        {"name": "f2", "title": "F2", "greater_is_better": True, "format": ".2f"},
        {"name": "hue", "title": "Hue error", "unit": "degrees", "format": ".1f"},
    ]
    run.write_provenance(unit="images", metrics=metrics)
    for step in range(1, 40):
        row = {"step": step, "loss": 1 / step, "images": 32 * step, "images_per_second": 700.0}
        run.append_metrics({"kind": "train", **row})
        if step % 10 == 0:
            run.append_metrics({"kind": "validation", "f2": step / 100, "hue": 9.0, **row})
    run.evaluation_path.unlink()
    _, page = build([run], tmp_path)
    for expected in ("Train: tiny", "Validation loss", "nats per image, step 30", "1,248",
                     "Images trained on", "images per second", "Hue error"):  # fmt: skip
        assert expected in page.text, expected
    charts = [json.loads(a["data-chart"]) for _, a in page.tags if "data-chart" in a]
    assert [len(c["series"]) for c in charts] == [2, 1, 1, 1]  # loss, f2, hue, speed

    results = [
        {"name": OURS, "values": {"f2": 0.812, "hue": 3.0}, "ours": True},
        {"name": "majority", "values": {"f2": 0.5}},
        {"name": "forest", "values": {"f2": 0.9, "hue": math.nan}, "note": "100 trees"},
    ]
    evaluation = {"split": "test", "definitions": metrics[1:], "results": results,
                  "note": "Of 872 images.",
                  "blocks": [block_of(kind) for kind in BLOCKS]}  # fmt: skip
    write_json(run.evaluation_path, evaluation)
    _, page = build([run], tmp_path)
    for expected in ("0.81", "0.31 above majority, 0.09 below forest", "forest (100 trees)", "3.0",
                     "Higher F2 is better. Of 872 images.", *(f"A {kind}" for kind in BLOCKS),
                     "dashed: baselines on the test split"):  # fmt: skip
        assert expected in page.text, expected
    table = page.text[page.text.index("Results") :]
    assert table.index("forest (100 trees)") < table.index("majority"), "the best first"
