"""Recipes, manifests, metrics and hostfiles that hypothesis makes up: read, or refused in a line.

Each is tried with 200 inputs here, and with 2,000 by `pytest -m long`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsmith.data.prepared import PreparedData
from gradsmith.errors import UserError
from gradsmith.launch import read_hostfile
from gradsmith.reading import read_json
from gradsmith.recipe import load_recipe
from gradsmith.report.build import build_report
from gradsmith.run import Run
from gradsmith.shapes import DataManifest

RECIPE = {
    "name": "tiny",
    "output": "run",
    "data": {
        "sources": [{"kind": "text", "path": "texts"}],
        "tokenizer": {"train": {"vocab_size": 300}},
        "sequence_length": 32,
    },
    "model": {"architecture": "llama", "config": {"hidden_size": 32}},
    "training": {"steps": 2, "optimizer": {"name": "adamw", "betas": [0.9, 0.95]}},
    "evaluation": {"generation": {"prompts": ["a"]}},
}
CLASSES = RECIPE | {
    "data": {"task": "text_classification", "tokenizer": {"train": {}},
             "sources": [{"kind": "csv", "path": "a.csv", "delimiter": ";", "columns": ["a"]}]},
    "objective": {"class_weights": {"a": 1.0, "b": 2}, "label_smoothing": 0.1},
}  # fmt: skip
del CLASSES["evaluation"]
PAIRS = CLASSES | {
    "data": {"task": "preference", "tokenizer": {"train": {}},
             "sources": [{"kind": "jsonl", "path": "a", "chosen": "b"}]},
    "objective": {"name": "kto", "beta": 0.1, "desirable_weight": 1},
}  # fmt: skip
TABLE = RECIPE | {
    "data": {"task": "table", "sources": [{"kind": "csv", "path": "a.csv", "delimiter": ";"}],
             "target": "y", "group": "g", "columns": {"drop": ["a"], "thousands": ","},
             "clean": {"missing": "constant", "fill": {"b": 1}, "keys": ["b"],
                       "outliers": {"method": "mad", "action": "flag", "threshold": 3}},
             "features": {"scale": "robust", "encoders": {"c": "hash"}, "pca": 3,
                          "interactions": [["a", "b"]], "select": {"keep": 4}},
             "split": {"validation": 0.2, "test": 100, "by": "group"}},
    "objective": {"loss": "quantile", "quantiles": [0.1, 0.5]},
    "model": {"architecture": "mlp", "config": {"hidden_sizes": [8]}},
}  # fmt: skip
IMAGES = RECIPE | {
    "data": {"task": "image_classification", "sources": [{"kind": "tar", "path": "a.tar"}],
             "image": {"size": 8, "mean": [0.5, 0.5, 0.5], "on_error": "refuse"}},
    "objective": {"augment": {"crop": [0.3, 1.0], "flip": 0.5, "color_jitter": {"hue": 0.1},
                              "randaugment": {"layers": 1}, "erase": 0.1}, "mixup": 0.2},
    "model": {"architecture": "vit", "config": {"hidden_size": 32}},
}  # fmt: skip
for tree in (TABLE, IMAGES):
    del tree["evaluation"]
FILE = {"bytes": 1, "sha256": "0"}
SPLIT = {"documents": 1, "tokens": 2, "target_tokens": 1, "bytes": 3, "eos_targets": 1,
         "files": {"tokens.bin": FILE}}  # fmt: skip
MANIFEST = {
    "format": "gradsmith-data-1", "task": "chat", "data_hash": "0", "vocab_size": 300,
    "bos_id": 0, "eos_id": 1, "pad_id": 2, "sequence_length": 32,
    "tokenizer": {"files": {"tokenizer.json": FILE}},
    "ledger": [{"step": "read", "what": "in", "documents": 1, "tokens": 1, "reason": "r"}],
    "sources": [{"kind": "text", "path": "a", "files": 1, "bytes": 2, "sha256": "0"}],
    "splits": {"train": SPLIT, "test": SPLIT},
}  # fmt: skip
ROW = {"kind": "train", "step": 1, "tokens": 2, "loss": 1.5, "lr": 0.1, "grad_norm": 1.0,
       "tokens_per_second": 9.0, "time": 1.0}  # fmt: skip
DEFINITION = {"name": "loss", "title": "Loss", "unit": "nats", "greater_is_better": False,
              "format": ".3f"}  # fmt: skip
EVALUATION = {
    "split": "test", "step": 1, "task": "chat", "definitions": [DEFINITION],
    "results": [{"name": "a", "values": {"loss": 1.0}, "ours": True, "note": "n"},
                {"name": "b", "values": {"loss": 2.0}}],
    "lead": "l", "note": "n",
    "blocks": [
        {"kind": "samples", "title": "t", "samples": [[{"name": "a", "text": "b", "ours": True}]],
         "settings": {"temperature": 0.7}},
        {"kind": "matrix", "title": "t", "rows": ["a", "b"], "columns": ["a", "b"],
         "row_title": "r", "column_title": "c", "values": [[1, 2], [3, 4]]},
        {"kind": "bars", "title": "t", "format": ".1%",
         "bars": [{"name": "a", "value": 1.0, "low": 0.5, "high": 1.5}]},
        {"kind": "chart", "title": "t", "x": "x", "y": "y",
         "lines": [{"name": "a", "points": [[0, 1], [1, 2]], "band": [[0, 0, 2], [1, 1, 3]]}],
         "references": [{"name": "r", "value": 1.5}]},
        {"kind": "table", "title": "t", "columns": [{"name": "a"}, {"name": "b", "format": ".2f"}],
         "rows": [["x", 1.0], [None, 2]]},
        {"kind": "images", "title": "t", "images": [{"png": "iVBORw0KGgo=", "caption": "c"}]},
    ],
}  # fmt: skip
PROVENANCE = {
    "created": "2026", "command": ["a"], "cpu": "c", "cores": 2, "world": 1, "threads": 1,
    "parameters": 3, "trainable_parameters": 2, "seconds": 1.5, "versions": {"torch": "2"},
    "git": {"commit": "0", "dirty": False}, "zero": {"stage": 1}, "backends": {"a": "cpu"},
    "accelerate": {"replaced": {"m": ["rms_norm", "cpu"]}, "left_alone": {"n": "why"}},
    "unit": "tokens", "metrics": [DEFINITION],
}  # fmt: skip

# Values that a key does not expect, small and absurd.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**18, -1, 0, 2**63, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\0", "\n", "é" * 300, "1e5", "010", "../..", "a/b", "nan"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=2), max_leaves=8),
)


def paths(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of plain data."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = [here] if here else []
    for key, branch in branches:
        found += paths(branch, (*here, key)) if isinstance(branch, dict | list) else [(*here, key)]
    return found


@st.composite
def harmed(draw: Any, tree: Any) -> Any:
    """The tree with one to three of its places changed, dropped, renamed or added to."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(tree) or [("a",)]))
        node = tree
        for key in path[:-1]:
            node = node[key]
        how = draw(st.sampled_from(["change", "drop", "add"]))
        if how == "change" or not isinstance(node, dict):
            node[path[-1]] = draw(ODD)
        elif how == "drop":
            node.pop(path[-1], None)
        else:
            node[draw(st.text(max_size=4))] = draw(ODD)
    return tree


