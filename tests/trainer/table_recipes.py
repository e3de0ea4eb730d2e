"""Small tables and their recipes, for the tests of gradsmith.data.table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.recipe import Recipe, parse_recipe

Rows = list[dict[str, Any]]


def write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def broken(value: float) -> float:
    """Never whole, so that it is the same text wherever it comes from."""
    return round(round(float(value), 2) + 0.001, 3)


def people(count: int, seed: int = 0) -> Rows:
    """Rows with gaps, a category, a date and two targets: `left` and `spent`."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        age, city = draw.normal(40, 12), draw.choice(["Bern", "Rome", "Oslo"])
        spent = 3 * age + 20 * (city == "Rome") + draw.normal()
        rows.append(
            {
                "age": "" if draw.random() < 0.1 else broken(age),
                "income": broken(np.exp(draw.normal(8, 1))),
                "city": "" if draw.random() < 0.1 else str(city),
                "since": f"202{draw.integers(5)}-{draw.integers(1, 13):02}-{number % 28 + 1:02}",
                "left": "yes" if age + draw.normal() > 42 else "no",
                "spent": broken(spent),
            }
        )
    return rows


def recipe(output: Path, source: Path, target: str = "left", **data: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "test",
            "seed": 1,
            "output": str(output),
            "data": {
                "task": "table",
                "sources": [{"kind": "csv", "path": str(source)}],
                "target": target,
                **data,
            },
            "model": {"architecture": "mlp"},
            "training": {"steps": 1},
        }
    )


def make(output: Path, source: Path, target: str = "left", **data: Any) -> PreparedData:
    return prepare(recipe(output, source, target, **data), log=lambda _: None)


def held_out(data: PreparedData) -> dict[str, Rows]:
    """The raw rows of validation and test."""
    return {name: [row["fields"] for row in data.held_out(name)] for name in ("validation", "test")}


def ledger(data: PreparedData, step: str, what: str) -> dict[str, int]:
    rows = [r for r in data.manifest["ledger"] if (r["step"], r["what"]) == (step, what)]
    return {row.get("reason", ""): row["documents"] for row in rows}
