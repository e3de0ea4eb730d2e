"""The recipe: one YAML file, one typed tree, dotted overrides.

`load_recipe` is the only way in. Whatever is wrong with a recipe is collected and reported at
once as a `UserError`: the dotted key, what was found, what is allowed, and the nearest name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from .errors import UserError, did_you_mean, one_line
from .files import check_apart, expand
from .reading import describe as _describe
from .reading import parse_yaml, read_text

PositiveInt = Annotated[int, Field(gt=0, le=10**12)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
SMALLEST_TEMPERATURE = 1e-3  # but for 0; logits divided by less are no numbers any more


def _printable(value: str) -> str:
    """What goes into commands, scripts and messages holds no line breaks and no NUL, and is a
    path that the system takes."""
    if not value.isprintable():
        raise ValueError(f"found {value!r}; control characters (a line break, NUL) are refused")
    parts = [len(part.encode(errors="replace")) for part in value.split("/")]
    if max(parts) > 255 or sum(parts) + len(parts) > 4000:
        raise ValueError(f"found {_describe(value)}; a path has 255 bytes in a part, 4,000 in all")
    return value


# A path or a hub name; `~` and `$NAME` mean the same in all of them.
PathText = Annotated[str, AfterValidator(_printable), AfterValidator(expand)]


class Node(BaseModel):
    """A branch of the recipe: unknown keys refused, no silent conversions ("8" is not 8)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# --------------------------------------------------------------------------------------- data


class Source(Node):
    """Where documents come from."""

    kind: Literal["text", "jsonl", "parquet", "python_stdlib", "hf_dataset"]
    path: PathText | None = Field(
        None, description="file, folder or glob; for hf_dataset a hub name or a local folder"
    )
    text: str = Field("text", description="the column or key that holds a document's text")
    prompt: str | None = Field(None, description="chat: the column or key of the question")
    response: str | None = Field(None, description="chat: the column or key of the answer")
    messages: str | None = Field(None, description="chat: the column or key of a message list")
    split: str = Field("train", description="hf_dataset: which of its splits to read")
    limit: PositiveInt | None = Field(None, description="read at most this many documents")

    @model_validator(mode="after")
    def _consistent(self) -> Source:
        if self.kind == "python_stdlib":
            if self.path is not None:
                raise ValueError("path does not go with kind python_stdlib; leave it out")
        elif self.path is None:
            raise ValueError(f"kind {self.kind} needs a path")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response go together: name both or neither")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("name either messages or prompt and response, not both")
        return self


class Split(Node):
    """Shares held out, by content hash: a document never changes sides when others are added."""

    validation: Fraction = 0.05
    test: Fraction = 0.05

    @model_validator(mode="after")
    def _some_left(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation + test is {self.validation + self.test:g}; it must stay below 1"
            )
        return self


class TokenizerTraining(Node):
    vocab_size: Annotated[int, Field(ge=261, le=1_000_000)] = 4096  # bytes + 5


class Tokenizer(Node):
    """Trained here as a byte-level BPE, or taken from a folder."""

    train: TokenizerTraining | None = None
    from_: PathText | None = Field(None, alias="from", description="a folder with tokenizer.json")

    @model_validator(mode="after")
    def _one(self) -> Tokenizer:
        if (self.train is None) == (self.from_ is None):
            raise ValueError("give exactly one of train and from")
        return self


class Clean(Node):
    exact_duplicates: bool = Field(True, description="drop documents whose text occurred before")
    min_characters: Annotated[int, Field(ge=0)] = 1


class Chat(Node):
    template: PathText | None = Field(
        None, description="a Jinja file; without it the tokenizer's own, else ChatML"
    )
    system: str | None = None
    over_length: Literal["drop", "truncate", "refuse"] = Field(
        "drop", description="what happens to an example longer than sequence_length"
    )


