"""Models: built from a config, or read from a folder; adapters by peft; our kernels under them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.processor import processor_class
from ..errors import UserError
from ..gguf import find_gguf, forget_quantization, place
from ..hub import hub_name
from ..ranks import device
from ..reading import reading
from ..recipe import Recipe
from ..run import Run
from ..tasks import make_task
from ..tasks.task import Task
from .base import Model, adapter_base, base_of, open_model
from .config import auto_class, config_of, freeze_base, lora_config
from .folder import check_weights, check_whole_model, is_adapter, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def build_model(recipe: Recipe, task: Task, checkpoint: Path | None = None) -> torch.nn.Module:
    """The model that a recipe trains, on the CPU, in the dtype of `training.precision`.

    Args:
        recipe: what to build.
        task: knows transformers' class for it, and what the data decides of its config.
        checkpoint: the folder whose weights to go on from, when a run resumes.

    Raises:
        UserError: the base or the adapter's target do not fit the recipe or the data.
    """
    dtype = DTYPES[recipe.training.precision]
    weights = checkpoint / "model" if checkpoint else None
    run = Run(recipe.output)
    torch.manual_seed(recipe.seed)
    adapter = recipe.model.adapter
    if adapter is not None:
        base = _load(base_of(run, recipe), task, dtype)
        task.check_model(base)
        model = _attach_adapter(base, recipe, task, weights)
    elif weights is not None or recipe.model.from_ is not None:
        model = _load(Model(str(weights)) if weights else base_of(run, recipe), task, dtype)
        task.check_model(model)
        if recipe.model.train == "head":
            freeze_base(model)
    else:
        model = _from_config(recipe, task, dtype)
    if recipe.training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_for_inference(
    path: str | Path | Model, *, kernels: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model to evaluate or to generate with, and its tokenizer.

    Args:
        path: anything that `open_model` takes, or what it found; an adapter is put on its base.
        kernels: whether our kernels go under it.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    from transformers import AutoTokenizer

    from ..tasks.language_modeling import LanguageModeling

    with contextlib.ExitStack() as stack:
        found = path if isinstance(path, Model) else stack.enter_context(open_model(path))
        model = load_model(found, LanguageModeling, kernels=kernels)
        with reading(found.place, "no tokenizer can be read there"):
            tokenizer = AutoTokenizer.from_pretrained(
                **place(found.place, found.revision), trust_remote_code=False
            )
    return model, tokenizer


def load_model(found: Model, task: Task | type[Task], *, kernels: bool = True) -> PreTrainedModel:
    """A task's model to evaluate or to serve, on this rank's device; an adapter is put on its base.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    folder = found.place
    if is_adapter(folder):
        from peft import PeftModel

        base = _load(adapter_base(Path(folder)), task, None, f"{folder}: its base")
        with reading(folder, "no adapter can be read there"):
            model: Any = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    else:
        model = _load(found, task, None, folder)
    model = model.to(device()).eval()
    if kernels:
        from gradsmith_kernels import accelerate

        accelerate(model)
    loaded: PreTrainedModel = model
    return loaded


def open_task(recipe: Recipe, found: Model) -> Task:
    """The task of a run's model, with the processor that stands beside its weights."""
    name = recipe.data.task
    processor = processor_class(name).from_pretrained(Path(found.place), recipe)
    return make_task(recipe, processor)


def _load(
    model: Model, task: Task | type[Task], dtype: torch.dtype | None, key: str = "model.from"
) -> PreTrainedModel:
    """A model from a folder, the hub or a GGUF file: no pickled weights, no code from there."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = model.place
    if find_gguf(folder) is None:
        if Path(folder).is_dir():
            check_whole_model(folder, key)
        else:
            hub_name(folder, key, "a model")
    config = load_config(model, key)
    head = task.head() if isinstance(task, Task) else {}
    for name, value in head.items():
        setattr(config, name, value)
    with reading(f"{key}: {folder}", "no model can be read there"):
        loaded: PreTrainedModel
        loaded, info = auto_class(task).from_pretrained(
            **place(folder, model.revision),
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=bool(head),
            output_loading_info=True,
        )
    for name, found, wanted in info["mismatched_keys"]:  # a head for other classes is made new
        if name.startswith(f"{loaded.base_model_prefix}."):
            raise UserError(
                f"{key}: {folder}: {name} is {tuple(found)}, where its config.json says "
                f"{tuple(wanted)}"
            )
    forget_quantization(loaded)
    return loaded


def _from_config(recipe: Recipe, task: Task, dtype: torch.dtype) -> PreTrainedModel:
    config = config_of(recipe, task.config())
    model: PreTrainedModel = auto_class(task).from_config(config, dtype=torch.float32)
    # Not `model.to(dtype)`: that rounds the buffers too, and rotary frequencies must stay float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _attach_adapter(base: PreTrainedModel, recipe: Recipe, task: Task, weights: Path | None) -> Any:
    import peft

    if weights is not None:
        check_weights(weights, "adapter_model")
        with reading(str(weights), "no adapter can be read there"):
            return peft.PeftModel.from_pretrained(
                base, str(weights), is_trainable=True, autocast_adapter_dtype=False
            )
    # peft writes this name into the adapter's folder, where it must hold from any directory
    folder = Path(str(base.name_or_path))
    if folder.is_dir():
        base.config._name_or_path = base.name_or_path = str(folder.resolve())
    try:
        config = lora_config(recipe, task)
        return peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"model.adapter.target: {error}") from None
