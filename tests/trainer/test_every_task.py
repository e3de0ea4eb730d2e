"""What every task promises, over the tiny recipes of every_task.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_task
import numpy as np
import pytest
import torch
from conftest import losses, train_on_ranks, with_overrides

from gradsmith import ranks
from gradsmith.data.example import Example, Ledger
from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.data.processor import Batch, Dropped
from gradsmith.evaluation.evaluate import evaluate
from gradsmith.evaluation.measure import measure, reference
from gradsmith.models.base import open_model
from gradsmith.models.build import build_model, load_model, open_task
from gradsmith.models.config import describe_model
from gradsmith.models.export import export
from gradsmith.recipe import RECIPES, Recipe, parse_recipe
from gradsmith.report.build import build_report
from gradsmith.run import Run
from gradsmith.tasks import TASKS, make_task
from gradsmith.tasks.task import Task
from gradsmith.training import loop

NAMES = list(every_task.recipes(Path(), Path()))
if set(NAMES) != set(TASKS) or set(TASKS) != set(RECIPES):
    raise RuntimeError(f"tests/trainer/every_task.py has {NAMES}, but there are {list(TASKS)}")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("every_task")
    every_task.write_data(folder)
    base = folder / "base"
    found = every_task.recipes(folder, base)
    tree = with_overrides(found["language_modeling"], {"output": str(base), "training.steps": 2})
    loop.train(parse_recipe(tree))
    return found


@pytest.fixture(scope="module", params=NAMES)
def recipe(request: pytest.FixtureRequest, trees: dict[str, dict[str, Any]]) -> Recipe:
    """Trained by whoever needs it first; see `trained`."""
    return parse_recipe(trees[request.param])


@pytest.fixture(scope="module")
def trained(recipe: Recipe) -> Run:
    loop.train(recipe)
    return Run(recipe.output)


class Opened:
    """A task, a fresh model in float32 and its training rows."""

    def __init__(self, recipe: Recipe):
        data = prepare(recipe, log=lambda _: None)
        self.data, self.recipe = data, recipe
        processor = data.processor(recipe)
        self.task: Task = make_task(recipe, processor)
        self.rows = processor.dataset(data.split("train"), augment=True)
        self.model = build_model(recipe, self.task).eval()
        if self.task.needs_reference:
            self.rows.reference = reference(self.task, self.model, self.rows, batch=4)
        if self.task.needs_statistics:
            batches = [self.batch(range(8))]
            with torch.no_grad():
                found = [self.task.statistics(self.task.outputs(self.model, b), b) for b in batches]
            self.task.shared = torch.stack(found).sum(0)

    def batch(self, rows: Any) -> Batch:
        rows = np.asarray(rows)
        return self.rows.batch(rows, rows.astype(np.uint64) + 1000)

    def loss(self, rows: Any) -> torch.Tensor:
        return self.task.loss(self.model, self.batch(rows))


@pytest.fixture(scope="module")
def opened(trained: Run) -> Opened:
    return Opened(trained.recipe())


def test_a_batch_loses_what_its_halves_lose(opened: Opened) -> None:
    """The loss is a sum, so accumulation and ranks change nothing."""
    whole = opened.loss(range(8))
    assert whole.dtype == torch.float32
    assert whole.shape == ()
    cut = 4 if opened.task.processor.together == 2 else 5
    halves = opened.loss(range(cut)) + opened.loss(range(cut, 8))
    torch.testing.assert_close(whole, halves, rtol=2e-6, atol=1e-5)


def test_a_batch_of_no_rows_counts_for_nothing(opened: Opened) -> None:
    assert opened.loss([]).item() == 0
    empty = opened.batch([])
    found = opened.task.metric_sums(opened.task.outputs(opened.model, empty), empty)
    assert not found.any()


def test_items_say_how_many_terms_a_loss_has(opened: Opened) -> None:
    """For rows of equal losses the loss is proportional to the items: here, for one row twice."""
    items = opened.rows.items
    assert len(items) == len(opened.rows) == len(opened.rows.lengths)
    if opened.task.unit != "tokens":  # then it is rows that a run tells it has read
        assert (opened.rows.lengths == 1).all()
    row = [2, 3] if opened.task.processor.together == 2 else [3]
    one, two = opened.loss(row), opened.loss(row + row)
    torch.testing.assert_close(two, 2 * one, rtol=2e-6, atol=1e-6)
    labels = opened.batch(range(8)).labels
    counted = {
        "labels": lambda: (labels["labels"] != -100).sum(),
        "weight": lambda: labels["weight"].sum(),
        "counts": lambda: labels["counts"].sum(),
    }
    (found,) = (count() for name, count in counted.items() if name in labels)
    assert float(found) == pytest.approx(items[:8].sum())


def test_what_is_random_about_a_row_follows_from_its_draw(opened: Opened) -> None:
    size = opened.task.processor.together
    rows, draws = np.arange(6), np.arange(6, dtype=np.uint64) + 7 + (size == 2)
    whole = opened.rows.batch(rows, draws)
    again = opened.rows.batch(rows, draws)
    for name, tensor in whole.inputs.items():
        assert torch.equal(tensor, again.inputs[name])
        for row in (0, 4) if size == 2 else (1, 4):
            alone = opened.rows.batch(rows[row : row + size], draws[row : row + size]).inputs[name]
            shape = tuple(slice(0, length) for length in alone.shape[1:])
            assert torch.equal(tensor[(row, *shape)], alone[0])


def test_metric_sums_add_over_batches_and_ranks(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, rows = opened.task, opened.rows
    whole = measure(task, opened.model, rows, batch=len(rows), limit=23)
    shared, total = task.shared, torch.zeros_like(whole)
    monkeypatch.setattr(ranks, "world", lambda: 3)
    monkeypatch.setattr(task, "needs_statistics", False)  # which are sums over the ranks as well
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        task.shared = shared
        total += measure(task, opened.model, rows, batch=2, limit=23)
    one, three = task.summarize(whole), task.summarize(total)
    assert set(one) >= {metric.name for metric in task.metrics}
    for name, value in one.items():
        assert three[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


def test_any_micro_batch_ranks_and_zero_stage_give_the_same_losses(
    trained: Run, trees: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = trained.recipe()
    tree = trees[recipe.data.task]
    layouts = {"one": (1, 0, 8), "two": (2, 2, 2), "three": (2, 3, 4)}
    made = {}
    for name, (_, stage, micro_batch) in layouts.items():
        more = {"training.zero.stage": stage, "training.micro_batch": micro_batch}
        made[name] = parse_recipe(with_overrides(tree, {"output": str(tmp_path / name), **more}))
    loop.train(made["one"])
    train_on_ranks([made["two"], made["three"]], 2, tmp_path)
    expected = losses(trained.recipe())
    for other in made.values():
        assert losses(other) == pytest.approx(expected, rel=2e-4), other.output


def test_a_run_resumes_to_the_same_bits(
    trained: Run, trees: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    tree = trees[trained.recipe().data.task]
    part = parse_recipe(with_overrides(tree, {"output": str(tmp_path / "part")}))
    seen: list[int] = []
    loop.train(part, watch=lambda row: seen.append(row["step"]) or True)
    short = with_overrides(tree, {"output": str(tmp_path / "part"), "training.validate.every": 2})
    other = with_overrides(short, {"output": str(tmp_path / "other")})
    loop.train(parse_recipe(other), watch=lambda row: True)
    assert [step for step, _ in Run(tmp_path / "other").steps()] == [2]
    loop.train(parse_recipe(other))
    assert losses(parse_recipe(other)) == losses(trained.recipe())
    assert seen == [4]


def test_a_held_out_example_is_encoded_as_it_was_stored(trained: Run) -> None:
    """No skew between training and serving: raw examples through the checkpoint's processor."""
    data = PreparedData.open(trained.data)
    with open_model(trained.folder, tell=False) as found:
        processor = open_task(trained.recipe(), found).processor
    split = data.split("test")
    rows = processor.encode(data.examples("test"), Ledger())
    assert len(rows) == len(split)
    for number, row in enumerate(rows):
        assert not isinstance(row, Dropped)
        for name, stored in split.row(number).items():
            assert np.array_equal(row[name], stored), name