class Data(Node):
    task: Literal["language_modeling", "chat"] = "language_modeling"
    sources: Annotated[list[Source], Field(min_length=1)]
    split: Split = Split()
    clean: Clean = Clean()
    tokenizer: Tokenizer | None = Field(
        None, description="default: the tokenizer in the folder of model.from"
    )
    chat: Chat = Chat()
    sequence_length: Annotated[int, Field(ge=2)] = 512
    packing: bool = True


# -------------------------------------------------------------------------------------- model


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
                raise ValueError(f"{key}: found the key {_describe(name)}; keys are text")
            _check_plain(item, f"{key}.{name}")
        return
    whole = isinstance(value, int) and -(2**63) < value < 2**63
    number = whole or (isinstance(value, float) and not math.isnan(value))
    if not number and not isinstance(value, str | None):
        raise ValueError(f"{key}: found {_describe(value)}; allowed are text and numbers")


class Model(Node):
    architecture: str | None = Field(None, description="any transformers causal-LM model type")
    config: dict[str, Any] | None = Field(None, description="keys of that type's config class")
    from_: PathText | None = Field(
        None,
        alias="from",
        description="a run, a folder or hub name with safetensors weights, or a GGUF file",
    )
    adapter: Adapter | None = None
    kernels: bool = Field(True, description="gradsmith's kernels under the model, or stock")

    @model_validator(mode="after")
    def _one(self) -> Model:
        if (self.architecture is None) == (self.from_ is None):
            raise ValueError("give exactly one of architecture (with config) and from")
        if self.from_ is not None and self.config is not None:
            raise ValueError("config goes with architecture; a model taken from brings its own")
        if self.adapter is not None and self.from_ is None:
            raise ValueError("an adapter needs a trained base: set from instead of architecture")
        _check_plain(self.config, "config")
        return self


# ----------------------------------------------------------------------------------- training


# What each optimizer takes besides lr, weight_decay and l1, and the values that it starts from.
_ADAM: dict[str, Any] = {"betas": [0.9, 0.95], "eps": 1e-8}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-4, "weight_decay": 0.1, **_ADAM, "states": "fp32"},
    "adam": {"lr": 3e-4, "weight_decay": 0.0, **_ADAM, "states": "fp32"},
    "adamw8bit": {"lr": 3e-4, "weight_decay": 0.1, **_ADAM, "rounding": "stochastic"},
    "lion": {"lr": 1e-4, "weight_decay": 0.3, "betas": [0.9, 0.99], "states": "fp32"},
    "sgd": {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": False, "states": "fp32"},
    "adagrad": {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-10, "states": "fp32"},
    "lamb": {"lr": 2e-3, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-6},
    "schedule_free": {"lr": 1e-3, "weight_decay": 0.1, **_ADAM},
    "adafactor": {"lr": 1e-2, "weight_decay": 0.0},
    # betas and eps are those of what AdamW steps.
    "muon": {"lr": 3e-4, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, **_ADAM,
             "adamw_lr": None, "adjust_lr_fn": "match_rms_adamw", "states": "fp32"},
}  # fmt: skip
# What is of whole tensors, which ZeRO cuts up: optimizers that need stage 0.
OF_WHOLE_TENSORS = {"lamb": "trust ratios", "adafactor": "row and column means"}


