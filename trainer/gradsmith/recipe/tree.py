"""The whole recipe: a class for each task, chosen by `data.task`."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from ..reading import describe
from .data import (
    ChatData,
    ImageData,
    LabelledData,
    LanguageModelingData,
    PairData,
    TextData,
    TokenizedData,
)
from .node import (
    SMALLEST_TEMPERATURE,
    Fraction,
    Node,
    PathText,
    PositiveFloat,
    PositiveInt,
    Temperature,
)
from .objective import (
    DPO,
    ImageObjective,
    Preference,
    TableObjective,
    TextClassificationObjective,
)
from .table import TableData
from .training import Training


class Adapter(Node):
    method: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Fraction = 0.0
    target: str | list[str] = Field(
        "all-linear", description='"all-linear" or a list of module names'
    )


def _check_plain(value: Any, key: str) -> None:
    """
    Raises:
        ValueError: it holds something else than text, numbers, true, false and null, in lists
            and mappings of a few levels.
    """
    if isinstance(value, dict | list) and key.count(".") < 20:
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            if not isinstance(name, str | int):
                raise ValueError(f"{key}: found the key {describe(name)}; keys are text")
            _check_plain(item, f"{key}.{name}")
        return
    whole = isinstance(value, int) and -(2**63) < value < 2**63
    number = whole or (isinstance(value, float) and not math.isnan(value))
    if not number and not isinstance(value, str | None):
        raise ValueError(f"{key}: found {describe(value)}; allowed are text and numbers")


class Model(Node):
    architecture: str | None = Field(
        None, description="a transformers model type that the task can train"
    )
    config: dict[str, Any] | None = Field(None, description="keys of that type's config class")
    from_: PathText | None = Field(
        None,
        alias="from",
        description="a run, a folder or hub name with safetensors weights, or a GGUF file",
    )
    adapter: Adapter | None = None
    train: Literal["all", "head"] = Field(
        "all", description="what of from is trained where there is no adapter"
    )
    kernels: bool = Field(True, description="gradsmith's kernels under the model, or stock")

    @model_validator(mode="after")
    def _one(self) -> Model:
        if (self.architecture is None) == (self.from_ is None):
            raise ValueError("give exactly one of architecture (with config) and from")
        if self.from_ is not None and self.config is not None:
            raise ValueError("config goes with architecture; a model taken from brings its own")
        if self.adapter is not None and self.from_ is None:
            raise ValueError("an adapter needs a trained base: set from instead of architecture")
        if self.train == "head" and (self.from_ is None or self.adapter is not None):
            raise ValueError(
                "train: head trains a new head on a frozen model: it needs from, and no adapter"
            )
        _check_plain(self.config, "config")
        return self


class Generation(Node):
    prompts: list[str] = Field([], description="what to continue in the report's samples")
    count: Annotated[int, Field(ge=0)] = Field(
        3, description="samples from held-out prompts where no prompts are given"
    )
    max_new_tokens: PositiveInt = 96
    temperature: Temperature = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95

    @model_validator(mode="after")
    def _drawable(self) -> Generation:
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature:g} is below {SMALLEST_TEMPERATURE:g}; "
                "0 takes the likeliest token"
            )
        return self


class Evaluation(Node):
    yardsticks: list[Literal["xz", "ngram"]] = Field(["xz", "ngram"])
    generation: Generation = Generation()


class Recipe(Node):
    """What every task's recipe has; generic code takes this.

    `output` is the run's folder; all paths are relative to where you start. Each task's class
    narrows `data`, and may add what only it has: `objective`, `evaluation`.
    """

    reads_tokens: ClassVar[bool] = False  # whether a run's length can be told in tokens

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    output: PathText
    data: Any
    model: Model
    training: Training

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        tokenized = isinstance(self.data, TokenizedData)
        if tokenized and self.data.tokenizer is None and self.model.from_ is None:
            raise ValueError(
                "data.tokenizer: a model built from a config needs one; "
                "set data.tokenizer to {train: {vocab_size: 4096}} or {from: folder}"
            )
        if self.training.tokens is not None and not self.reads_tokens:
            raise ValueError(
                f"training.tokens: does not go with data.task {self.data.task}, whose rows are "
                "what is counted; give steps, epochs or minutes"
            )
        return self

    def dump(self) -> dict[str, Any]:
        """The tree as plain data, in the names that the YAML uses, defaults filled in."""
        return self.model_dump(mode="json", by_alias=True)

    def data_hash(self) -> str:
        """Identifies what `prepare` makes: equal hashes mean the prepared data can be reused."""
        tree = {"seed": self.seed, "data": self.dump()["data"]}
        if self.data.of_model():
            tree["tokenizer_from"] = self.model.from_
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def paths(self) -> dict[str, str]:
        """Dotted key -> file, folder, glob or hub name, of all that the recipe reads."""
        found = {f"data.sources.{i}.path": s.path for i, s in enumerate(self.data.sources)}
        if isinstance(self.data, TokenizedData) and self.data.tokenizer is not None:
            found["data.tokenizer.from"] = self.data.tokenizer.from_
        if isinstance(self.data, TextData | PairData):
            found["data.chat.template"] = self.data.chat.template
        found["model.from"] = self.model.from_
        return {key: path for key, path in found.items() if path is not None}


class TextRecipe(Recipe):
    """What the recipes of language models have."""

    reads_tokens = True
    data: TextData
    evaluation: Evaluation = Evaluation()


class LanguageModelingRecipe(TextRecipe):
    data: LanguageModelingData


class ChatRecipe(TextRecipe):
    data: ChatData


class TextClassificationRecipe(Recipe):
    data: LabelledData
    objective: TextClassificationObjective = TextClassificationObjective()


class ImageClassificationRecipe(Recipe):
    data: ImageData
    objective: ImageObjective = ImageObjective()

    def image_size(self) -> int | None:
        """The square's edge, as far as the recipe says it."""
        return self.data.image.size or (self.model.config or {}).get("image_size")

    @model_validator(mode="after")
    def _images_fit(self) -> ImageClassificationRecipe:
        size, own = self.data.image.size, (self.model.config or {}).get("image_size")
        if size is not None and own is not None and size != own:
            raise ValueError(
                f"model.config.image_size: found {own}, and {size} in data.image.size; leave one "
                "of them out"
            )
        mixed = self.objective.mixup or self.objective.cutmix
        if mixed and self.training.micro_batch % 2:
            raise ValueError(
                f"training.micro_batch: found {self.training.micro_batch}; mixup and cutmix mix "
                "neighbours, so it must be even"
            )
        return self


class PreferenceRecipe(Recipe):
    data: PairData
    objective: SerializeAsAny[Preference] = DPO()

    @model_validator(mode="after")
    def _something_to_compare_with(self) -> PreferenceRecipe:
        name = self.objective.name
        if self.model.from_ is None:
            raise ValueError(
                f"model.from: a preference is learned by a model that can answer already, and "
                f"{name} starts from one; set model.from instead of model.architecture"
            )
        return self


class TableRecipe(Recipe):
    data: TableData
    objective: TableObjective = TableObjective()


RECIPES: dict[str, type[Recipe]] = {
    "language_modeling": LanguageModelingRecipe,
    "chat": ChatRecipe,
    "text_classification": TextClassificationRecipe,
    "image_classification": ImageClassificationRecipe,
    "preference": PreferenceRecipe,
    "table": TableRecipe,
}
"""data.task -> the class of its recipes; the first one is meant where no task is given."""
