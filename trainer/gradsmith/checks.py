"""What can be checked about a recipe without training: `gradsmith validate`, and the first thing
that `train` and `launch` do.

`recipe.py` checks the recipe by itself; here it meets the machine: files, folders, the model that
it describes. The model is built on the meta device, so its size does not matter.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import quiet
from .errors import UserError, did_you_mean
from .hub import hub_name
from .recipe import LENGTHS, Recipe
from .run import Run, check_output

if TYPE_CHECKING:
    from .models.base import Model

# Read by transformers for models with rotary positions, though no config class declares them.
ROTARY_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
MAX_LAYERS = 1000


@dataclass(frozen=True)
class Summary:
    """What a recipe amounts to."""

    name: str
    model: str
    parameters: int
    trainable_parameters: int
    world: int
    accumulation: int
    tokens_per_step: int
    steps: int | None
    length: str
    precision: str
    precision_asked: str
    precision_price: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        trained = "all trained"
        if self.trainable_parameters != self.parameters:
            share = self.trainable_parameters / self.parameters
            trained = f"{self.trainable_parameters:,} of them trained ({share:.2%})"
        ranks = f"{self.world} rank" + "s" * (self.world > 1)
        auto = " (auto)" if self.precision_asked == "auto" else ""
        price = f"warning: {self.precision_price}"
        return "\n".join(
            (
                f"{self.name}: the recipe is good",
                f"  model   {self.model}, {self.parameters:,} parameters, {trained}",
                f"  step    {self.tokens_per_step:,} tokens at most, on {ranks}, "
                f"{self.accumulation} micro-batches each",
                f"  length  {self.length}",
                f"  dtype   {self.precision}{auto}",
                *([price] if self.precision_price else []),
            )
        )


def check_recipe(
    recipe: Recipe, world: int = 1, *, fresh: bool = False, here: bool = True
) -> Summary:
    """Checks a recipe for `world` ranks, against this machine if it is to be trained `here`.

    Sources and a base that are gone are no obstacle to a run that has its data and base already,
    unless it starts over (`fresh`).

    Raises:
        UserError: naming every problem found.
    """
    from .training.engine import check_precision, precision_price, settle_precision

    asked, before = recipe.training.precision, None
    with contextlib.suppress(UserError):  # training says what is wrong with the run there
        before = None if fresh else Run(recipe.output).going_on()
    recipe = settle_precision(recipe, before)
    problems: list[str] = []
    with _collect(problems):
        recipe.training.accumulation(world)
    with _collect(problems):
        check_output(recipe)
    if here:
        with _collect(problems):
            check_precision(recipe)
    problems += _check_data(recipe, fresh)
    model = None
    with _collect(problems):
        model = describe_model(recipe, fresh)
    if problems or model is None:
        raise UserError(
            "\n".join([f"{recipe.name}:", *(f"  {problem}" for problem in dict.fromkeys(problems))])
        )

    training = recipe.training
    tokens_per_step = training.global_batch * recipe.data.sequence_length
    steps = training.steps
    if training.tokens is not None:
        steps = math.ceil(training.tokens / tokens_per_step)
    length = next(
        f"{value:g} {name}" if name != "tokens" else f"{value:,} tokens"
        for name in LENGTHS
        if (value := getattr(training, name)) is not None
    )
    total, trainable = _count(model)
    return Summary(
        name=recipe.name,
        model=recipe.model.architecture or str(recipe.model.from_),
        parameters=total,
        trainable_parameters=trainable,
        world=world,
        accumulation=training.accumulation(world),
        tokens_per_step=tokens_per_step,
        steps=steps,
        length=length,
        precision=recipe.training.precision,
        precision_asked=asked,
        precision_price=precision_price(recipe),
    )


@contextlib.contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(str(error))


# ---------------------------------------------------------------------------- files and machine


def _check_data(recipe: Recipe, fresh: bool) -> list[str]:
    from .data.prepare import tokenizer_place
    from .data.shards import PreparedData
    from .data.sources import check_sources
    from .data.tokenizer import load_tokenizer

    problems: list[str] = []
    if not fresh:
        with contextlib.suppress(UserError):
            if PreparedData.open(Run(recipe.output).data).fits(recipe):
                return []
    with _collect(problems):
        check_sources(recipe.data)
    template = recipe.data.chat.template
    with _collect(problems):
        place = tokenizer_place(recipe)
        if place is not None and Path(place[0]).is_dir():
            load_tokenizer(*place)
    if template is not None and not Path(template).is_file():
        problems.append(f"data.chat.template: {template}: no such file")
    return problems


# ---------------------------------------------------------------------------------------- model


def describe_model(recipe: Recipe, fresh: bool = True) -> Any:
    """The recipe's model, adapters included, on the meta device: shapes without numbers.

    Args:
        recipe: with the model.
        fresh: whether it starts from what `model.from` is now, and not from what its run has kept.

    Raises:
        UserError: the config is impossible, or there are no usable weights at `model.from`.
    """
    import torch

    with quiet(Path(os.devnull)):  # what libraries say of a model that is only looked at
        if recipe.model.architecture is not None:
            config = config_of(recipe)
            where = "model.config"
        else:
            from .models.base import base_of, find_model

            name = str(recipe.model.from_)
            base = find_model(name, hashes=False) if fresh else base_of(Run(recipe.output), recipe)
            config, where = _config_from(base), "model.from"
        _check_ranges(config, where)
        _check_length(recipe, config)
        model = _on_meta(config, where)
        if recipe.model.adapter is not None:
            model = _with_adapter(model, recipe)
        with torch.no_grad():  # shapes that do not fit together show in a forward pass
            ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
            try:
                model(input_ids=ids)
            except Exception as error:
                told = _told(error)
                raise UserError(f"{where}: the layers do not fit together: {told}") from None
    return model


def config_of(recipe: Recipe, vocab_size: int | None = None) -> Any:
    """The transformers config that `model.architecture` and `model.config` stand for.

    Args:
        recipe: a recipe with model.architecture.
        vocab_size: of the tokenizer; by default what the recipe says of it.

    Raises:
        UserError: no such architecture, no such key, or values that do not go together.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = str(recipe.model.architecture)
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = did_you_mean(architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise UserError(
            f"model.architecture: found {architecture}; allowed are the causal language models "
            f"of transformers, as llama, qwen3, gpt2.{near}"
        )
    config_class = CONFIG_MAPPING[architecture]
    values = dict(recipe.model.config or {})
    allowed = _config_keys(config_class)
    unknown = [key for key in values if key not in allowed]
    if unknown:
        lines = (f"model.config.{k}: {architecture} has none.{did_you_mean(k, allowed)}"
                 for k in unknown)  # fmt: skip
        raise UserError("\n  ".join(lines))
    vocab_size = vocab_size or _vocab_size(recipe)
    if vocab_size is not None and values.setdefault("vocab_size", vocab_size) < vocab_size:
        raise UserError(
            f"model.config.vocab_size: found {values['vocab_size']}, fewer than the tokenizer's "
            f"{vocab_size}; leave it out to take the tokenizer's"
        )
    try:
        config = config_class(**values)
    except Exception as error:
        raise UserError(f"model.config: {_told(error)}") from None
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    if heads and shared and heads % shared:
        raise UserError(
            f"model.config.num_key_value_heads: found {shared}, which does not divide the "
            f"num_attention_heads of {heads}"
        )
    return config


def _config_keys(config_class: Any) -> set[str]:
    import inspect

    keys = set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs"}
    keys |= set(getattr(config_class, "attribute_map", {}))
    return keys | ROTARY_KEYS if "rope_parameters" in keys else keys


def _vocab_size(recipe: Recipe) -> int | None:
    """The tokenizer's size, as far as the recipe and its folders tell."""
    tokenizer = recipe.data.tokenizer
    if tokenizer is None:
        return None
    if tokenizer.train is not None:
        return tokenizer.train.vocab_size
    from .data.tokenizer import find_tokenizer

    with contextlib.suppress(UserError):  # said elsewhere
        place = Path(find_tokenizer(str(tokenizer.from_), "data.tokenizer.from"))
        if (place / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            return int(Tokenizer.from_file(str(place / "tokenizer.json")).get_vocab_size())
    return None


def _config_from(model: Model) -> Any:
    """The config of the model at `model.from`, after a look at its weights."""
    from .models.folder import check_whole_model, load_config
    from .models.gguf import find_gguf

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
    if positions is not None and recipe.data.sequence_length > positions:
        where = "model.config.max_position_embeddings" if recipe.model.architecture else "the model"
        raise UserError(
            f"data.sequence_length: found {recipe.data.sequence_length}; {where} "
            f"allows at most {positions}"
        )


def _on_meta(config: Any, where: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{where}: no model can be built: {_told(error)}") from None


def _with_adapter(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    adapter = recipe.model.adapter
    assert adapter is not None
    try:
        return get_peft_model(
            model,
            LoraConfig(r=adapter.rank, target_modules=adapter.target, task_type="CAUSAL_LM"),
        )
    except Exception as error:
        raise UserError(f"model.adapter.target: {_told(error)}") from None


def _count(model: Any) -> tuple[int, int]:
    parameters = list(model.parameters())
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )


def _told(error: Exception) -> str:
    """A library's message in one line, without the names of its own parts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        del lines[0]  # "Class validation error for validator 'validate_architecture':"
    text = re.sub(r"^(Value|Type)Error: ", "", " ".join(lines))
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text
