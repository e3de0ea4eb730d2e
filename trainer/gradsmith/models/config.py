"""A model's config and shapes from a recipe, on the meta device, so its size does not matter."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import quiet
from ..data.prepared import PreparedData
from ..errors import UserError, did_you_mean
from ..hub import hub_name
from ..recipe import Recipe
from ..run import Run
from ..tasks import make_task, task_class

if TYPE_CHECKING:
    from ..tasks.task import Task
    from .base import Model

# Read by transformers for models with rotary positions, though no config class declares them.
ROTARY_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
MAX_LAYERS = 1000


def describe_model(recipe: Recipe, fresh: bool = True) -> Any:
    """The recipe's model, adapters included, on the meta device: shapes without numbers.

    Args:
        recipe: with the model.
        fresh: whether it starts from what `model.from` is now, and not from what its run has kept.

    Raises:
        UserError: the config is impossible, or there are no usable weights at `model.from`.
    """
    import torch

    task = task_class(recipe.data.task)
    with quiet(Path(os.devnull)):  # what libraries say of a model that is only looked at
        if recipe.model.architecture is not None:
            config = config_of(recipe, _decided(recipe))
            where = "model.config"
        else:
            from .base import base_of, find_model

            name = str(recipe.model.from_)
            base = find_model(name, hashes=False) if fresh else base_of(Run(recipe.output), recipe)
            config, where = _config_from(base), "model.from"
        _check_ranges(config, where)
        _check_length(recipe, config)
        model = _on_meta(config, task, where)
        if recipe.model.adapter is not None:
            model = _with_adapter(model, recipe, task)
        elif recipe.model.train == "head":
            freeze_base(model)
        inputs = task.meta_inputs(recipe)
        if inputs is None:
            return model
        with torch.no_grad():  # shapes that do not fit together show in a forward pass
            try:
                model(**inputs)
            except Exception as error:
                told = _told(error)
                raise UserError(f"{where}: the layers do not fit together: {told}") from None
    return model


def _decided(recipe: Recipe) -> dict[str, Any]:
    """What the data decide of the model's shapes, where they are prepared already."""
    with contextlib.suppress(UserError):
        data = PreparedData.open(Run(recipe.output).data)
        if data.fits(recipe):
            found = make_task(recipe, data.processor(recipe)).config()
            # Knowing the padding's, transformers would look for it in inputs without numbers.
            return {key: found[key] for key in found if not key.endswith("_token_id")}
    return {}


def config_of(recipe: Recipe, decided: Mapping[str, Any]) -> Any:
    """The transformers config that `model.architecture` and `model.config` stand for.

    Args:
        recipe: a recipe with model.architecture.
        decided: what the data decide of it; without a `vocab_size` there it is what the recipe
            says of the tokenizer.

    Raises:
        UserError: no such architecture, no such key, or values that do not go together.
    """
    from transformers import CONFIG_MAPPING

    task = task_class(recipe.data.task)
    types = model_types(task)
    architecture = str(recipe.model.architecture)
    if architecture not in types:
        told = ", ".join(types)
        if ":" not in task.architectures:
            told = f"the {task.models_are} of transformers, as {task.for_example}"
        near = did_you_mean(architecture, types)
        raise UserError(f"model.architecture: found {architecture}; allowed are {told}.{near}")
    config_class = CONFIG_MAPPING[types[architecture]]
    values = dict(recipe.model.config or {})
    allowed = _config_keys(config_class)
    unknown = [key for key in values if key not in allowed]
    if unknown:
        lines = (f"model.config.{k}: {architecture} has none.{did_you_mean(k, allowed)}"
                 for k in unknown)  # fmt: skip
        raise UserError("\n  ".join(lines))
    for key, value in task.implied(recipe).items():
        if key in allowed:
            values.setdefault(key, value)
    vocab_size = decided.get("vocab_size") or _vocab_size(recipe)
    if vocab_size is not None and values.setdefault("vocab_size", vocab_size) < vocab_size:
        raise UserError(
            f"model.config.vocab_size: found {values['vocab_size']}, fewer than the tokenizer's "
            f"{vocab_size}; leave it out to take the tokenizer's"
        )
    try:
        config = config_class(**values)
    except Exception as error:
        raise UserError(f"model.config: {_told(error)}") from None
    vocabulary = getattr(config, "vocab_size", math.inf)
    for key in ("bos", "eos", "pad", "cls", "sep"):
        known = getattr(config, f"{key}_token_id", None)
        if isinstance(known, int) and known >= vocabulary:  # of the type's own tokenizer
            setattr(config, f"{key}_token_id", None)
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    if heads and shared and heads % shared:
        raise UserError(
            f"model.config.num_key_value_heads: found {shared}, which does not divide the "
            f"num_attention_heads of {heads}"
        )
    for key, value in decided.items():
        if key != "vocab_size":
            setattr(config, key, value)
    return config


