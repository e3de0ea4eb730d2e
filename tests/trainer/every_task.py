"""A tiny recipe for each task: what test_every_task.py goes through. A task that is missing here
fails its collection."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

ANIMALS, DOING = ["cat", "dog", "bird"], ["runs", "sleeps", "eats"]
WORDS = ["red", "green", "blue", *ANIMALS, *DOING, "fast", "slow", "big", "small", "here", "now"]
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# Another micro-batch draws other masks.
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROW = {"sequence_length": 48}
LOSSLESS = {"webp": {"lossless": True}}
TRAINING = {
    "steps": 4,
    "global_batch": 8,
    "micro_batch": 4,
    "optimizer": {"lr": 3e-3},
    "precision": "fp32",
    "validate": {"every": 4, "sequences": 8},
    "checkpoint": {"every": 2, "keep": 3},
}


def _text(random: random.Random, words: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(words))


def write_data(folder: Path) -> None:
    """The sources of all recipes."""
    draw = random.Random(0)
    rows = {
        "texts": [{"text": _text(draw, draw.randint(4, 30))} for _ in range(120)],
        "chats": [
            {"question": _text(draw, 3), "answer": _text(draw, draw.randint(1, 5))}
            for _ in range(120)
        ],
        "labelled": [
            {"text": text, "label": "cats" if "cat" in text.split() else "none"}
            for text in (_text(draw, draw.randint(2, 9)) for _ in range(160))
        ],
        "pairs": [
            {"prompt": _text(draw, 3), "chosen": _text(draw, 2), "rejected": _text(draw, 4)}
            for _ in range(100)
        ],
    }
    lines = ["age,sort,town,outcome"]
    for _ in range(160):
        age, sort = draw.randint(1, 80), draw.choice(ANIMALS)
        outcome = "good" if (age > 40) == (sort == "dog") else "bad"
        lines.append(f"{age if age % 7 else ''},{sort},{draw.choice(WORDS)},{outcome}")
    (folder / "people.csv").write_text("\n".join(lines) + "\n")
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))

    write_pictures(folder / "pictures", 60)


def write_pictures(folder: Path, each: int) -> None:
    """Two classes, brighter above or brighter on the left, in three formats and many sizes."""
    draw = np.random.default_rng(0)
    for name in ("above", "left"):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            height, width = draw.integers(9, 20, 2)
            pixels = draw.integers(0, 120, (height, width, 3))
            pixels[
                : height // 2 if name == "above" else None, : None if name == "above" else 5
            ] += 90
            picture = PIL.Image.fromarray(pixels.astype(np.uint8))
            ending = ("png", "jpg", "webp")[number % 3]
            picture.save(folder / name / f"{number}.{ending}", **LOSSLESS.get(ending, {}))


def recipes(folder: Path, base: Path) -> dict[str, dict[str, Any]]:
    """data.task -> recipe, over what `write_data` wrote; `base` is a language model's folder."""

    def recipe(name: str, data: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "seed": 3,
            "output": str(folder / "runs" / name),
            "data": {"split": {"validation": 0.2, "test": 0.2}, **data},
            "training": TRAINING,
            **more,
        }

    def source(name: str, **more: Any) -> list[dict[str, Any]]:
        return [{"kind": "jsonl", "path": str(folder / f"{name}.jsonl"), **more}]

    tokenizer = {"train": {"vocab_size": 300}}
    llama = {"architecture": "llama", "config": CONFIG}
    samples = {"generation": {"count": 1, "max_new_tokens": 4}}
    return {
        "language_modeling": recipe(
            "texts",
            {"sources": source("texts"), "tokenizer": tokenizer, **ROW},
            model=llama,
            evaluation=samples,
        ),
        "chat": recipe(
            "chats",
            {
                "task": "chat",
                "sources": source("chats", prompt="question", response="answer"),
                "tokenizer": tokenizer,
                **ROW,
            },
            model=llama,
            evaluation=samples,
        ),
        "text_classification": recipe(
            "labelled",
            {
                "task": "text_classification",
                "sources": source("labelled"),
                "tokenizer": tokenizer,
                **ROW,
            },
            model={"architecture": "bert", "config": {**CONFIG, **WITHOUT_DROPOUT}},
            objective={
                "class_weights": "balanced",
                "label_smoothing": 0.1,
                "token_dropout": 0.2,
            },
        ),
        "image_classification": recipe(
            "pictures",
            {
                "task": "image_classification",
                "sources": [{"kind": "image_folder", "path": str(folder / "pictures")}],
                "image": {"size": 12},
            },
            model={"architecture": "vit", "config": {**CONFIG, "patch_size": 4}},
            objective={
                "augment": {
                    "crop": [0.5, 1.0],
                    "flip": 0.5,
                    "rotate": 10,
                    "color_jitter": {"brightness": 0.3, "hue": 0.1},
                    "randaugment": {"layers": 1},
                    "erase": 0.3,
                },
                "mixup": 0.4,
                "cutmix": 1.0,
                "label_smoothing": 0.1,
            },
        ),
        "preference": recipe(
            "pairs",
            {"task": "preference", "sources": source("pairs"), **ROW},
            model={"from": str(base)},
            objective={"name": "kto"},
        ),
        "table": {
            "name": "people",
            "seed": 3,
            "output": str(folder / "runs" / "people"),
            "data": {
                "task": "table",
                "sources": [{"kind": "csv", "path": str(folder / "people.csv")}],
                "target": "outcome",
                "on_error": "skip",
                "split": {"validation": 0.2, "test": 0.2},
            },
            "model": {
                "architecture": "ft_transformer",
                "config": {
                    "hidden_size": 16,
                    "num_attention_heads": 2,
                    "num_hidden_layers": 2,
                    "intermediate_size": 24,
                    "dropout": 0.0,
                    "bins": 4,
                },
            },
            "objective": {"class_weights": "balanced"},
            "training": TRAINING,
        },
    }
