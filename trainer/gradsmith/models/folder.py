"""What a model's folder, which anybody may have written, is checked for before it is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import gguf
from ..errors import UserError, one_line
from ..reading import read_json, reading
from ..shapes import GenerationConfig, ModelConfig, WeightsIndex

if TYPE_CHECKING:
    from .base import Model


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


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


def load_config(model: Model, key: str) -> Any:
    """A model's config, for transformers' own attention and experts and no code from elsewhere.

    Args:
        model: where it is, in a folder or on the hub.
        key: the recipe's key or what the user called it, for the message.

    Raises:
        UserError: there is none, it is damaged, or its weights are quantized.
    """
    from transformers import AutoConfig

    from . import tabular  # noqa: F401  it makes our own model types known to AutoConfig

    place = model.place
    local = Path(place).exists()
    if local and gguf.find_gguf(place) is None:
        read_json(Path(place) / "config.json", ModelConfig)
        if (Path(place) / "generation_config.json").is_file():
            read_json(Path(place) / "generation_config.json", GenerationConfig)
    what = "no model there" if local else "not readable from the hub"
    with reading(f"{key}: {place}", what):
        config = AutoConfig.from_pretrained(
            **gguf.place(place, model.revision), trust_remote_code=False
        )
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