def _config_keys(config_class: Any) -> set[str]:
    import inspect

    keys = set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs"}
    keys |= set(getattr(config_class, "attribute_map", {}))
    return keys | ROTARY_KEYS if "rope_parameters" in keys else keys


def _vocab_size(recipe: Recipe) -> int | None:
    """The tokenizer's size, as far as the recipe and its folders tell."""
    tokenizer = getattr(recipe.data, "tokenizer", None)
    if tokenizer is None:
        return None
    if tokenizer.train is not None:
        return tokenizer.train.vocab_size
    from ..data.tokenizer import find_tokenizer

    with contextlib.suppress(UserError):  # said elsewhere
        place = Path(find_tokenizer(str(tokenizer.from_), "data.tokenizer.from"))
        if (place / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            return int(Tokenizer.from_file(str(place / "tokenizer.json")).get_vocab_size())
    return None


def _config_from(model: Model) -> Any:
    """The config of the model at `model.from`, after a look at its weights."""
    from ..gguf import find_gguf
    from .folder import check_whole_model, load_config

    if find_gguf(model.place) is None:
        if Path(model.place).is_dir():
            check_whole_model(model.place, "model.from")
        else:
            hub_name(model.place, "model.from", "a model")
    return load_config(model, "model.from")


def _check_ranges(config: Any, where: str) -> None:
    """What a model could be built from, and would be of no use or take minutes to look at."""
    for key in ("num_hidden_layers", "num_layers", "n_layer"):
        layers = getattr(config, key, None)
        if isinstance(layers, int) and not 1 <= layers <= MAX_LAYERS:
            raise UserError(f"{where}.{key}: found {layers}; allowed are 1 to {MAX_LAYERS}")
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"):
        eps = getattr(config, key, None)
        if isinstance(eps, int | float) and not 0 <= eps <= 1:
            raise UserError(f"{where}.{key}: found {eps}; allowed are 0 to 1")


def _check_length(recipe: Recipe, config: Any) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    length = getattr(recipe.data, "sequence_length", 0)
    if positions is not None and length > positions:
        where = "model.config.max_position_embeddings" if recipe.model.architecture else "the model"
        raise UserError(f"data.sequence_length: found {length}; {where} allows at most {positions}")


def auto_class(task: Task | type[Task]) -> Any:
    """The class that builds a task's models: transformers' own, or one of the same methods."""
    return _find(task.auto_class, "transformers")


def model_types(task: type[Task]) -> dict[str, str]:
    """What `model.architecture` may be -> transformers' model type."""
    found = _find(task.architectures, "transformers.models.auto.modeling_auto")
    return dict(found) if ":" in task.architectures else {name: name for name in found}


def _find(name: str, home: str) -> Any:
    """What "module:name" stands for; a bare name is one of `home`."""
    module, _, name = name.rpartition(":")
    return getattr(import_module(module or home), name)


def _on_meta(config: Any, task: type[Task], where: str) -> Any:
    import torch

    try:
        with torch.device("meta"):
            return auto_class(task).from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{where}: no model can be built: {_told(error)}") from None


def lora_config(recipe: Recipe, task: Task | type[Task]) -> Any:
    """peft's config for the recipe's adapter."""
    from peft import LoraConfig

    adapter = recipe.model.adapter
    assert adapter is not None
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=adapter.dropout,
        target_modules=adapter.target,
        task_type=task.peft_type,
        modules_to_save=list(task.peft_saves) or None,
    )


def _with_adapter(model: Any, recipe: Recipe, task: type[Task]) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora_config(recipe, task))
    except Exception as error:
        raise UserError(f"model.adapter.target: {_told(error)}") from None


def freeze_base(model: Any) -> None:
    """Leaves what is above a transformers model's base to be trained: a linear probe.

    Raises:
        UserError: nothing is above it, or that is the base's own weights.
    """
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.train: head: this model has no weights of its own above its base")


def _told(error: Exception) -> str:
    """A library's message in one line, without the names of its own parts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        del lines[0]  # "Class validation error for validator 'validate_architecture':"
    text = re.sub(r"^(Value|Type)Error: ", "", " ".join(lines))
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text