def texts(tree: Any, dump: Callable[[Any], str]) -> st.SearchStrategy[bytes]:
    """A harmed tree as a file; the same with bytes cut off or put in; any bytes at all."""

    @st.composite
    def broken(draw: Any) -> bytes:
        whole = dump(draw(harmed(tree))).encode(errors="replace")
        place = draw(st.integers(0, len(whole)))
        return bytes(whole[:place] + draw(st.binary(max_size=3)) + whole[place + 1 :])

    whole = harmed(tree).map(lambda t: dump(t).encode(errors="replace"))
    return st.one_of(whole, whole, broken(), st.binary(max_size=40))


def read_run(folder: Path) -> None:
    build_report([Run(folder)], folder / "report.html")


def as_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True)


READERS: dict[str, tuple[str, st.SearchStrategy[bytes], Callable[[Path], object]]] = {
    "recipe": ("r.yaml", texts(RECIPE, as_yaml), lambda f: load_recipe(f / "r.yaml")),
    "recipe of classes": ("r.yaml", texts(CLASSES, as_yaml), lambda f: load_recipe(f / "r.yaml")),
    "recipe of pairs": ("r.yaml", texts(PAIRS, as_yaml), lambda f: load_recipe(f / "r.yaml")),
    "recipe of tables": ("r.yaml", texts(TABLE, as_yaml), lambda f: load_recipe(f / "r.yaml")),
    "recipe of images": ("r.yaml", texts(IMAGES, as_yaml), lambda f: load_recipe(f / "r.yaml")),
    "override": (
        "override",
        st.builds(
            lambda path, value: b"=".join([".".join(map(str, path)).encode(), value]),
            st.sampled_from([*paths(RECIPE), ("data", "sources", "\u00b2"), (), ("", "a")]),
            texts(RECIPE["training"], lambda t: as_yaml(t).replace("\n", ", ")),
        ),
        lambda f: load_recipe(f / "recipe.yaml", [os.fsdecode((f / "override").read_bytes())]),
    ),
    "manifest": (
        "data/manifest.json",
        texts(MANIFEST, json.dumps),
        lambda f: (
            read_json(f / "data" / "manifest.json", DataManifest),
            PreparedData.open(f / "data").fingerprint,
        ),
    ),
    "reported manifest": ("data/manifest.json", texts(MANIFEST, json.dumps), read_run),
    "metrics": ("metrics.jsonl", texts(ROW, lambda t: f"{json.dumps(t)}\n{json.dumps(ROW)}\n"),
                lambda f: (Run(f).read_metrics(), read_run(f))),
    "evaluation": ("evaluation.json", texts(EVALUATION, json.dumps), read_run),
    "provenance": ("provenance.json", texts(PROVENANCE, json.dumps), read_run),
    "hostfile": (
        "hosts",
        st.one_of(
            st.binary(max_size=60),
            st.lists(st.sampled_from(["a", "-o", " ", "slots=", "1", "\n", "\r", "#", "é", "0"]))
            .map(lambda parts: "".join(parts).encode()),
        ),
        lambda f: read_hostfile(f / "hosts"),
    ),
}  # fmt: skip


def drive(name: str, folder: Path, examples: int) -> None:
    file, content, reader = READERS[name]
    (folder / "data").mkdir()
    (folder / "recipe.yaml").write_text(as_yaml(RECIPE))

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(content)
    def check(text: bytes) -> None:
        (folder / file).write_bytes(text)
        try:
            reader(folder)
        except UserError as error:
            told = str(error)
            assert told.count("\n") < 30
            assert all(len(line) < 1000 for line in told.splitlines())
            told.encode()

    check()


@pytest.mark.parametrize("name", READERS)
def test_any_content_is_read_or_refused(name: str, tmp_path: Path) -> None:
    drive(name, tmp_path, 200)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_any_content_is_read_or_refused_at_length(name: str, tmp_path: Path) -> None:
    drive(name, tmp_path, 2000)
