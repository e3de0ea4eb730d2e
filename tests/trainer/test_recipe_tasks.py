"""The recipes of each task, of each optimizer and objective; and those that older runs kept."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from test_recipe import GOOD

from gradsmith.errors import UserError
from gradsmith.recipe import OBJECTIVES, OPTIMIZERS, RECIPES, Recipe, parse_recipe, recipe_schema

CHAT: dict[str, Any] = {
    "name": "t",
    "output": "runs/t",
    "data": {
        "task": "chat",
        "sources": [{"kind": "jsonl", "path": "a.jsonl", "prompt": "q", "response": "a"}],
        "chat": {"system": "Be brief."},
    },
    "model": {"from": "base"},
    "training": {"steps": 3},
}
CLASSES: dict[str, Any] = {
    "name": "t",
    "output": "runs/t",
    "data": {
        "task": "text_classification",
        "sources": [{"kind": "csv", "path": "reviews.tsv", "columns": ["text", "label"]}],
        "tokenizer": {"train": {"vocab_size": 300}},
    },
    "model": {"architecture": "bert"},
    "training": {"epochs": 1},
}
PAIRS: dict[str, Any] = {
    "name": "t",
    "output": "runs/t",
    "data": {
        "task": "preference",
        "sources": [{"kind": "jsonl", "path": "p.jsonl", "prompt": "q"}],
    },
    "model": {"from": "base"},
    "training": {"steps": 3},
}
TABLE: dict[str, Any] = {
    "name": "t",
    "output": "runs/t",
    "data": {"task": "table", "sources": [{"kind": "csv", "path": "t.csv"}], "target": "y"},
    "model": {"architecture": "mlp"},
    "training": {"epochs": 1},
}
IMAGES: dict[str, Any] = {
    "name": "t",
    "output": "runs/t",
    "data": {"task": "image_classification", "sources": [{"kind": "digits"}]},
    "objective": {"augment": {"crop": [0.3, 1.0], "randaugment": {}}, "mixup": 0.2},
    "model": {"architecture": "vit"},
    "training": {"epochs": 1},
}
TREES = {"language_modeling": GOOD, "chat": CHAT, "text_classification": CLASSES,
         "image_classification": IMAGES, "preference": PAIRS, "table": TABLE}  # fmt: skip


def changed(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    node: Any = tree
    *way, last = key.split(".")
    for part in way:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return tree


def said(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(tree, "r.yaml")
    return str(caught.value)


def test_there_is_a_recipe_of_each_task() -> None:
    assert set(TREES) == set(RECIPES)


@pytest.mark.parametrize("task", RECIPES)
def test_a_recipe_is_of_its_tasks_class_and_reads_back(task: str) -> None:
    recipe = parse_recipe(TREES[task])
    assert type(recipe) is RECIPES[task]
    assert isinstance(recipe, Recipe)
    assert recipe.data.task == task
    again = parse_recipe(json.loads(json.dumps(recipe.dump())))
    assert again == recipe
    assert again.data_hash() == recipe.data_hash()


@pytest.mark.parametrize(
    ("task", "key", "value", "expected"),
    [
        ("language_modeling", "objective", {}, "objective: unknown key; allowed are"),
        ("text_classification", "evaluation", {}, "evaluation: unknown key"),
        ("text_classification", "data.packing", True, "data.packing: unknown key"),
        ("text_classification", "data.sources.0.kind", "text", "are jsonl, csv, parquet, hf_dat"),
        ("text_classification", "data.sources.0.txt", "a", 'Did you mean "text"?'),
        ("text_classification", "data.sources.0.columns", ["a", "a"], "a name is there twice"),
        ("preference", "data.sources.0.delimiter", ";", "delimiter goes with kind csv; the kind"),
        ("preference", "data.sources.0.path", None, "kind jsonl needs a path"),
        ("preference", "training", {"tokens": 9}, "training.tokens: does not go with data.task"),
        ("text_classification", "objective.name", "dpo", "objective.name: unknown key; allowed"),
        ("text_classification", "objective.class_weights", "balancd", 'Did you mean "balanced"?'),
        ("text_classification", "objective.class_weights", {"a": 0}, "weights: a: found a whole"),
        ("text_classification", "objective.class_weights", [1], "class_weights: found a list"),
        ("text_classification", "objective.label_smoothing", 1.0, "should be less than 1"),
        ("preference", "objective.name", "dp", 'ipo, orpo, simpo, kto. Did you mean "dpo"'),
        ("preference", "objective", {"name": "simpo", "label_smoothing": 0.1},
         "objective: label_smoothing does not go with simpo; allowed are name, beta, gamma"),
        ("preference", "objective", {"name": "kto", "desirable_weigt": 1.0}, "Did you mean"),
        ("preference", "objective", {"name": "simpo", "gamma": -1.0}, "objective.gamma: found"),
        ("preference", "objective", 3, "expected a mapping with beta, label_smoothing, name"),
        ("preference", "data.task", "preferense", 'data.task: found text ("preferense")'),
        ("preference", "data.task", None, "allowed are language_modeling, chat, text_classif"),
        ("chat", "training.early_stopping.patience", 0, "patience: found a whole number (0)"),
        ("chat", "training.early_stopping.patienc", 1, 'Did you mean "patience"?'),
        ("chat", "training.validate.monitor", 1, "training.validate.monitor: found a whole"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_task_is_named(
    task: str, key: str, value: Any, expected: str
) -> None:
    told = said(changed(TREES[task], key, value))
    assert expected in told
    assert told.count("\n") == 1


def test_labels_that_are_numbers_are_text() -> None:
    recipe = parse_recipe(changed(CLASSES, "objective.class_weights", {0: 1, 1: 2.5, "a": 3}))
    assert recipe.dump()["objective"]["class_weights"] == {"0": 1.0, "1": 2.5, "a": 3.0}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_has_its_own_keys(name: str) -> None:
    objective = parse_recipe(changed(PAIRS, "objective.name", name)).dump()["objective"]
    assert objective["name"] == name
    own = {"dpo": {"label_smoothing"}, "simpo": {"gamma"},
           "kto": {"desirable_weight", "undesirable_weight"}}  # fmt: skip
    assert set(objective) == {"name", "beta"} | own.get(name, set())


def test_early_stopping_is_off_unless_it_is_asked_for() -> None:
    assert parse_recipe(CHAT).training.early_stopping is None
    tree = changed(CHAT, "training.early_stopping", {"min_delta": 1e-3})
    stopping = parse_recipe(tree).training.early_stopping
    assert stopping is not None
    assert (stopping.patience, stopping.min_delta) == (5, 1e-3)


# ---------------------------------------------------------------------------- runs that are there


def test_what_was_prepared_before_there_were_more_tasks_still_fits() -> None:
    """The hashes of a version in which one class held both tasks' recipes."""
    assert parse_recipe(GOOD).data_hash() == (
        "136eaf3e63db9aa9bf946584315656dfd172951915e2a19bbb02aa2cfd64ab84"
    )
    assert parse_recipe(CHAT).data_hash() == (
        "22cb6671d3c335d26680964fb187aedb7fe999119dad0e809d4eeb12e37ba228"
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_older_runs_recipe_is_read(name: str) -> None:
    """There every optimizer had the keys of all, null where they were not its own."""
    tree = changed(GOOD, "training", {"steps": 3, "schedule": {"name": "constant"}})
    tree["training"] |= {"zero": {"stage": 0}, "optimizer": {"name": name}}
    recipe = parse_recipe(tree)
    everyones = dict.fromkeys(
        ("betas", "eps", "momentum", "nesterov", "adamw_lr", "adjust_lr_fn", "states", "rounding")
    )
    kept = recipe.dump()
    kept["training"]["optimizer"] = everyones | kept["training"]["optimizer"]
    del kept["training"]["early_stopping"], kept["training"]["validate"]["monitor"]
    assert parse_recipe(kept) == recipe


def test_the_schema_tells_tasks_optimizers_and_objectives_apart() -> None:
    schema = recipe_schema()
    names = [option["$ref"].rpartition("/")[2] for option in schema["oneOf"]]
    assert names == [recipe.__name__ for recipe in RECIPES.values()]
    for branch, family in (("Optimizer", OPTIMIZERS), ("Preference", OBJECTIVES)):
        options = schema["$defs"][branch]["oneOf"]
        assert [option["properties"]["name"]["const"] for option in options] == list(family)
        # exactly one fits: the first where no name is given
        assert ["name" in option.get("required", []) for option in options] == [
            place > 0 for place in range(len(family))
        ]