def test_a_model_is_the_same_after_saving_and_loading(trained: Run, tmp_path: Path) -> None:
    """By export, which reads the folder back as others would and compares its outputs."""
    _, difference = export(trained, tmp_path / "out")
    assert difference == 0


def test_outputs_are_answered(trained: Run) -> None:
    with open_model(trained.folder, tell=False) as found:
        task = open_task(trained.recipe(), found)
        model = load_model(found, task)
    data = PreparedData.open(trained.data)
    rows = task.processor.dataset(data.split("test"))
    batch = rows.batch(range(3))
    with torch.no_grad():
        outputs = task.outputs(model, batch)
    assert len(outputs) == 3
    try:
        answers = task.decode(outputs)
    except NotImplementedError:
        assert task.unit == "tokens"  # which generates instead
        return
    assert len(answers) == 3
    assert all(json.dumps(answer) for answer in answers)


def test_dummy_inputs_fit_and_the_model_can_be_looked_at_on_meta(
    trained: Run, opened: Opened
) -> None:
    inputs = opened.task.processor.dummy_inputs(2, torch.Generator().manual_seed(0))
    outputs = opened.task.outputs(opened.model, Batch(inputs, {}))
    assert torch.isfinite(outputs).all()
    model = describe_model(trained.recipe())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    found, looked_at = (sum(p.numel() for p in m.parameters()) for m in (opened.model, model))
    assert found == looked_at


def test_it_is_evaluated_and_reported(trained: Run) -> None:
    found = evaluate(trained)
    task = trained.recipe().data.task
    assert (found["task"], found["split"], found["step"]) == (task, "test", 4)
    assert all(np.isfinite(value) for value in found["metrics"].values())
    page = build_report([trained], trained.folder / "report.html").read_text()
    for definition in found["definitions"]:
        assert definition["title"] in page


@pytest.mark.parametrize("text", ["", "never seen before: \u00e9\u4e16\U0001f600 <|eos|>"])
def test_strange_texts_are_encoded_or_dropped(trained: Run, text: str) -> None:
    data = PreparedData.open(trained.data)
    processor = data.processor(trained.recipe())
    for example in data.examples("test")[:2]:
        content: Any = example.content
        if isinstance(content, str):
            content = text
        elif isinstance(content, list):
            content = [{**message, "content": text} for message in content]
        else:
            content = {name: value if name == "label" else text for name, value in content.items()}
        (row,) = processor.encode([Example("test", content)], Ledger())
        if isinstance(row, Dropped):
            assert row.reason
        else:
            assert all(len(np.atleast_1d(value)) for value in row.values())
