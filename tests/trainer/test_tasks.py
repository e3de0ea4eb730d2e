"""Classification and preference: against transformers, and what their sources may get wrong.
(What holds for every task is in test_every_task.py.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_task
import numpy as np
import pytest
import torch
from conftest import with_overrides

from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.data.processor import Batch
from gradsmith.errors import UserError
from gradsmith.models.build import build_model
from gradsmith.models.config import config_of
from gradsmith.recipe import Recipe, parse_recipe
from gradsmith.tasks import make_task
from gradsmith.training import loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    every_task.write_data(folder)
    tree = every_task.recipes(folder, folder)["language_modeling"]
    base = with_overrides(tree, {"output": str(folder / "base"), "training.steps": 1})
    loop.train(parse_recipe(base))
    return folder


def recipe_of(task: str, folder: Path, output: Path, **overrides: Any) -> Recipe:
    tree = every_task.recipes(folder, folder / "base")[task]
    return parse_recipe(with_overrides(tree, {"output": str(output), **overrides}))


def prepared(recipe: Recipe) -> PreparedData:
    return prepare(recipe, log=lambda _: None)


def dropped(data: PreparedData) -> dict[str, int]:
    rows = [row for row in data.manifest["ledger"] if row["what"] == "dropped"]
    return {row["reason"]: row["documents"] for row in rows}


@pytest.mark.parametrize("eos", [[1, 2], 5_000_000])
def test_a_config_may_name_several_tokens_or_ones_of_another_vocabulary(
    folder: Path, tmp_path: Path, eos: Any
) -> None:
    config = {"config": {**every_task.CONFIG, "eos_token_id": eos}}
    recipe = recipe_of(
        "language_modeling", folder, tmp_path / "run", model={"architecture": "llama", **config}
    )
    found = config_of(recipe, {"vocab_size": 300})
    assert found.eos_token_id == (eos if isinstance(eos, list) else None)


# ------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_loss_is_that_of_transformers(folder: Path, tmp_path: Path, architecture: str) -> None:
    plain = {"class_weights": None, "label_smoothing": 0.0}
    model: dict[str, Any] = {"architecture": architecture, "config": every_task.CONFIG}
    recipe = recipe_of(
        "text_classification", folder, tmp_path / "run", objective=plain, model=model
    )
    data = prepared(recipe)
    task = make_task(recipe, data.processor(recipe))
    model = build_model(recipe, task).eval()
    batch = task.processor.dataset(data.split("train")).batch(range(7))
    ours = task.loss(model, batch)
    theirs = model(**batch.inputs, labels=batch.labels["target"]).loss
    torch.testing.assert_close(ours, 7 * theirs, rtol=1e-6, atol=1e-6)


def test_weights_divide_what_they_multiply(folder: Path, tmp_path: Path) -> None:
    """As torch's cross_entropy(weight=...): Σ w · loss / Σ w."""
    recipe = recipe_of("text_classification", folder, tmp_path / "run")
    data = prepared(recipe)
    task = make_task(recipe, data.processor(recipe))
    model = build_model(recipe, task).eval()
    rows = task.processor.dataset(data.split("train"))
    batch = rows.batch(range(12))
    counts = data.manifest["classes"]
    weights = [sum(counts.values()) / (2 * count) for count in counts.values()]
    expected = torch.nn.functional.cross_entropy(
        task.outputs(model, batch).float(),
        batch.labels["target"],
        weight=torch.tensor(weights),
        label_smoothing=0.0,
    )
    unsmoothed = recipe.objective.model_copy(update={"label_smoothing": 0.0})
    task.recipe = recipe.model_copy(update={"objective": unsmoothed})
    ours = task.loss(model, batch) / rows.items[:12].sum()
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-5, atol=1e-6)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = [{"text": f"text number {i}", "label": str(i % 2)} for i in range(60)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [*GOOD[:3], {"text": "a", "label": None}],
            r'rows.jsonl:4: "label", the class, .* nothing',
        ),
        ([*GOOD[:3], {"text": "a", "label": 0.5}], r"rows.jsonl:4: .*; found a number"),
        (
            [*GOOD[:3], {"text": 7, "label": 1}],
            r'rows.jsonl:4: "text" must be text; found a number',
        ),
        ([{**row, "label": "x"} for row in GOOD], r'one class only \("x"\)'),
        ([{"text": row["text"]} for row in GOOD], r'rows.jsonl:1: no key "label"; found text'),
    ],
)
def test_bad_labels_are_named(
    folder: Path, tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    sources = [{"kind": "jsonl", "path": path}]
    with pytest.raises(UserError, match=said):
        prepared(
            recipe_of("text_classification", folder, tmp_path / "run", **{"data.sources": sources})
        )


def test_a_class_that_is_held_out_alone_is_dropped_and_counted(
    folder: Path, tmp_path: Path
) -> None:
    """Which rows are held out follows from their text: one of them gets a label of its own."""
    source = {"kind": "jsonl", "path": write_rows(tmp_path / "rows.jsonl", GOOD)}
    overrides = {"data.sources": [source]}
    first = prepared(recipe_of("text_classification", folder, tmp_path / "run", **overrides))
    held_out = first.examples("test")[0].fields["text"]
    rows = [{**row, "label": "new"} if row["text"] == held_out else row for row in GOOD]
    write_rows(tmp_path / "rows.jsonl", rows)
    again = prepared(recipe_of("text_classification", folder, tmp_path / "run", **overrides))
    assert list(again.manifest["classes"]) == ["0", "1"]
    assert dropped(again) == {'the training split has no row of the class "new"': 1}
    overrides["objective.class_weights"] = {"2": 1.0}
    recipe = recipe_of("text_classification", folder, tmp_path / "run", **overrides)
    with pytest.raises(UserError, match=r'class_weights: the training split has no class "2"'):
        again.processor(recipe)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\na,1\nb\n", r"rows.csv:3: 1 values in this row; .* 2 \(text, label\)"),
        ("text,text\na,1\n", r"rows.csv:1: a column's name is empty or there twice"),
        ('text,label\n"a,1\nb,2\n', r"rows.csv:2: not readable as CSV: unexpected end"),
        ("words,label\na,1\n", r'rows.csv:1: no key "text"; found words, label'),
    ],
)
def test_bad_csv_is_named(folder: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    sources = [{"kind": "csv", "path": str(tmp_path / "rows.csv")}]
    with pytest.raises(UserError, match=said):
        prepared(
            recipe_of("text_classification", folder, tmp_path / "run", **{"data.sources": sources})
        )


def test_tabs_need_no_quotes_and_names_may_stand_in_the_recipe(
    folder: Path, tmp_path: Path
) -> None:
    lines = [f'a "quoted word, {i}\t{i % 2}\n' for i in range(60)]
    (tmp_path / "rows.tsv").write_text("".join(lines))
    source = {"kind": "csv", "path": str(tmp_path / "rows.tsv"), "columns": ["text", "label"]}
    data = prepared(
        recipe_of("text_classification", folder, tmp_path / "run", **{"data.sources": [source]})
    )
    assert sum(split["documents"] for split in data.manifest["splits"].values()) == 60
    assert data.examples("test")[0].fields["text"].startswith('a "quoted word, ')


def test_a_long_text_is_cut_but_for_what_ends_it(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "long " * 50 + str(i), "label": str(i % 2)} for i in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    overrides = {"data.sources": [{"kind": "jsonl", "path": path}], "data.sequence_length": 16}
    data = prepared(recipe_of("text_classification", folder, tmp_path / "run", **overrides))
    split = data.split("train")
    assert {len(split.row(i)["tokens"]) for i in range(len(split))} == {16}
    cut = [row for row in data.manifest["ledger"] if row["what"] == "truncated"]
    assert cut[0]["reason"] == "longer than 16 tokens"
    assert cut[0]["documents"] == 60


def test_a_text_loses_other_tokens_each_time_it_is_seen(folder: Path, tmp_path: Path) -> None:
    asked = {"objective": {"token_dropout": 0.4}}
    recipe = recipe_of("text_classification", folder, tmp_path / "run", **asked)
    processor = prepared(recipe).processor(recipe)
    special = processor.tokenizer.all_special_ids
    text = np.array([special[0], *range(100, 180), special[0]])
    seen = [processor.thinned(text, np.uint64(draw)) for draw in range(400)]
    for found in seen:
        assert found[0] == found[-1] == special[0]
        assert (np.diff(found[1:-1]) > 0).all()  # the others in their order
    left = sum(len(found) - 2 for found in seen) / (400 * 80)
    assert left == pytest.approx(0.6, abs=0.012)  # 4.4 deviations of 32,000 draws
    assert len({found.tobytes() for found in seen}) == 400
    np.testing.assert_array_equal(seen[7], processor.thinned(text, np.uint64(7)))
    one = np.array([special[0], 100, special[0]])  # without its only word it would be none
    assert all(len(processor.thinned(one, np.uint64(draw))) == 3 for draw in range(50))
    rows = processor.dataset(prepared(recipe).split("train"))
    whole, thin = (rows.batch(range(8), draws) for draws in (None, np.arange(8, dtype=np.uint64)))
    assert thin.inputs["attention_mask"].sum() < whole.inputs["attention_mask"].sum()


# ----------------------------------------------------------------------------------- preference


def test_log_probabilities_are_those_of_each_answer_alone(folder: Path, tmp_path: Path) -> None:
    """Neither padding nor the pair's other side matters."""
    recipe = recipe_of("preference", folder, tmp_path / "run", objective={"name": "simpo"})
    data = prepared(recipe)
    task = make_task(recipe, data.processor(recipe))
    model = build_model(recipe, task).eval()
    split = data.split("train")
    rows = task.processor.dataset(split)
    with torch.no_grad():
        found = task.outputs(model, rows.batch(range(5)))
        for i in range(5):
            for side, name in enumerate(("chosen", "rejected")):
                ids = torch.tensor(split.row(i)[name].astype("int64"))
                start = int(split.row(i)[f"{name}_start"])
                logp = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
                answer = logp[start - 1 : -1].gather(1, ids[start:, None]).sum()
                torch.testing.assert_close(found[i, side, 0], answer, rtol=1e-5, atol=1e-4)
                assert found[i, side, 1] == len(ids) - start
                text = task.processor.tokenizer.decode(ids[start:])
                assert data.manifest["splits"]["train"]["documents"] > i
                assert text.endswith(task.processor.tokenizer.eos_token)


def test_pairs_that_teach_nothing_are_dropped_and_counted(folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q {i}", "chosen": "yes", "rejected": "no"} for i in range(60)]
    pairs += [{"prompt": "same", "chosen": "a", "rejected": "a"}]
    pairs += [{"prompt": "long " * 60, "chosen": "a", "rejected": "b"}]
    pairs += [{"prompt": "an answer", "chosen": "a " * 60, "rejected": "b"}]
    pairs += [{"prompt": "ends <|eos|>", "chosen": "a", "rejected": "b"}]
    path = write_rows(tmp_path / "pairs.jsonl", pairs)
    sources = [{"kind": "jsonl", "path": path}]
    recipe = recipe_of("preference", folder, tmp_path / "run", **{"data.sources": sources})
    assert dropped(prepared(recipe)) == {
        "both answers are the same": 1,
        "its prompt alone fills data.sequence_length": 1,
        "a side is longer than 48 tokens": 1,
        "has the text of a special token in it": 1,
    }
    refuse = {"data.sources": sources, "data.chat.over_length": "refuse"}
    with pytest.raises(UserError, match=r"over_length: .*pairs.jsonl:6\d: a side is longer"):
        prepared(recipe_of("preference", folder, tmp_path / "other", **refuse))


def test_a_preference_needs_a_model_that_can_answer(folder: Path, tmp_path: Path) -> None:
    model = {"architecture": "llama", "config": every_task.CONFIG}
    more = {"model": model, "data.tokenizer": {"train": {"vocab_size": 300}}}
    with pytest.raises(UserError, match=r"model.from: a preference is learned by a model that"):
        recipe_of("preference", folder, tmp_path / "run", **more)


def test_a_model_that_has_not_moved_is_right_about_half(folder: Path, tmp_path: Path) -> None:
    """Its rewards are all equal, and say nothing of either side."""
    recipe = recipe_of("preference", folder, tmp_path / "run", objective={"name": "dpo"})
    data = prepared(recipe)
    task = make_task(recipe, data.processor(recipe))
    outputs = torch.tensor([[[-3.0, 2.0], [-4.0, 2.0]]] * 3)
    reference = torch.tensor([[-3.0, -4.0], [-4.0, -3.0], [-3.0, -5.0]])  # equal, right, wrong
    batch = Batch({}, {"counts": torch.ones(3), "reference": reference})
    found = task.summarize(task.metric_sums(outputs, batch))
    assert found["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert (found["likelier"], found["pairs"]) == (1, 3)


def test_the_reference_is_kept_and_missed(folder: Path, tmp_path: Path) -> None:
    overrides = {"objective": {"name": "dpo"}, "training.steps": 2}
    recipe = recipe_of("preference", folder, tmp_path / "run", **overrides)
    loop.train(recipe)
    kept = tmp_path / "run" / "reference" / "rows.safetensors"
    before = kept.read_bytes()
    longer = recipe_of("preference", folder, tmp_path / "run", **overrides | {"training.steps": 4})
    loop.train(longer)
    assert kept.read_bytes() == before
    kept.unlink()
    more = recipe_of("preference", folder, tmp_path / "run", **overrides | {"training.steps": 6})
    with pytest.raises(UserError, match="what the model said before training is gone"):
        loop.train(more)
