"""LoRA and exports: what we write, peft and transformers read, with the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, run_ranks, tiny_tree, train_on_ranks, with_overrides
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gradsmith.errors import RunError, UserError
from gradsmith.models import export as exports
from gradsmith.models.build import load_for_inference
from gradsmith.models.export import export
from gradsmith.recipe import Recipe, parse_recipe
from gradsmith.run import Run
from gradsmith.training import loop

Tiny = Callable[..., Recipe]


@pytest.fixture(scope="module")
def base(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained tiny run."""
    folder = tmp_path_factory.mktemp("base") / "run"
    shutil.copytree(prepared, folder / "data")
    loop.train(parse_recipe(tiny_tree(corpus, folder)))
    return folder


def lora_recipe(base: Path, output: Path, corpus: Path, **overrides: object) -> Recipe:
    pairs = output.parent / "pairs.jsonl"
    pairs.parent.mkdir(parents=True, exist_ok=True)
    pairs.write_text("".join(f'{{"q": "what is {i}?", "a": "it is {i}"}}\n' for i in range(300)))
    tree = tiny_tree(corpus, output)
    tree["data"].pop("tokenizer")
    tree["data"]["task"] = "chat"
    tree["data"]["sources"] = [
        {"kind": "jsonl", "path": str(pairs), "prompt": "q", "response": "a"}
    ]
    tree["model"] = {
        "from": str(base),
        "adapter": {"rank": 4, "alpha": 8.0, "target": "all-linear"},
    }
    tree["training"]["optimizer"]["lr"] = 1e-2
    return parse_recipe(with_overrides(tree, overrides))