class Optimizer(Node):
    """One of gradsmith_kernels.optim. Values that are left out are the optimizer's own."""

    name: Literal[
        "adamw",
        "adam",
        "adamw8bit",
        "lion",
        "sgd",
        "adagrad",
        "lamb",
        "schedule_free",
        "adafactor",
        "muon",
    ] = "adamw"
    lr: PositiveFloat = Field(3e-4, validate_default=True)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="proximal L1 penalty, multiplied by lr"
    )
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = None
    eps: Annotated[float, Field(ge=1e-30, allow_inf_nan=False)] | None = None
    momentum: Fraction | None = None
    nesterov: bool | None = None
    adamw_lr: PositiveFloat | None = Field(
        None, description="muon: peak rate of what AdamW steps; default lr"
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = Field(
        None, description="muon: how a matrix's rate follows its shape"
    )
    states: Literal["fp32", "bf16"] | None = Field(
        None, description="what the states are kept in; bf16 is rounded randomly"
    )
    rounding: Literal["stochastic", "nearest"] | None = Field(
        None, description="of adamw8bit's states"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        name = values.get("name", "adamw") if isinstance(values, dict) else None
        own = OPTIMIZERS.get(name) if isinstance(name, str) else None
        if own is None:
            return values  # the fields' own checks say what is wrong
        return own | {key: value for key, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _fitting(self) -> Optimizer:
        own = OPTIMIZERS[self.name]
        common = ("name", "lr", "weight_decay", "l1")
        for key in type(self).model_fields:
            if key not in own and key not in common and getattr(self, key) is not None:
                allowed = ", ".join(dict.fromkeys([*common, *own]))
                raise ValueError(f"{key} does not go with {self.name}; allowed are {allowed}")
        if self.name == "lamb" and self.l1:
            raise ValueError("l1 does not go with lamb, whose steps are scaled by whole tensors")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Schedule(Node):
    name: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Fraction = Field(0.02, description="share of the run over which the rate rises")
    final: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="last rate over peak")


class Zero(Node):
    stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"

    @model_validator(mode="after")
    def _possible(self) -> Zero:
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload: optimizer needs stage 1, 2 or 3; stage is 0")
        if self.offload == "all" and self.stage != 3:
            raise ValueError(f"offload: all needs stage 3; stage is {self.stage}")
        return self


class Validate(Node):
    every: PositiveInt = 50
    sequences: PositiveInt = Field(64, description="how many held-out sequences, at most")


class Checkpoint(Node):
    every: PositiveInt = 100
    keep: PositiveInt = 2


class Log(Node):
    every: PositiveInt = 1


LENGTHS = ("steps", "tokens", "epochs", "minutes")


class Training(Node):
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    minutes: PositiveFloat | None = None
    global_batch: PositiveInt = Field(16, description="sequences in an optimizer step")
    micro_batch: PositiveInt = Field(4, description="sequences in one forward pass on one rank")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip: PositiveFloat | None = Field(1.0, description="largest global gradient norm, or null")
    precision: Literal["auto", "bf16", "fp32", "fp16"] = Field(
        "auto", description="auto: bf16 where the device is fast in it, else fp32"
    )
    zero: Zero = Zero()
    activation_checkpointing: bool = False
    log: Log = Log()
    validate_: Validate = Field(Validate(), alias="validate")
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        lengths = {name: getattr(self, name) for name in LENGTHS if getattr(self, name) is not None}
        if len(lengths) != 1:
            raise ValueError(
                "give exactly one of steps, tokens, epochs and minutes; found "
                + (", ".join(f"{k}: {v}" for k, v in lengths.items()) or "none")
            )
        whole = OF_WHOLE_TENSORS.get(self.optimizer.name)
        if whole and self.zero.stage > 0:
            raise ValueError(
                f"optimizer {self.optimizer.name} needs zero.stage 0: its {whole} are of whole "
                f"tensors, and stage {self.zero.stage} steps flat stretches of many tensors"
            )
        if self.optimizer.name == "schedule_free":
            if self.schedule.name != "constant":
                raise ValueError(
                    "optimizer schedule_free averages the weights instead of lowering the rate: "
                    f"schedule.name must be constant; it is {self.schedule.name}"
                )
            if self.zero.stage == 3:
                raise ValueError(
                    "optimizer schedule_free needs zero.stage 0, 1 or 2: at stage 3 the weights "
                    "cannot be exchanged for their averages"
                )
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of micro_batch {self.micro_batch}"
            )
        return self

    def accumulation(self, world: int) -> int:
        """Micro-batches that each of `world` ranks runs for one optimizer step."""
        accumulation, left = divmod(self.global_batch, self.micro_batch * world)
        if left:
            raise UserError(
                f"training.global_batch: {self.global_batch} sequences do not divide over {world} "
                f"ranks with training.micro_batch {self.micro_batch}; allowed are multiples of "
                f"{self.micro_batch * world}"
            )
        return accumulation


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
    yardsticks: list[Literal["xz", "ngram"]] = ["xz", "ngram"]
    generation: Generation = Generation()


class Recipe(Node):
    """The whole tree. `output` is the run's folder; all paths are relative to where you start."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    output: PathText
    data: Data
    model: Model
    training: Training
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _tokenizer_known(self) -> Recipe:
        if self.data.tokenizer is None and self.model.from_ is None:
            raise ValueError(
                "data.tokenizer: a model built from a config needs one; "
                "set data.tokenizer to {train: {vocab_size: 4096}} or {from: folder}"
            )
        return self

    def dump(self) -> dict[str, Any]:
        """The tree as plain data, in the names that the YAML uses, defaults filled in."""
        return self.model_dump(mode="json", by_alias=True)

    def data_hash(self) -> str:
        """Identifies what `prepare` makes: equal hashes mean the prepared data can be reused."""
        tree = {"seed": self.seed, "data": self.dump()["data"]}
        if self.data.tokenizer is None:
            tree["tokenizer_from"] = self.model.from_
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------ reading


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
            f"found {_describe(tree)}"
        )
    _drop_lengths(tree, overrides)
    for override in overrides:
        _apply_override(tree, override)
    return parse_recipe(tree, where=str(path))


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Checks a tree of plain data; see `load_recipe`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise UserError("\n".join([f"{where}:", *(f"  {p}" for p in problems)])) from None


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
                f'override "{shown}": {".".join(parts[:depth])} is {_describe(node)}, '
                "so it has no keys under it"
            )
        if last:
            node[index] = parse_yaml(value, f'override "{shown}"')
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]


def _explain(problem: Any) -> str:
    """One pydantic problem as: dotted key, what was found, what is allowed, the nearest name."""
    loc = [part for part in problem["loc"] if part not in ("str", "list[str]")]
    key = ".".join(str(part) for part in loc) or "recipe"
    kind, context, found = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        names = sorted(_names_at(loc[:-1]))
        return f"{key}: unknown key; allowed are {', '.join(names)}.{did_you_mean(loc[-1], names)}"
    if kind == "missing":
        return f"{key}: missing, and it is required"
    if kind == "literal_error":
        options = [str(option) for option in _literal_options(loc)]
        near = (
            did_you_mean(found, options) if isinstance(found, str) and found not in options else ""
        )
        return f"{key}: found {_describe(found)}; allowed are {', '.join(options)}.{near}"
    if kind == "model_type":
        names = sorted(_names_at(loc))
        return f"{key}: found {_describe(found)}; expected a mapping with {', '.join(names)}"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    return f"{key}: found {_describe(found)}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


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


def _node_at(loc: Sequence[Any]) -> type[Node]:
    node: type[Node] = Recipe
    for part in loc:
        if isinstance(part, str):
            field = _field(node, part)
            node = next(_nodes_of(field.annotation), node) if field else node
    return node


def _names_at(loc: Sequence[Any]) -> set[str]:
    return {field.alias or name for name, field in _node_at(loc).model_fields.items()}


def _literal_options(loc: Sequence[Any]) -> list[Any]:
    names = [part for part in loc if isinstance(part, str)]
    field = _field(_node_at(names[:-1]), names[-1])

    def options(annotation: Any) -> list[Any]:
        arguments = get_args(annotation)
        if arguments and not any(isinstance(a, type) or get_args(a) for a in arguments):
            return list(arguments)
        return [option for argument in arguments for option in options(argument)]

    return options(field.annotation)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema(by_alias=True)
