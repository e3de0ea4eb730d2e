"""Models: built from a config, or read from a folder; adapters by peft; our kernels under them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError, one_line
from ..hub import hub_name
from ..reading import read_json, reading
from ..recipe import Recipe
from ..run import Run
from ..shapes import AdapterConfig, GenerationConfig, ModelConfig, WeightsIndex
from ..training.checkpoint import newest_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.shards import PreparedData

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def resolve_base(name: str | Path) -> str:
    """The model folder that a name stands for.

    Args:
        name: a run's folder (its newest checkpoint counts), a checkpoint's folder, a folder that
            transformers or peft wrote, or a hub name, which is returned as it is.

    Raises:
        UserError: a run without a checkpoint.
    """
    folder = Path(name)
    if (folder / "recipe.yaml").is_file():
        checkpoint = newest_checkpoint(Run(folder).checkpoints)
        if checkpoint is None:
            raise UserError(f"{name}: this run has no checkpoint yet; train it first")
        folder = checkpoint
    if (folder / "model").is_dir() and (folder / "state.json").is_file():
        folder = folder / "model"
    return str(folder) if folder.is_dir() else str(name)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def adapter_base(folder: str | Path) -> str:
    """What an adapter was trained on: a folder or a hub name.

    Raises:
        UserError: its config is damaged, or its weights are no safetensors.
    """
    config = read_json(Path(folder) / "adapter_config.json", AdapterConfig)
    check_weights(Path(folder), "adapter_model")
    return str(config["base_model_name_or_path"])


def check_weights(folder: Path, stem: str = "") -> None:
    """
    Raises:
        UserError: there are no weights in safetensors there, whose headers can be read.
    """
    from safetensors import safe_open

    if not any(folder.glob(f"{stem}*.safetensors")):
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
        if pickled:
            raise UserError(
                f"{folder}: its weights ({', '.join(pickled)}) are pickle files, "
                "which can run code when they are read; only safetensors are taken. Convert them "
                "where you trust them: AutoModelForCausalLM.from_pretrained(...)"
                ".save_pretrained(folder)"
            )
        raise UserError(f"{folder}: no weights ({stem}*.safetensors) there")
    for path in folder.glob("*.safetensors.index.json"):
        for name in read_json(path, WeightsIndex)["weight_map"].values():
            if Path(name).name != name:
                raise UserError(f"{path}: names a file outside of the folder: {one_line(name)}")
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        with reading(str(path), "not readable as safetensors"), safe_open(path, "pt") as file:
            file.keys()


def check_whole_model(folder: str, key: str) -> None:
    """
    Raises:
        UserError: a folder holds an adapter, or no weights in safetensors, or damaged ones.
    """
    if is_adapter(folder):
        raise UserError(
            f"{key}: {folder} holds an adapter, not a whole model; make one of it first: "
            "gradsmith export RUN FOLDER --form merged"
        )
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{key}: {folder}: no config.json there, so it is no model's folder")
    check_weights(Path(folder))


def load_config(place: str, key: str) -> Any:
    """A model's config, for transformers' own attention and experts and no code from elsewhere.

    Args:
        place: a model's folder or a hub name.
        key: the recipe's key or what the user called it, for the message.

    Raises:
        UserError: there is none, it is damaged, or its weights are quantized.
    """
    from transformers import AutoConfig

    local = Path(place).is_dir()
    if local:
        read_json(Path(place) / "config.json", ModelConfig)
        if (Path(place) / "generation_config.json").is_file():
            read_json(Path(place) / "generation_config.json", GenerationConfig)
    what = "no model there" if local else "not readable from the hub"
    with reading(f"{key}: {place}", what):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method", "an unknown method")
            raise UserError(
                f"{key}: {place}: its weights are quantized ({one_line(method, 40)}); allowed are "
                "models whose weights are in float32, bfloat16 or float16"
            )
        if getattr(config, "transformers_weights", None):
            raise UserError(f"{key}: {place}: config.json names its weights' file itself")
        # A name OWNER/KERNEL there would be fetched from the hub and run.
        config._attn_implementation = config._experts_implementation = None
    return config


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
    tokenizer = data.tokenizer()
    torch.manual_seed(recipe.seed)
    adapter = recipe.model.adapter
    if adapter is not None:
        base = _load(resolve_base(str(recipe.model.from_)), dtype)
        _check_vocabulary(base, recipe, tokenizer)
        model = _attach_adapter(base, recipe, weights)
    elif weights is not None or recipe.model.from_ is not None:
        model = _load(str(weights or resolve_base(str(recipe.model.from_))), dtype)
        _check_vocabulary(model, recipe, tokenizer)
    else:
        model = _from_config(recipe, tokenizer, dtype)
    if recipe.training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_for_inference(
    path: str | Path, *, kernels: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to evaluate or to generate with, and its tokenizer.

    Args:
        path: anything that `resolve_base` takes; an adapter is put on its base.
        kernels: whether our kernels go under it.

    Raises:
        UserError: there is no model.
    """
    from transformers import AutoTokenizer

    folder = resolve_base(path)
    if is_adapter(folder):
        from peft import PeftModel

        base = _load(resolve_base(adapter_base(folder)), None, f"{folder}: its base")
        with reading(folder, "no adapter can be read there"):
            model: Any = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    else:
        model = _load(folder, None, str(path))
    with reading(folder, "no tokenizer can be read there"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    from ..training.engine import device

    model = model.to(device()).eval()
    if kernels:
        from gradsmith_kernels import accelerate

        accelerate(model)
    return model, tokenizer


def _load(folder: str, dtype: torch.dtype | None, key: str = "model.from") -> PreTrainedModel:
    """A model from a folder or the hub: safetensors only, no code from there."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if Path(folder).is_dir():
        check_whole_model(folder, key)
    else:
        hub_name(folder, key, "a model")
    config = load_config(folder, key)
    with reading(f"{key}: {folder}", "no model can be read there"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
        )
    return model


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