IDS = torch.arange(5, 60)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def load_adapter(folder: Path) -> torch.nn.Module:
    """As a peft user would."""
    config = json.loads((folder / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)


def test_adapter_and_merged_folders_load_elsewhere(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    recipe = lora_recipe(base, tmp_path / "lora", corpus, **{"training.steps": 12})
    loop.train(recipe)
    assert losses(recipe)[-1] < losses(recipe)[0] - 0.1
    run = Run(recipe.output)
    ours = logits(load_for_inference(run.folder, kernels=False)[0])
    plain = logits(AutoModelForCausalLM.from_pretrained(exports_base(run)))
    assert (ours - plain).norm() > 0.1 * plain.norm()  # the adapter does something

    adapter, difference = export(run, tmp_path / "adapter")
    assert difference == 0
    assert torch.equal(logits(load_adapter(adapter)), ours)
    AutoTokenizer.from_pretrained(adapter)

    merged, difference = export(run, tmp_path / "merged", "merged")
    assert 0 < difference < 2e-2
    theirs = logits(AutoModelForCausalLM.from_pretrained(merged))
    assert (theirs - ours).norm() < 3e-2 * ours.norm()
    assert not (merged / "adapter_config.json").exists()
    AutoTokenizer.from_pretrained(merged)


def exports_base(run: Run) -> str:
    folder = sorted(run.checkpoints.iterdir())[-1] / "model"
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def test_adapter_resumes_to_the_same_bits(base: Path, corpus: Path, tmp_path: Path) -> None:
    settings = {"training.checkpoint.every": 3, "model.adapter.dropout": 0.2}
    whole = lora_recipe(base, tmp_path / "whole", corpus, **settings)
    loop.train(whole)
    again = lora_recipe(base, tmp_path / "again", corpus, **settings)
    loop.train(again)
    shutil.rmtree(Run(again.output).checkpoints / "step-000006")
    loop.train(again)
    assert losses(again) == losses(whole)


@pytest.fixture(scope="module")
def moving(
    corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Recipe]:
    """A recipe in float32 that saves after 3 and 6 steps, in a folder that all tests share."""
    folder = tmp_path_factory.mktemp("moving")

    def build(name: str, stage: int) -> Recipe:
        shutil.copytree(prepared, folder / name / "data", dirs_exist_ok=True)
        settings = {"training.precision": "fp32", "training.checkpoint.every": 3, "name": name}
        settings["training.zero.stage"] = stage
        return parse_recipe(with_overrides(tiny_tree(corpus, folder / name), settings))

    return build


LAYOUTS = [(3, 2, 1, 1), (1, 1, 3, 2), (2, 2, 0, 1)]  # stage and ranks, before and after


def name_of(layout: tuple[int, int, int, int]) -> str:
    return "-".join(map(str, layout))


@pytest.fixture(scope="module")
def on_two_ranks(
    base: Path,
    corpus: Path,
    moving: Callable[..., Recipe],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Any, Recipe]:
    """What two ranks train, in one start of theirs."""
    folder = tmp_path_factory.mktemp("two")
    recipes: dict[Any, Recipe] = {
        layout: moving(name_of(layout), layout[0]) for layout in LAYOUTS if layout[1] == 2
    }
    stage = {"training.zero.stage": 3}
    recipes["lora"] = lora_recipe(base, folder / "lora", corpus, **stage)
    train_on_ranks([*recipes.values()], 2, folder)
    return recipes


def test_zero3_adapter_on_two_ranks_is_whole(
    base: Path, corpus: Path, on_two_ranks: dict[Any, Recipe], tmp_path: Path
) -> None:
    """Elsewhere ZeRO-3 with LoRA saves empty adapters (peft#2500)."""
    one = lora_recipe(base, tmp_path / "one", corpus, **{"training.zero.stage": 0})
    loop.train(one)
    ours = logits(load_for_inference(one.output, kernels=False)[0])
    adapter, _ = export(Run(on_two_ranks["lora"].output), tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    assert weights
    assert all(tensor.numel() > 0 for tensor in weights.values())
    assert (logits(load_adapter(adapter)) - ours).norm() < 3e-2 * ours.norm()


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_resume_under_another_layout(
    layout: tuple[int, int, int, int],
    moving: Callable[..., Recipe],
    on_two_ranks: dict[Any, Recipe],
    tmp_path: Path,
) -> None:
    """Saved under one ZeRO stage and number of ranks, continued under another."""
    stage, ranks, later_stage, later_ranks = layout
    whole = moving("whole", 1)
    loop.train(whole)  # once: a finished run is left alone
    if ranks == 1:
        loop.train(moving(name_of(layout), stage))
    later = moving(name_of(layout), later_stage)
    shutil.rmtree(Run(later.output).checkpoints / "step-000006")
    if later_ranks == 1:
        loop.train(later)
    else:
        train_on_ranks([later], later_ranks, tmp_path)
    assert losses(later) == pytest.approx(losses(whole), rel=1e-5)


def test_models_of_transformers_train_and_ours_load_there(
    corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(source)
    shutil.copytree(prepared / "tokenizer", source, dirs_exist_ok=True)
    tree = tiny_tree(corpus, tmp_path / "run")
    tree["data"].pop("tokenizer")
    tree["model"] = {"from": str(source)}
    recipe = parse_recipe(with_overrides(tree, {"training.steps": 3}))
    loop.train(recipe)
    folder, difference = export(Run(recipe.output), tmp_path / "out")
    assert difference == 0
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    ours, _ = load_for_inference(recipe.output, kernels=False)
    assert torch.equal(logits(theirs), logits(ours))


def test_export_refusals(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(base)
    with pytest.raises(UserError, match="this run allows model"):
        export(run, tmp_path / "out", "merged")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="is there already"):
        export(run, tmp_path / "taken")

    real = exports._reload

    def broken(task: object, folder: Path) -> torch.nn.Module:
        model = real(task, folder)
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        return model

    monkeypatch.setattr(exports, "_reload", broken)
    with pytest.raises(RunError, match="logits differ"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(tmp_path: Path, corpus: Path, base: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(exports_model(base), source)
    marker = tmp_path / "executed"
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    )
    tree = tiny_tree(corpus, tmp_path / "run")
    tree["model"] = {"from": str(source)}
    with pytest.raises(UserError, match="safetensors"):
        loop.train(parse_recipe(tree))
    assert not marker.exists()


def exports_model(base: Path) -> Path:
    return sorted((base / "checkpoints").iterdir())[-1] / "model"


def test_two_ranks_fail_together(corpus: Path, tmp_path: Path) -> None:
    """A user's mistake ends every rank with one message, and no rank waits for another."""
    import yaml

    tree = with_overrides(tiny_tree(corpus, tmp_path / "run"), {"training.micro_batch": 8})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = run_ranks(["-m", "gradsmith", "train", str(path)], 2, timeout=100)
    assert done.returncode != 0
    assert "training.global_batch" in done.stderr
