"""From YAML and overrides to a recipe, and every word of what is wrong with one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.json_schema import models_json_schema

from ..errors import UserError, did_you_mean, one_line
from ..files import check_apart
from ..reading import describe, parse_yaml, read_text
from .node import Node, Variant
from .training import LENGTHS
from .tree import RECIPES, Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides of the form `training.steps=50`.

    Raises:
        UserError: naming every problem found; or its run's folder is the one that it lies in.
    """
    recipe = read_recipe(path, overrides)
    check_apart(Path(path), Path(recipe.output))
    return recipe


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` for a run's own copy, which lies in its folder."""
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f" In {path.parent}/ there are: {', '.join(near)}." if near else ""
        raise UserError(f"{path}: no such recipe file.{hint}")
    tree = parse_yaml(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a recipe is a mapping with {', '.join(Recipe.model_fields)}; "
            f"found {describe(tree)}"
        )
    _drop_lengths(tree, overrides)
    for override in overrides:
        _apply_override(tree, override)
    return parse_recipe(tree, where=str(path))


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Checks a tree of plain data; see `load_recipe`."""
    try:
        return _class_of(tree, where).model_validate(tree)
    except ValidationError as error:
        problems = [_explain(problem, tree) for problem in error.errors()]
        raise UserError("\n".join([f"{where}:", *(f"  {p}" for p in problems)])) from None


def _class_of(tree: dict[str, Any], where: str = "recipe") -> type[Recipe]:
    """The class of the recipe's task.

    Raises:
        UserError: there is no such task; what else is allowed depends on it.
    """
    data, default = tree.get("data"), next(iter(RECIPES))
    task = data.get("task", default) if isinstance(data, dict) else default
    if not isinstance(task, str) or task not in RECIPES:
        raise UserError(f"{where}:\n  data.task: {_not_one_of(task, list(RECIPES))}")
    return RECIPES[task]


def _drop_lengths(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """An override that says how long to train replaces what the file says, in whatever unit."""
    given = [override.partition("=")[0].strip().rpartition(".") for override in overrides]
    training = tree.get("training")
    if isinstance(training, dict) and any(
        path == "training" and key in LENGTHS for path, _, key in given
    ):
        for name in LENGTHS:
            training.pop(name, None)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    shown = one_line(override, 100)
    if not equals or not key.strip():
        raise UserError(f'override "{shown}": expected key=value, for example training.steps=50')
    parts = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        here = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(node, list):
            allowed = [str(place) for place in range(len(node))]
            if part not in allowed:
                one = f"{len(node)} entr{'y' if len(node) == 1 else 'ies'}, 0 to {len(node) - 1}"
                raise UserError(
                    f'override "{shown}": {here}: the list has {one if node else "no entries"}; '
                    f"to add some, give the whole list: {'.'.join(parts[:depth])}=[...]"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise UserError(
                f'override "{shown}": {".".join(parts[:depth])} is {describe(node)}, '
                "so it has no keys under it"
            )
        if last:
            node[index] = parse_yaml(value, f'override "{shown}"')
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]


def _not_one_of(found: Any, options: Sequence[Any]) -> str:
    names = [str(option) for option in options]
    near = did_you_mean(found, names) if isinstance(found, str) and found not in names else ""
    return f"found {describe(found)}; allowed are {', '.join(names)}.{near}"


def _explain(problem: Any, tree: dict[str, Any]) -> str:
    """One pydantic problem as: dotted key, what was found, what is allowed, the nearest name."""
    loc = [part for part in problem["loc"] if part not in ("str", "list[str]")]
    key = ".".join(str(part) for part in loc) or "recipe"
    kind, context, found = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        node = _node_at(loc[:-1], tree)
        names = _names_of(node)
        if issubclass(node, Variant) and loc[-1] in _names_of(node, *node.variants().values()):
            name = node.model_fields["name"].default
            above = ".".join(str(part) for part in loc[:-1])
            return f"{above}: {loc[-1]} does not go with {name}; allowed are {', '.join(names)}"
        names.sort()
        return f"{key}: unknown key; allowed are {', '.join(names)}.{did_you_mean(loc[-1], names)}"
    if kind == "missing":
        return f"{key}: missing, and it is required"
    if kind == "literal_error":
        return f"{key}: {_not_one_of(found, _literal_options(loc, tree))}"
    if kind == "model_type":
        names = sorted(_names_of(_node_at(loc, tree)))
        return f"{key}: found {describe(found)}; expected a mapping with {', '.join(names)}"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    return f"{key}: found {describe(found)}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _nodes_of(annotation: Any) -> Iterator[type[Node]]:
    if isinstance(annotation, type) and issubclass(annotation, Node):
        yield annotation
    for argument in get_args(annotation):
        yield from _nodes_of(argument)


def _field(node: type[Node], name: str) -> Any:
    for field_name, field in node.model_fields.items():
        if name in (field_name, field.alias):
            return field
    return None


def _node_at(loc: Sequence[Any], tree: Any) -> type[Node]:
    """The class of the branch at `loc`, which may follow from what stands there."""
    node: type[Node] = _class_of(tree)
    for part in loc:
        field = _field(node, part) if isinstance(part, str) else None
        try:
            tree = tree[part]
        except (LookupError, TypeError):
            tree = None
        if field:
            node = next(_nodes_of(field.annotation), node)
            if issubclass(node, Variant):
                node = node.chosen(tree if isinstance(tree, dict) else {}) or node
    return node


def _names_of(*nodes: type[Node]) -> list[str]:
    """The keys of a branch, in their order."""
    return list(
        dict.fromkeys(
            field.alias or name for node in nodes for name, field in node.model_fields.items()
        )
    )


def _literal_options(loc: Sequence[Any], tree: Any) -> list[Any]:
    depth = next(  # below a field of plain values there are keys that the user chose
        depth
        for depth, part in enumerate(loc)
        if isinstance(part, str)
        and (field := _field(_node_at(loc[:depth], tree), part))
        and not any(_nodes_of(field.annotation))
    )
    node = _node_at(loc[:depth], tree)
    if issubclass(node, Variant) and loc[depth] == "name":
        return list(node.variants())

    def options(annotation: Any) -> list[Any]:
        arguments = get_args(annotation)
        if arguments and not any(isinstance(a, type) or get_args(a) for a in arguments):
            return list(arguments)
        return [option for argument in arguments for option in options(argument)]

    return options(_field(node, loc[depth]).annotation)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: one of the tasks' classes, told apart by
    `data.task`."""
    modes: Any = [(recipe, "validation") for recipe in RECIPES.values()]
    references, schema = models_json_schema(modes, by_alias=True, title="Recipe")
    return {**schema, "oneOf": [references[mode] for mode in modes]}
