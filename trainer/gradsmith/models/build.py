"""Models: built from a config, or read from a folder; adapters by peft; our kernels under them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..hub import hub_name
from ..reading import reading
from ..recipe import Recipe
from ..run import Run
from .base import Model, adapter_base, base_of, open_model
from .folder import check_weights, check_whole_model, is_adapter, load_config
from .gguf import find_gguf, forget_quantization, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.shards import PreparedData

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def build_model(
    recipe: Recipe, data: PreparedData, checkpoint: Path | None = None
) -> torch.nn.Module:
    """The model that a recipe trains, on the CPU, in the dtype of `training.precision`.

    Args:
        recipe: what to build.
        data: gives the vocabulary and the ids of the special tokens.
        checkpoint: the folder whose weights to go on from, when a run resumes.

    Raises:
        UserError: the base, the adapter's target or the vocabulary do not fit.
    """
    dtype = DTYPES[recipe.training.precision]
    weights = checkpoint / "model" if checkpoint else None
    tokenizer, run = data.tokenizer(), Run(recipe.output)
    torch.manual_seed(recipe.seed)
    adapter = recipe.model.adapter
    if adapter is not None:
        base = _load(base_of(run, recipe), dtype)
        _check_vocabulary(base, recipe, tokenizer)
        model = _attach_adapter(base, recipe, weights)
    elif weights is not None or recipe.model.from_ is not None:
        model = _load(Model(str(weights)) if weights else base_of(run, recipe), dtype)
        _check_vocabulary(model, recipe, tokenizer)
    else:
        model = _from_config(recipe, tokenizer, dtype)
    if recipe.training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_for_inference(
    path: str | Path | Model, *, kernels: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to evaluate or to generate with, and its tokenizer.

    Args:
        path: anything that `open_model` takes, or what it found; an adapter is put on its base.
        kernels: whether our kernels go under it.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    from transformers import AutoTokenizer

    with contextlib.ExitStack() as stack:
        found = path if isinstance(path, Model) else stack.enter_context(open_model(path))
        folder, revision = found.place, found.revision
        if is_adapter(folder):
            from peft import PeftModel

            base = _load(adapter_base(Path(folder)), None, f"{folder}: its base")
            with reading(folder, "no adapter can be read there"):
                model: Any = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
        else:
            model = _load(found, None, str(found.place))
        with reading(folder, "no tokenizer can be read there"):
            tokenizer = AutoTokenizer.from_pretrained(
                **place(folder, revision), trust_remote_code=False
            )
    from ..training.engine import device

    model = model.to(device()).eval()
    if kernels:
        from gradsmith_kernels import accelerate

        accelerate(model)
    return model, tokenizer


def _load(model: Model, dtype: torch.dtype | None, key: str = "model.from") -> PreTrainedModel:
    """A model from a folder, the hub or a GGUF file: no pickled weights, no code from there."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = model.place
    if find_gguf(folder) is None:
        if Path(folder).is_dir():
            check_whole_model(folder, key)
        else:
            hub_name(folder, key, "a model")
    config = load_config(model, key)
    with reading(f"{key}: {folder}", "no model can be read there"):
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            **place(folder, model.revision),
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
        )
    forget_quantization(loaded)
    return loaded


def _from_config(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from ..checks import config_of

    config = config_of(recipe, len(tokenizer))
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Not `model.to(dtype)`: that rounds the buffers too, and rotary frequencies must stay float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _attach_adapter(base: PreTrainedModel, recipe: Recipe, weights: Path | None) -> Any:
    import peft

    if weights is not None:
        check_weights(weights, "adapter_model")
        with reading(str(weights), "no adapter can be read there"):
            return peft.PeftModel.from_pretrained(
                base, str(weights), is_trainable=True, autocast_adapter_dtype=False
            )
    adapter = recipe.model.adapter
    assert adapter is not None
    # peft writes this name into the adapter's folder, where it must hold from any directory
    folder = Path(str(base.name_or_path))
    if folder.is_dir():
        base.config._name_or_path = base.name_or_path = str(folder.resolve())
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=adapter.dropout,
        target_modules=adapter.target,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"model.adapter.target: {error}") from None


def _check_vocabulary(
    model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"data.tokenizer: has {len(tokenizer)} tokens, but the model at {recipe.model.from_} "
            f"has embeddings for {rows}; leave data.tokenizer out to take the model's own"
        )
