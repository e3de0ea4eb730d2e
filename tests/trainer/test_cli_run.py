"""The commands one after the other on one tiny run, and the quickstart's recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import write_project

from gradsmith import quickstart
from gradsmith.__main__ import main

EVALUATION = {"yardsticks": ["xz"], "generation": {"count": 1, "max_new_tokens": 4}}


def test_from_a_recipe_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, evaluation=EVALUATION, **{"training.steps": 3})

    assert main(["prepare", "r.yaml"]) == 0
    assert json.loads(Path("run/data/manifest.json").read_text())["task"] == "language_modeling"

    assert main(["train", "r.yaml", "training.steps=2"]) == 0
    assert main(["train", "r.yaml", "training.steps=2"]) == 0  # nothing left to do
    steps = [
        json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()
    ]
    assert sorted(set(steps)) == [1, 2]
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["training"]["steps"] == 2
    assert "loss" in capfd.readouterr().out

    assert main(["evaluate", "run", "--json"]) == 0
    by_folder = json.loads(capfd.readouterr().out)  # JSON, and nothing else on standard output
    assert main(["evaluate", "r.yaml", "--json", "--split", "test"]) == 0
    assert json.loads(capfd.readouterr().out) == by_folder
    assert by_folder["split"] == "test"
    assert 0 < by_folder["metrics"]["bits_per_byte"] < 8
    assert main(["evaluate", "run", "--split", "train-ish"]) == 2
    assert "train-ish" in capfd.readouterr().err
    assert main(["evaluate", "run"]) == 0
    assert "bits per byte" in capfd.readouterr().out

    arguments = ["generate", "run", "--prompt", "This is", "--max-new-tokens", "5", "--seed", "3"]
    assert main(arguments) == 0
    text = capfd.readouterr().out
    assert main(arguments) == 0
    assert capfd.readouterr().out == text != ""

    assert main(["export", "run", "out"]) == 0
    assert capfd.readouterr().out.startswith("out: read back")
    assert Path("out/model.safetensors").is_file()

    assert main(["report", "run"]) == 0
    assert capfd.readouterr().out == "run/report.html\n"
    assert "<html" in Path("run/report.html").read_text()
    assert main(["report", "run", "run"]) == 2
    assert "needs --out FILE" in capfd.readouterr().err


def test_quickstart_overrides_reach_the_recipes_that_they_fit() -> None:
    pretrain, finetune = quickstart._recipes(
        ["training.steps=4", "model.config.hidden_size=64", "output=elsewhere/"]
    )
    assert pretrain.training.steps == finetune.training.steps == 4
    assert pretrain.model.config is not None
    assert pretrain.model.config["hidden_size"] == 64
    assert (pretrain.output, finetune.output) == ("elsewhere/pretrain", "elsewhere/finetune")
    assert finetune.model.from_ == pretrain.output


def test_quickstart_recipes_fit_together() -> None:
    pretrain, finetune = quickstart._recipes([])
    assert finetune.model.from_ == pretrain.output
    # as long on every machine, in what each is fast in
    assert (pretrain.training.minutes, finetune.training.minutes) == (4, 1)
    assert pretrain.training.precision == finetune.training.precision == "auto"
    # the same documents are held out only under the same seed and shares
    assert (finetune.seed, finetune.data.split) == (pretrain.seed, pretrain.data.split)
