"""`evaluate` and the report on runs that were really trained, for a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from gradsmith.blocks import BASE
from gradsmith.errors import UserError
from gradsmith.evaluation.evaluate import evaluate
from gradsmith.evaluation.generate import generate
from gradsmith.report.build import build_report
from gradsmith.report.terminal import format_evaluation
from gradsmith.run import Run, read_json, write_json


def sentences(count: int) -> list[str]:
    random = np.random.default_rng(3)
    words = ["the", "cat", "dog", "sat", "ran", "under", "a", "mat", "and", "it", "was", "happy"]
    return [" ".join(random.choice(words, random.integers(20, 60))) + "." for _ in range(count)]


def train(folder, name: str, task: str, source: dict, model: dict, **data) -> Run:
    recipe = {
        "name": name,
        "output": str(folder / name),
        "data": {
            "task": task, "sources": [source], "split": {"validation": 0.1, "test": 0.2},
            "sequence_length": 64, **data,
        },
        "model": model,
        "training": {
            "steps": 6, "global_batch": 4, "micro_batch": 2, "precision": "fp32",
            "optimizer": {"name": "adamw", "lr": 1e-2}, "validate": {"every": 3},
        },
        "evaluation": {"generation": {"count": 2, "max_new_tokens": 8}},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "gradsmith", "train", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run.open(folder / name)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in sentences(150))
    )
    config = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    }  # fmt: skip
    return train(
        folder, "base", "language_modeling", {"kind": "jsonl", "path": str(folder / "text.jsonl")},
        {"architecture": "llama", "config": config}, tokenizer={"train": {"vocab_size": 320}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def fine_tuned(pretrained):
    folder = pretrained.folder.parent
    rows = [{"q": text[:20], "a": text[20:60]} for text in sentences(150)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "jsonl", "path": str(folder / "pairs.jsonl"), "prompt": "q", "response": "a"}
    adapter = {"method": "lora", "rank": 4}
    return train(
        folder, "tuned", "chat", source, {"from": str(pretrained.folder), "adapter": adapter}
    )


@pytest.fixture(scope="module")
def found_pretrained(pretrained):
    return evaluate(pretrained)


@pytest.fixture(scope="module")
def found_fine_tuned(fine_tuned):
    return evaluate(fine_tuned)


def base_values(found: dict) -> dict[str, float]:
    return next(row["values"] for row in found["results"] if row["name"] == BASE)


def samples_of(found: dict) -> list[list[str]]:
    """Of each sample: the prompt, what the model says, what its base says, the reference."""
    (block,) = (block for block in found["blocks"] if block["kind"] == "samples")
    return [[part["text"] for part in sample] for sample in block["samples"]]


def test_a_pretrained_run(pretrained, found_pretrained):
    found = found_pretrained
    assert found == read_json(pretrained.evaluation_path)
    raw = [json.loads(line) for line in (pretrained.data / "test/documents.jsonl").open()]
    size = sum(len(row["text"].encode()) for row in raw)
    assert found["metrics"]["bytes"] == size
    assert found["step"] == 6
    ours, *baselines = found["results"]
    assert ours["ours"]
    assert ours["values"] == found["metrics"]
    assert found["sums"][2] == size
    assert [row["name"][:6] for row in baselines] == ["xz -9e", "xz -9e", "byte 8"]
    for row in baselines:
        assert row["values"]["bytes"] == size
        assert 0.5 < row["values"]["bits_per_byte"] < 8
    texts = [row["text"] for row in raw]
    samples = samples_of(found)
    for prompt, _, reference in samples:
        assert any(text.startswith(prompt + reference) for text in texts)
    assert len(samples) == 2


def test_a_fine_tuned_run_stands_beside_its_base(fine_tuned, found_fine_tuned, pretrained):
    found = found_fine_tuned
    base = base_values(found)
    assert found["metrics"]["loss"] < base["loss"]
    assert found["metrics"]["bytes"] == base["bytes"]
    assert found["metrics"]["rouge_l_pairs"] == base["rouge_l_pairs"] > 0
    assert 0 <= found["metrics"]["rouge_l"] <= 1
    raw = [json.loads(line) for line in (fine_tuned.data / "test/documents.jsonl").open()]
    answers = [row["messages"][-1]["content"] for row in raw]
    assert found["metrics"]["bytes"] == sum(len(answer.encode()) for answer in answers)
    for _, _, of_base, reference in samples_of(found):
        assert reference in answers
        assert of_base is not None

    # The base is the pretrained model itself, not the adapter's.
    from gradsmith.data.prepared import PreparedData
    from gradsmith.evaluation.measure import measure
    from gradsmith.models.build import load_for_inference
    from gradsmith.tasks import make_task

    model, _ = load_for_inference(pretrained.folder)
    recipe, data = fine_tuned.recipe(), PreparedData.open(fine_tuned.data)
    task = make_task(recipe, data.processor(recipe))
    rows = task.processor.dataset(data.split("test"))
    alone = task.summarize(measure(task, model, rows, batch=2))
    assert base["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_a_chat_run_answers_through_its_template(fine_tuned):
    settings = {"max_new_tokens": 8, "temperature": 0.0}
    assert generate(fine_tuned.folder, ["the cat"], **settings) == generate(
        fine_tuned.folder, ["the cat"], chat=True, **settings
    )


def test_a_split_that_is_not_held_out_is_refused(pretrained):
    with pytest.raises(UserError, match="train"):
        evaluate(pretrained, split="train")
    with pytest.raises(UserError, match='"tset"'):
        evaluate(pretrained, split="tset")


def test_it_finds_what_training_found(pretrained):
    """On the same split: another process, the weights from the checkpoint, another loop."""
    validation = evaluate(pretrained, split="validation")
    last = [row for row in pretrained.read_metrics() if row["kind"] == "validation"][-1]
    assert validation["split"] == "validation"
    assert validation["metrics"]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert validation["metrics"]["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)


def test_the_table_and_the_report(
    pretrained, fine_tuned, found_pretrained, found_fine_tuned, tmp_path
):
    from rich.console import Console

    found = [found_pretrained, found_fine_tuned]
    for run, result in zip((pretrained, fine_tuned), found, strict=True):
        write_json(run.evaluation_path, result)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for result in found:
        console.print(format_evaluation(result))
    text = console.export_text()
    for expected in ("model", "fine-tuning", "base", "xz -9e", "8-gram", "ROUGE-L"):
        assert expected in text
    page = build_report([pretrained, fine_tuned], tmp_path / "report.html").read_text()
    for result in found:
        assert f"{result['metrics']['bits_per_byte']:.3f}" in page
