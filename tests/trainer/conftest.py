"""Tiny real recipes: a few modules of the standard library as the corpus, models of two layers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.utils import logging as transformers_logging

from gradsmith.data.prepare import prepare
from gradsmith.recipe import Recipe, parse_recipe

# Its messages go to what is standard error when it is first used: within a test, that is closed
# when the test is over, and the next one sees "Logging error".
transformers_logging.get_logger("transformers")

MODULES = ("json", "html", "logging", "urllib", "collections", "importlib")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of about fifty Python files."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(json.__file__).parent.parent
    for module in MODULES:
        for path in sorted((library / module).glob("*.py")):
            shutil.copy(path, folder / f"{module}_{path.name}")
    return folder


def tiny_tree(corpus: Path, output: Path) -> dict[str, Any]:
    """A recipe that trains in seconds."""
    return {
        "name": "tiny",
        "seed": 7,
        "output": str(output),
        "data": {
            "sources": [{"kind": "text", "path": str(corpus)}],
            "split": {"validation": 0.1, "test": 0.1},
            "tokenizer": {"train": {"vocab_size": 384}},
            "sequence_length": 64,
        },
        "model": {
            "architecture": "llama",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
        },
        "training": {
            "steps": 6,
            "global_batch": 8,
            "micro_batch": 2,
            "optimizer": {"lr": 3e-3},
            "precision": "bf16",  # on every machine, also where auto would take fp32
            "validate": {"every": 100, "sequences": 4},
            "checkpoint": {"every": 100, "keep": 2},
        },
        "evaluation": {"generation": {"count": 1, "max_new_tokens": 4}},
    }


def with_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of a tree with dotted keys set."""
    tree = json.loads(json.dumps(tree))
    for key, value in overrides.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's data, made once."""
    recipe = parse_recipe(tiny_tree(corpus, tmp_path_factory.mktemp("prepared")))
    return prepare(recipe, log=lambda _: None).folder


@pytest.fixture
def tiny(corpus: Path, prepared: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """tiny("name", **{"training.steps": 3}) is a recipe that writes to tmp_path/name."""

    def build(name: str, **overrides: Any) -> Recipe:
        # where the recipe asks for other data, `prepare` notices and makes them
        shutil.copytree(prepared, tmp_path / name / "data", dirs_exist_ok=True)
        return parse_recipe(with_overrides(tiny_tree(corpus, tmp_path / name), overrides))

    return build


# What a user has: a recipe and the texts that it names, for commands and processes of their own.
PROJECT: dict[str, Any] = {
    "name": "tiny",
    "output": "run",
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


def write_recipe(path: Path | str, **overrides: Any) -> None:
    """PROJECT with dotted keys set."""
    Path(path).write_text(yaml.safe_dump(with_overrides(PROJECT, overrides)))


def write_project(folder: Path, recipe: str = "r.yaml", **overrides: Any) -> None:
    """PROJECT with dotted keys set, and its forty texts."""
    write_recipe(folder / recipe, **overrides)
    (folder / "texts").mkdir()
    for number in range(40):
        text = f"This is number {number} of forty.\n" * 8
        (folder / "texts" / f"{number}.txt").write_text(text)


def start(*arguments: str, before: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    """`gradsmith ARGUMENTS` in a process of its own; `before` runs in it first."""
    return subprocess.Popen(
        [sys.executable, "-m", "gradsmith", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
        start_new_session=True,
    )


def run_ranks(
    script_or_module: list[str], ranks: int, timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a Python command on `ranks` ranks with one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, "--standalone", *script_or_module],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# One start for several runs: importing everything takes each rank longer than a tiny run.
TRAIN_EACH = """
import sys
from gradsmith.recipe import load_recipe
from gradsmith import ranks
from gradsmith.training import loop
for path in sys.argv[1:]:
    loop.train(load_recipe(path))
ranks.end_rank(0)
"""


def train_on_ranks(recipes: list[Recipe], ranks: int, folder: Path) -> None:
    """Trains one recipe after the other on `ranks` ranks, in processes of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    script, paths = folder / "train_each.py", []
    script.write_text(TRAIN_EACH)
    for number, recipe in enumerate(recipes):
        paths.append(folder / f"recipe-{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(recipe.dump()))
    done = run_ranks([str(script), *map(str, paths)], ranks)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(recipe: Recipe) -> list[float]:
    """The training losses of a run, by step, each step once."""
    from gradsmith.run import Run

    rows = [row for row in Run(recipe.output).read_metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
