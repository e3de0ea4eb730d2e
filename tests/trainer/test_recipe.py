"""The recipe: what is refused and in which words, overrides, and how it survives a round trip."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsmith.errors import UserError
from gradsmith.recipe import RECIPES, Node, Variant, load_recipe, parse_recipe, recipe_schema
from gradsmith.recipe.reading import _nodes_of

ROOT = Path(__file__).parents[2]

GOOD: dict[str, Any] = {
    "name": "tiny",
    "output": "runs/tiny",
    "data": {
        "sources": [{"kind": "text", "path": "corpus.txt"}],
        "tokenizer": {"train": {"vocab_size": 300}},
    },
    "model": {"architecture": "llama", "config": {"hidden_size": 32}},
    "training": {"steps": 3},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    """GOOD with one dotted key set; DROP removes it."""
    tree = copy.deepcopy(GOOD)
    node: Any = tree
    *way, last = key.split(".")
    for part in way:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    if value is DROP:
        del node[last]
    else:
        node[last] = value
    return tree


DROP = object()


def message(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(tree, "r.yaml")
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def written(folder: Path) -> Path:
    return write(folder, yaml.safe_dump(GOOD))


def test_a_good_recipe_fills_in_its_defaults() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.seed == 1234
    assert recipe.training.zero.stage == 1
    assert recipe.training.optimizer.betas == [0.9, 0.95]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        # unknown keys, at every depth, with the nearest name and what is allowed
        ("trainig", {}, ["trainig: unknown key; allowed are data,", 'Did you mean "training"?']),
        ("training.step", 5, ["training.step: unknown key", 'Did you mean "steps"?']),
        (
            "training.zero.stages",
            1,
            ["training.zero.stages: unknown key; allowed are offload, stag"],
        ),
        ("data.sources.0.pth", "x", ["data.sources.0.pth: unknown key", 'Did you mean "path"?']),
        ("data.tokenizer.form", "x", ["data.tokenizer.form: unknown key", 'Did you mean "from"?']),
        ("training.validate_", {}, ["training.validate_: unknown key", 'Did you mean "validate"?']),
        # wrong types, without silent conversions
        ("training.steps", "50", ['training.steps: found text ("50")', "valid integer"]),
        ("training.steps", 2.5, ["training.steps: found a number (2.5)"]),
        ("training.steps", True, ["training.steps: found true/false (true)"]),
        ("data.packing", "yes", ['data.packing: found text ("yes")']),
        ("data.sources", {}, ["data.sources: found a mapping ({})"]),
        ("data.sources", [], ["data.sources: found a list ([])"]),
        ("data", None, ["data: found nothing; expected a mapping with chat, clean, packing"]),
        ("training.zero.stage", "1", ['found text ("1"); allowed are 0, 1, 2, 3.']),
        ("training.optimizer.lr", "fast", ["training.optimizer.lr: found text"]),
        # out of range
        ("training.steps", 0, ["training.steps: found a whole number (0)", "greater than 0"]),
        ("training.optimizer.lr", float("inf"), ["training.optimizer.lr", "finite"]),
        ("training.optimizer.betas", [0.9, 1.0], ["training.optimizer.betas.1", "less than 1"]),
        ("training.optimizer.betas", [0.9], ["training.optimizer.betas: found a list ([0.9])"]),
        ("data.sequence_length", 1, ["data.sequence_length", "greater than or equal to 2"]),
        (
            "data.tokenizer.train.vocab_size",
            100,
            ["data.tokenizer.train.vocab_size: found a whole number (100)", "or equal to"],
        ),
        ("seed", -1, ["seed: found a whole number (-1)"]),
        ("name", "a/b", ['name: found text ("a/b")']),
        # not one of the choices
        (
            "training.precision",
            "bf61",
            ["allowed are auto, bf16, fp32, fp16", 'Did you mean "bf16"?'],
        ),
        (
            "training.zero.stage",
            4,
            ["training.zero.stage: found a whole number (4); allowed are 0, 1, 2, 3"],
        ),
        ("data.sources.0.kind", "jsonk", ["allowed are text, jsonl, parquet", 'mean "jsonl"?']),
        ("data.task", "chatt", ["data.task", 'Did you mean "chat"?']),
        # missing
        ("output", DROP, ["output: missing, and it is required"]),
        ("data.sources", DROP, ["data.sources: missing"]),
        # combinations that cannot be
        (
            "training.zero",
            {"stage": 0, "offload": "optimizer"},
            ["needs stage 1, 2 or 3; stage is 0"],
        ),
        (
            "training.zero",
            {"stage": 2, "offload": "all"},
            ["offload: all needs stage 3; stage is 2"],
        ),
        (
            "training.tokens",
            100,
            [
                "training: give exactly one of steps, tokens, epochs and minutes",
                "found steps: 3, tokens: 100",
            ],
        ),
        ("training.steps", DROP, ["training: give exactly one of", "found none"]),
        ("training.micro_batch", 3, ["training: global_batch 16 is no multiple of micro_batch 3"]),
        ("data.split", {"validation": 0.5, "test": 0.5}, ["data.split: validation + test is 1"]),
        ("data.sources.0.path", DROP, ["data.sources.0: kind text needs a path"]),
        ("data.sources.0.kind", "python_stdlib", ["path does not go with kind python_stdlib"]),
        ("data.sources.0.prompt", "q", ["prompt and response go together"]),
        (
            "data.sources",
            [{"kind": "jsonl", "path": "x", "prompt": "q", "response": "a", "messages": "m"}],
            ["data.sources.0: name either messages or prompt and response"],
        ),
        ("data.tokenizer", {"train": {}, "from": "x"}, ["exactly one of train and from"]),
        ("data.tokenizer", {}, ["exactly one of train and from"]),
        ("data.tokenizer", DROP, ["data.tokenizer: a model built from a config needs one"]),
        ("model", {}, ["exactly one of architecture (with config) and from"]),
        ("model.from", "x", ["exactly one of architecture (with config) and from"]),
        ("model", {"from": "x", "config": {}}, ["config goes with architecture"]),
        ("model.adapter", {"rank": 4}, ["an adapter needs a trained base"]),
    ],
)
def test_what_is_wrong_is_named(key: str, value: Any, expected: list[str]) -> None:
    said = message(changed(key, value))
    assert said.startswith("r.yaml:\n")
    for part in expected:
        assert part in said


def test_all_problems_are_told_at_once() -> None:
    tree = changed("training.step", 1)
    tree["data"]["packing"] = 1
    tree["nme"] = "x"
    said = message(tree)
    assert said.count("\n") == 3
    for key in ("training.step:", "data.packing:", "nme:"):
        assert key in said


# ---------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("training.steps=50", lambda r: r.training.steps, 50),
        ("data.sources.0.path=other.txt", lambda r: r.data.sources[0].path, "other.txt"),
        ("training.optimizer.lr=3e-4", lambda r: r.training.optimizer.lr, 3e-4),
        ("training.validate.every=7", lambda r: r.training.validate_.every, 7),
        ("training.clip=null", lambda r: r.training.clip, None),
        ("training.zero={stage: 2}", lambda r: r.training.zero.stage, 2),
        ("model.config.rope_theta=1e6", lambda r: r.model.config["rope_theta"], 1e6),
        ("evaluation.generation.prompts=[a=b]", lambda r: r.evaluation.generation.prompts, ["a=b"]),
        ("output=a=b", lambda r: r.output, "a=b"),
    ],
)
def test_an_override_sets_its_key(tmp_path: Path, override: str, get: Any, value: Any) -> None:
    assert get(load_recipe(written(tmp_path), [override])) == value


def test_overrides_apply_in_their_order(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path), ["training.steps=5", "training.steps=6"])
    assert recipe.training.steps == 6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", 'override "training.steps": expected key=value'),
        ("=5", "expected key=value"),
        ("training.stepz=5", "training.stepz: unknown key; allowed are"),
        ("data.sources.1.path=x", "data.sources.1: the list has 1 entry, 0 to 0; to add some"),
        ("data.sources.first.path=x", "data.sources.first: the list has 1 entry"),
        ("name.x=5", 'name is text ("tiny"), so it has no keys under it'),
        ("training.zero={stage: 2", "not readable as YAML"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        load_recipe(written(tmp_path), [override])


# --------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("number", ["3e-4", "3.0e-4", "3E-4", "+3e-4", ".3e-3", "0.0003"])
def test_a_rate_is_a_number_however_it_is_written(tmp_path: Path, number: str) -> None:
    path = written(tmp_path)
    path.write_text(
        path.read_text().replace("steps: 3", f"steps: 3\n  optimizer: {{lr: {number}}}")
    )
    assert load_recipe(path).training.optimizer.lr == pytest.approx(3e-4)


def test_a_word_that_looks_a_little_like_a_number_stays_text(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path), ["output=1e5x"]).output == "1e5x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", 'the key "name" stands there twice'),
        ("training: {steps: 1, steps: 2}\n", 'the key "steps" stands there twice'),
        ("name: [a\n", "not readable as YAML"),
        ("x: !!python/object/apply:os.system ['true']\n", "not readable as YAML"),
        ("- a\n", "a recipe is a mapping with name,"),
        ("", "a recipe is a mapping with name, .*found nothing"),
        ("just words", "found text"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=f"(?s)^{re.escape(str(path))}.*{expected}"):
        load_recipe(path)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(UserError, match=r"q\.yaml: no such recipe file\. In .* there are: r\.yaml"):
        load_recipe(tmp_path / "q.yaml")


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"not UTF-8 text .* at byte 6"):
        load_recipe(path)


# ---------------------------------------------------------------------------------- the tree


def test_a_dump_reads_back_as_the_same_recipe() -> None:
    tree = changed("training.validate", {"every": 7})
    recipe = parse_recipe(tree)
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.dump()))) == recipe
    assert recipe.dump()["training"]["validate"]["every"] == 7


def test_the_data_hash_sees_the_data_and_nothing_else() -> None:
    hashed = parse_recipe(GOOD).data_hash()
    for key, value in (("name", "b"), ("output", "c"), ("training.steps", 9)):
        assert parse_recipe(changed(key, value)).data_hash() == hashed
    for key, value in (("seed", 1), ("data.sequence_length", 8), ("data.clean.min_characters", 2)):
        assert parse_recipe(changed(key, value)).data_hash() != hashed


def test_the_data_hash_sees_where_the_tokenizer_comes_from() -> None:
    tree = changed("data.tokenizer", DROP)
    first = parse_recipe({**tree, "model": {"from": "a"}}).data_hash()
    assert parse_recipe({**tree, "model": {"from": "b"}}).data_hash() != first


@pytest.mark.parametrize(("world", "expected"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_follows_from_the_ranks(world: int, expected: int) -> None:
    tree = changed("training.global_batch", 16)
    assert parse_recipe(tree).training.accumulation(world) == expected


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"training\.global_batch: 16 .* 3 ranks .* multiples of 12"
    ):
        parse_recipe(GOOD).training.accumulation(3)


def nodes(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    """The branches that a part of a JSON schema may stand for."""
    if reference := node.get("$ref"):
        return nodes(schema, schema["$defs"][reference.rpartition("/")[2]])
    options = [node.get("items", {}), *(node.get(key, []) for key in ("anyOf", "oneOf", "allOf"))]
    flat = [part for option in options for part in ([option] if option is options[0] else option)]
    own = [node] if "properties" in node else []
    return own + [found for part in flat if part for found in nodes(schema, part)]


def keys_of(schema: dict[str, Any], node: dict[str, Any], above: str = "") -> set[str]:
    """Every dotted key of a JSON schema, list items as their own level without an index."""
    found = set()
    for branch in nodes(schema, node):
        for name, child in branch["properties"].items():
            found |= {f"{above}{name}", *keys_of(schema, child, f"{above}{name}.")}
    return found


def test_the_schema_uses_the_names_of_the_yaml_and_refuses_others() -> None:
    schema = recipe_schema()
    keys = keys_of(schema, schema)
    assert {"model.from", "data.tokenizer.from", "training.validate.every"} <= keys
    assert {"data.sources.kind", "model.adapter.rank", "training.zero.offload"} <= keys
    assert not any(key.endswith("_") for key in keys)
    branches = [branch for part in schema["$defs"].values() for branch in nodes(schema, part)]
    assert len(branches) > 40
    assert all(branch["additionalProperties"] is False for branch in branches)


def test_the_reference_names_every_key_with_its_default() -> None:
    reference = (ROOT / "docs" / "recipe.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \|(.*)$", reference, flags=re.MULTILINE))
    schema = recipe_schema()
    assert set(rows) == keys_of(schema, schema)
    for recipe in RECIPES.values():
        for key, default in defaults(recipe):
            assert f"`{default}`" in rows[key], f"{key}: the default is {default}"


def defaults(node: type[Node], above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, default as the YAML writes it) of every leaf that has one."""
    if issubclass(node, Variant) and node not in node.variants().values():
        for variant in node.variants().values():
            yield from defaults(variant, above)
        return
    for name, field in node.model_fields.items():
        key = above + (field.alias or name)
        children = list(_nodes_of(field.annotation))
        if children:
            yield from defaults(children[0], f"{key}.")
        elif not field.is_required() and field.default is not None and name != "name":
            yield key, yaml.safe_dump(field.default, default_flow_style=True).split("\n")[0]


def test_every_recipe_of_the_project_reads() -> None:
    paths = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(paths) >= 4
    names = {load_recipe(path).name for path in paths}
    assert len(names) == len(paths)
    for path in paths:  # what a recipe writes belongs to it alone
        assert load_recipe(path).output.startswith("runs/")


def test_an_override_of_the_length_replaces_the_recipes(tmp_path: Path) -> None:
    file = write(tmp_path, yaml.safe_dump(changed("training", {"minutes": 3})))
    assert load_recipe(file).training.minutes == 3
    training = load_recipe(file, ["training.steps=7"]).training
    assert (training.steps, training.minutes) == (7, None)
    assert load_recipe(file, ["training.minutes=5", "training.clip=2.0"]).training.minutes == 5
    with pytest.raises(UserError, match="exactly one of steps, tokens"):
        load_recipe(file, ["training.steps=7", "training.epochs=1"])
