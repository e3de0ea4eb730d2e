"""Small recipes and corpora for the tests of gradsmith.data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.data.tokenizer import load_tokenizer
from gradsmith.recipe import Recipe, parse_recipe

WORDS = ["the", "a", "red", "blue", "tree", "house", "runs", "over", "under", "small", "one", "if"]


def words(seed: int, count: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(count)) + "."


def recipe(output: Path, seed: int = 1, **data: Any) -> Recipe:
    data = {"tokenizer": {"train": {"vocab_size": 300}}, "sequence_length": 64, **data}
    return parse_recipe(
        {
            "name": "test",
            "seed": seed,
            "output": str(output),
            "data": data,
            "model": {"architecture": "llama", "config": {}},
            "training": {"steps": 1},
        }
    )


def make(output: Path, **data: Any) -> PreparedData:
    return prepare(recipe(output, **data), log=lambda _: None)


def tokenizer_of(data: PreparedData) -> Any:
    """The tokenizer of a text's prepared data."""
    return load_tokenizer(str(data.folder / "tokenizer"), "data")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, answer_words: int = 6) -> list[dict[str, str]]:
    return [
        {"question": f"What is {i}? {words(i, 5)}", "answer": words(1000 + i, answer_words)}
        for i in range(count)
    ]


def jsonl_source(path: Path) -> dict[str, str]:
    return {"kind": "jsonl", "path": str(path), "prompt": "question", "response": "answer"}


def dropped(prepared: PreparedData, step: str) -> dict[str, int]:
    rows = [r for r in prepared.manifest["ledger"] if (r["step"], r["what"]) == (step, "dropped")]
    return {row["reason"]: row["documents"] for row in rows}
