"""Whatever stands in a file, an option or a model's folder: one clear end, and never a stack trace.

The kinds are those that a hostile and clumsy user found. All in this process, on one tiny run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_project, write_recipe

from gradsmith.__main__ import main

EVALUATION = {"yardsticks": ["xz"], "generation": {"count": 1, "max_new_tokens": 2}}
MODEL = "run/checkpoints/step-000002/model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its texts, and its run, evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_project(folder, evaluation=EVALUATION, **{"training.checkpoint.every": 2})
        assert main(["train", "r.yaml"]) == 0
        assert main(["evaluate", "run"]) == 0
        shutil.copytree(MODEL, "model")
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """refused("validate", "r.yaml") is what the command complains of; it ends with 2."""

    def run(*arguments: str, code: int = 2, lines: int = 1) -> str:
        capfd.readouterr()
        found = main(list(arguments))
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        assert found == code, err
        assert err.count("\n") <= lines, err
        assert len(err) < 1000
        return err

    return run


def change(path: str, **values: Any) -> None:
    """Sets top-level keys of a JSON file."""
    tree = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(tree | values))


# ------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"? [a, b]\n: 1\n", "a key must be a name"),
        (b"<<: {a: 1}\n", "merge keys"),
        (b"a: " + b"9" * 5000, "digits"),
        (b"a: 0x" + b"9" * 5000, "digits"),
        (b"[" * 5000, "recursion"),
        (b"a: [1,\n", "at line 2, column 1"),
        (b"a: &x [*x]\n", "unknown key"),
        (b"a: !!timestamp 2026-13-99\n", "not readable as YAML"),
        (b"a: !!python/object/apply:os.system [touch pwned]\n", "could not determine"),
        (b"name: \xff\n", "r.yaml: not UTF-8 text"),
        (b"name: a\0b\n", "unacceptable character"),
    ],
)
def test_yaml(text: bytes, said: str, here: Path, refused: Refused) -> None:
    Path("r.yaml").write_bytes(text)
    assert said in refused("validate", "r.yaml", lines=12)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output=" + "x" * 300, "output"),
        ("output=" + "/".join(["x" * 100] * 60), "output"),
        ('output="run\\0"', "control characters"),
        ('output="run\\ntouch pwned\\n#"', "control characters"),
        ('data.sources.0.path="texts\\0"', "control characters"),
        ("data.sources.².path=texts", "the list has 1 entry"),
        ("data.sources=[]", "at least 1"),
        ("data.sources.0=\udcff", "not readable"),
        ("name=" + "n" * 5000, "at most 100 characters"),
        ("training.steps=" + "9" * 30, "less than or equal"),
        ("training.optimizer.eps=1e-300", "greater than or equal"),
        ("training.optimizer.name=adamW", 'Did you mean "adamw"'),
        ("training.optimizer.name=[]", "training.optimizer.name"),
        ("training.optimizer.name={a: 1}", "training.optimizer.name"),
        ("evaluation.generation.temperature=1e-40", "0 takes the likeliest token"),
        ("evaluation.generation.temperature=.inf", "less than or equal to 100"),
        ("model.config.num_hidden_layers=0", "allowed are 1 to 1000"),
        ("model.config.num_hidden_layers=100000", "allowed are 1 to 1000"),
        ("model.config.rms_norm_eps=.nan", "NaN"),
        ("model.config.rms_norm_eps=-1.0", "allowed are 0 to 1"),
        ("model.config.hidden_size=" + "9" * 50, "allowed are text and numbers"),
        ("model.config.hidden_act={a: 1}", "model.config"),
        ("training.minutes=1:30", 'found text ("1:30")'),
        ("model={from: nowhere}", "model.from: no folder nowhere"),
        ("model={from: texts/deep/er}", "model.from: no folder texts/deep/er"),
        ("model={from: run/nowhere}", "model.from: no folder run/nowhere"),
        ("data.tokenizer={from: run/nowhere}", "data.tokenizer.from: no folder run/nowhere"),
    ],
)
def test_values(override: str, said: str, here: Path, refused: Refused) -> None:
    assert said in refused("validate", "r.yaml", override, lines=4)


def test_numbers_are_those_of_yaml_1_2(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "r.yaml", "training.steps=010", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["steps"] == 10


def test_a_damaged_recipe_of_a_run_is_said_to_be_that(here: Path, refused: Refused) -> None:
    Path("run/recipe.yaml").write_text("name: [")
    said = refused("train", "r.yaml", lines=3)
    assert "run/recipe.yaml: not readable as YAML" in said
    assert "the recipe that the run keeps" in said


# ------------------------------------------------------------------------- the files of a run


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("evaluation.json", b'{"metrics": {"loss": 1}}', "evaluation.json: split: field required"),
        ("evaluation.json", b"[1]", "evaluation.json: found a list ([1])"),
        ("evaluation.json", b"{", "evaluation.json: not readable as JSON"),
        ("evaluation.json", b"[" * 100000, "evaluation.json: not readable as JSON"),
        ("evaluation.json", b"9" * 5000, "evaluation.json: not readable as JSON"),
        ("evaluation.json", b"\xff", "evaluation.json: not UTF-8 text"),
        ("provenance.json", b'{"cores": "two"}', "provenance.json: cores: found text"),
        ("provenance.json", b'{"versions": [1]}', "provenance.json: versions: found a list"),
        ("provenance.json", b'{"git": 1, "zero": 2}', "provenance.json: git: found"),
        ("provenance.json", b'{"accelerate": {"replaced": {"a": 1}}}', "accelerate.replaced.a"),
        ("metrics.jsonl", b"1\n2\n", "metrics.jsonl:1: found a whole number (1)"),
        ("metrics.jsonl", b"\x93\n\xff\n", "metrics.jsonl: not UTF-8 text"),
        ("metrics.jsonl", b'{"kind": "train"}\n\n', "metrics.jsonl:1: step: field required"),
        ("metrics.jsonl", b'{"kind": "train", "step": "1"}\n\n', "metrics.jsonl:1: step: found"),
        ("data/manifest.json", b'{"ledger": [1]}', "manifest.json: ledger.0: found"),
        ("data/manifest.json", b'{"splits": {"train": {}}}', "splits.train.documents: field"),
    ],
)
def test_the_report_names_the_file_and_the_key(
    name: str, content: bytes, said: str, here: Path, refused: Refused
) -> None:
    Path("run", name).write_bytes(content)
    assert said in refused("report", "run")


@pytest.mark.parametrize(
    ("arguments", "name", "content", "said"),
    [
        (["train", "r.yaml"], "metrics.jsonl", b"1\n2\n", "metrics.jsonl:1: found a whole"),
        (["evaluate", "run"], "data/manifest.json", b"{}", 'manifest.json: format "None"'),
        (
            ["evaluate", "run"],
            "data/manifest.json",
            b'{"format": "gradsmith-data-1"}',
            "manifest.json: task: field required",
        ),
    ],
)
def test_other_commands_do_too(
    arguments: list[str], name: str, content: bytes, said: str, here: Path, refused: Refused
) -> None:
    Path("run", name).write_bytes(content)
    assert said in refused(*arguments, lines=2)


# ------------------------------------------------------------------------------ models' folders


def garbage() -> None:
    Path("model/model.safetensors").write_bytes(b"\xff" * 1000)


def cut_off() -> None:
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def index_out_of_the_folder() -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../secret.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))


def of_other_shapes() -> None:
    change("model/config.json", hidden_size=64, head_dim=16)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda: change("model/config.json", quantization_config={"quant_method": "gptq"}),
         "its weights are quantized (gptq)"),
        (lambda: change("model/config.json", quantization_config=[1]), "quantization_config"),
        (lambda: change("model/config.json", model_type=3), "config.json: model_type: found"),
        (lambda: change("model/config.json", model_type="llamma"), "llamma"),
        (lambda: change("model/config.json", hidden_size="wide"), "no model there"),
        (lambda: change("model/config.json", transformers_weights="a.bin"), "names its weights"),
        (lambda: Path("model/config.json").write_text("[]"), "config.json: found a list"),
        (lambda: Path("model/config.json").unlink(), "no config.json there"),
        (lambda: Path("model/generation_config.json").write_text('{"eos_token_id": "x"}'),
         "generation_config.json: eos_token_id"),
        (lambda: Path("model/model.safetensors").unlink(), "no weights (*.safetensors) there"),
        (garbage, "not readable as safetensors"),
        (cut_off, "not readable as safetensors"),
        (index_out_of_the_folder, "names a file outside of the folder"),
        (lambda: Path("model/tokenizer.json").write_text("{}"), "tokenizer"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "model", "--prompt", "x"),
        ("validate", "r.yaml", "model={from: model}", "data.tokenizer=null"),
    ],
    ids=["generate", "validate"],
)
def test_a_damaged_model(
    command: tuple[str, ...], harm: Callable[[], object], said: str, here: Path, refused: Refused
) -> None:
    harm()
    assert said in refused(*command, lines=3)


def test_weights_of_other_shapes(here: Path, refused: Refused) -> None:
    of_other_shapes()
    assert "no model can be read there" in refused("generate", "model", "--prompt", "x")


@pytest.mark.parametrize("attention", ["org/kernel", "flash_attention_2", "kernels-community/x"])
def test_attention_of_a_stranger_is_not_fetched(
    attention: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change("model/config.json", attn_implementation=attention, experts_implementation=attention)
    assert main(["generate", "model", "--prompt", "x", "--max-new-tokens", "1"]) == 0
    capfd.readouterr()
    change("model/config.json", _attn_implementation=attention)
    assert main(["generate", "model", "--prompt", "x", "--max-new-tokens", "1"]) == 0
    assert main(["validate", "r.yaml", "model={from: model}", "data.tokenizer=null"]) == 0


@pytest.mark.parametrize(
    ("config", "weights", "said"),
    [
        ({}, "adapter_model.safetensors", "adapter_config.json: peft_type: field required"),
        ({"peft_type": "LORA"}, "adapter_model.safetensors", "base_model_name_or_path: field"),
        ({"peft_type": "LORA", "base_model_name_or_path": 3}, "adapter_model.safetensors",
         "base_model_name_or_path: found"),
        ({"peft_type": "LORA", "base_model_name_or_path": "no/where/at/all"},
         "adapter_model.safetensors", "no folder no/where/at/all"),
        ({"peft_type": "LORA", "base_model_name_or_path": "model"}, "adapter_model.bin",
         "pickle files"),
        ({"peft_type": "LORA", "base_model_name_or_path": "model"}, "adapter_model.pt",
         "pickle files"),
        ({"peft_type": "LORA", "base_model_name_or_path": "model"}, "",
         "no weights (adapter_model*.safetensors)"),
        ({"peft_type": "STRANGE", "base_model_name_or_path": "model"},
         "adapter_model.safetensors", "no adapter can be read there"),
    ],
)  # fmt: skip
def test_a_damaged_adapter(
    config: dict[str, Any], weights: str, said: str, here: Path, refused: Refused
) -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    if weights:
        shutil.copy("model/model.safetensors", f"adapter/{weights}")
    assert said in refused("generate", "adapter", "--prompt", "x")


# ------------------------------------------------------------------------------ chat templates


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% include 'a' %}", "no loader"),
        ("{% import 'a' as b %}", "no loader"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "str"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", "more than 64 MiB of memory"),
        ("{{ '%10000000000d' % 1 }}", "the chat template refuses"),
        ("{{ raise_exception | tojson }}", "not JSON serializable"),
        ("{{ raise_exception('not\\nthis') }}", "not this"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "does not end within"),
        ("{% set n = namespace(x='a' * 100) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
         "{% endfor %}", "more than 64 MiB of memory"),
        ("{{ ''.__class__.__mro__ }}{{ ().__class__ }}", "unsafe"),
        ("{% if %}", "the chat template refuses"),
        ("{{ 'a' * 2 * 10 ** 6 }}", "makes 2,000,000 characters"),
    ],
)  # fmt: skip
def test_a_template_is_bounded(
    template: str, said: str, here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SECONDS": 0.5, "BYTES": 1 << 26, "CHARACTERS": 10**6}.items():
        monkeypatch.setattr(f"gradsmith.data.template.{name}", value)
    Path("model/chat_template.jinja").write_text(template)
    assert said in refused("generate", "model", "--chat", "--prompt", "x")
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of = {"kind": "jsonl", "path": "rows.jsonl", "prompt": "prompt", "response": "response"}
    chat = {"template": "model/chat_template.jinja"}
    changes = {"output": "chat", "data.task": "chat", "data.sources": [rows_of], "data.chat": chat}
    write_recipe("chat.yaml", **changes)
    err = refused("prepare", "chat.yaml")
    assert said in err
    assert "rows.jsonl:" in err


# ------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "nope", "--prompt", "x"], "nope: no folder nope"),
        (["generate", "run/nope", "--prompt", "x"], "run/nope: no folder run/nope"),
        (["generate", "texts", "--prompt", "x"], "no config.json there"),
        (["generate", "run", "--prompt", "\udcff"], "prompt"),
        (["generate", "run", "--prompt", "x", "--seed", "1" + "0" * 22], "--seed"),
        (["generate", "run", "--prompt", "x", "--temperature", "1e-40"], "temperature"),
        (["generate", "run", "--prompt", "x", "--temperature", "inf"], "temperature"),
        (["generate", "run", "--prompt", "x", "--temperature", "nan"], "temperature"),
        (["generate", "run", "--prompt", "x", "--top-p", "0"], "top_p"),
        (["report", "run", "--out", "texts"], "texts"),
    ],
)
def test_options(arguments: list[str], said: str, here: Path, refused: Refused) -> None:
    assert said in refused(*arguments, lines=12)
