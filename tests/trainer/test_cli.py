"""The command line: a fast start, exit codes, messages, and what `validate` finds."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsmith.__main__ import main
from gradsmith.errors import RunError, UserError
from gradsmith.recipe import recipe_schema

HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "pydantic", "numpy")

TINY: dict[str, Any] = {
    "name": "tiny",
    "output": "runs/tiny",
    "data": {
        "sources": [{"kind": "text", "path": "texts"}],
        "split": {"validation": 0.2, "test": 0.2},
        "tokenizer": {"train": {"vocab_size": 300}},
        "sequence_length": 32,
    },
    "model": {
        "architecture": "llama",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
    },
    "training": {"steps": 2, "global_batch": 4, "micro_batch": 2, "precision": "fp32"},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with tiny.yaml and the texts that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "texts").mkdir()
    for number in range(30):
        text = f"The number {number} stands between {number - 1} and {number + 1}.\n" * 4
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    return tmp_path


# --------------------------------------------------------------------------- start and exit codes


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_imports_nothing_heavy() -> None:
    done = python(
        "import sys; from gradsmith.__main__ import main; code = main(['--help'])\n"
        f"print('loaded', [m for m in {HEAVY!r} if m in sys.modules], code)"
    )
    assert done.stdout.splitlines()[-1] == "loaded [] 0", done.stderr
    for command in ("quickstart", "train", "launch", "doctor"):
        assert command in done.stdout


def test_help_takes_less_than_half_a_second() -> None:
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "gradsmith", "--help"], check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.5  # of CPU time, which a busy machine does not stretch


@pytest.mark.parametrize(
    ("module", "command"),
    [("typer", ["--help"]), ("pydantic", ["schema"]), ("yaml", ["validate", "r.yaml"])],
)
def test_without_the_train_extra_one_line_says_what_to_install(
    module: str, command: list[str]
) -> None:
    done = python(
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from gradsmith.__main__ import main; sys.exit(main({command!r}))"
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {module} is not installed: pip install 'gradsmith[train]'\n"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("name: wrong"), 2, "error: name: wrong\n"),
        (RunError("the disk is full"), 1, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr("gradsmith.recipe.recipe_schema", fail)
    assert main(["schema"]) == code
    out, err = capfd.readouterr()
    assert (out, err) == ("", said)


def test_an_unexpected_error_shows_its_place(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradsmith.recipe.recipe_schema", lambda: 1 / 0)
    assert main(["schema"]) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: ZeroDivisionError: division by zero\n")


def test_under_torchrun_the_message_goes_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["validate", str(tmp_path / "no.yaml")]) == 2
    assert capfd.readouterr().err == ""
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"] == f"{tmp_path / 'no.yaml'}: no such recipe file."
    assert told["exit_code"] == 2
    assert told["timestamp"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", "tiny.yaml", "--frseh"],
        ["export", "texts", "out", "--form", "gguf"],
        ["launch", "--nproc", "0", "tiny.yaml"],
        ["launch", "--nproc", "two", "tiny.yaml"],
        ["generate", "runs/tiny", "--prompt", "x", "--top-p", "2"],
    ],
)
def test_a_wrong_command_line(
    arguments: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Error" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["train", "tiny.yml"],
            "error: tiny.yml: no such recipe file. In ./ there are: tiny.yaml.",
        ),
        (["train", "tiny.yaml", "training.stepz=1"], 'Did you mean "steps"?'),
        (["prepare", "tiny.yaml", "training"], 'override "training": expected key=value'),
        (["evaluate", "runs/none"], "runs/none: no run there"),
        (["evaluate", "tiny.yaml"], "its run runs/tiny does not exist yet; gradsmith train"),
        (["evaluate", "texts", "seed=1"], "overrides go with a recipe file"),
        (["export", "texts", "out"], "texts: no run there"),
        (["report", "texts"], "texts: no run there"),
        (["generate", "texts", "--prompt", ""], "the prompt is empty"),
    ],
)
def test_wrong_input(
    arguments: list[str], said: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_version_and_schema(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("gradsmith ")
    assert main(["schema"]) == 0
    assert json.loads(capfd.readouterr().out) == recipe_schema()


# ----------------------------------------------------------------------------------- validate


def test_validate_sums_a_good_recipe_up(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "tiny.yaml", "--json"]) == 0
    summary = json.loads(capfd.readouterr().out)
    embeddings, attention, mlp, norms = 2 * 300 * 32, 4 * 32 * 32, 3 * 32 * 64, 3 * 32
    assert summary["parameters"] == embeddings + attention + mlp + norms
    assert summary["trainable_parameters"] == summary["parameters"]
    assert (summary["tokens_per_step"], summary["steps"], summary["accumulation"]) == (128, 2, 2)
    assert main(["validate", "tiny.yaml", "training.steps=null", "training.tokens=129"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("tiny: the recipe is good\n")
    assert "129 tokens" in out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.architecture=lama"], 'model.architecture: found lama; .*Did you mean "llama"'),
        (["model.config.hidden_sise=8"], 'hidden_sise: llama has none. Did you mean "hidden_size"'),
        (["model.config.hidden_size=30"], "model.config: The hidden size .30. is not a multiple"),
        (["model.config.hidden_size=wide"], "'hidden_size' expected int, got str"),
        (["model.config.num_key_value_heads=3"], "found 3, which does not divide .* of 4"),
        (["model.config.hidden_act=sillu"], "model.config: no model can be built: .*sillu"),
        (["model.config.vocab_size=200"], "vocab_size: found 200, fewer than the tokenizer's 300"),
        (["data.sequence_length=4096"], "data.sequence_length: found 4096; .* at most 2048"),
        (["data.sources.0.path=text"], "data.sources.0.path.*text"),
        (["data.sources.0.path=*.md"], r"data.sources.0.path.*\*\.md"),
        (["data.tokenizer={from: texts}"], "data.tokenizer.from: no tokenizer.json in texts"),
        (["data.chat.template=chat.jinja"], "data.chat.template: chat.jinja: no such file"),
        (["data.task=chat"], "data.sources.0.kind: text has no questions and answers"),
        (["output=tiny.yaml/run"], "output: tiny.yaml/run: tiny.yaml is a file"),
        (["model={from: textz}"], 'model.from: no folder textz .*Did you mean "texts"'),
        (["model={from: texts}"], "model.from: texts: no config.json there"),
    ],
)
def test_validate_finds(
    overrides: list[str], said: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["validate", "tiny.yaml", *overrides]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(said, err), err
    assert "Traceback" not in err


def test_validate_tells_all_problems_at_once(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.config.hidden_sise=8", "data.sources.0.path=nowhere", "output=tiny.yaml"]
    assert main(["validate", "tiny.yaml", *overrides]) == 2
    err = capfd.readouterr().err
    for key in ("model.config.hidden_sise", "data.sources.0.path", "output"):
        assert f"  {key}: " in err


def test_fp16_needs_a_gpu(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["validate", "tiny.yaml", "training.precision=fp16"]) == 2
    assert "training.precision: found fp16, which needs a GPU" in capfd.readouterr().err


@pytest.fixture
def base(here: Path) -> Path:
    """A folder that transformers wrote."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **TINY["model"]["config"], vocab_size=300, max_position_embeddings=64
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(here / "base")
    return here / "base"


def test_validate_counts_what_an_adapter_trains(
    base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = "model={from: base, adapter: {rank: 2, target: [q_proj, v_proj]}}"
    assert main(["validate", "tiny.yaml", "--json", model]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["trainable_parameters"] == 2 * 2 * (32 + 32)
    assert summary["parameters"] > summary["trainable_parameters"]

    assert main(["validate", "tiny.yaml", model.replace("v_proj", "value")]) == 0  # one is enough
    capfd.readouterr()
    assert main(["validate", "tiny.yaml", model.replace("q_proj, v_proj", "value")]) == 2
    assert "model.adapter.target: Target modules {'value'} not found" in capfd.readouterr().err
    assert main(["validate", "tiny.yaml", model, "data.sequence_length=65"]) == 2
    assert "found 65; the model allows at most 64" in capfd.readouterr().err


def test_pickled_weights_are_refused(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert main(["validate", "tiny.yaml", "model={from: base}"]) == 2
    err = capfd.readouterr().err
    assert "base: its weights (pytorch_model.bin) are pickle files" in err
    (base / "pytorch_model.bin").unlink()
    assert main(["validate", "tiny.yaml", "model={from: base}"]) == 2
    assert "no weights (*.safetensors) there" in capfd.readouterr().err
