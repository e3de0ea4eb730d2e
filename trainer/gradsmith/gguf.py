"""Models in GGUF files, which llama.cpp's users share: read by transformers, unpacked once."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .console import quiet, say
from .errors import UserError


def find_gguf(name: str | Path) -> Path | None:
    """The GGUF file that a name stands for: itself, or the only one in a folder.

    Raises:
        UserError: there is no such file, or several are in the folder, or the package that reads
            them is missing.
    """
    path = Path(name)
    files = [path] if path.suffix == ".gguf" else []
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"model.from: {name} holds {len(files)} models ({names}); name one of them")
    if not files[0].is_file():
        raise UserError(f"model.from: {name}: no such file (from {Path.cwd()})")
    if find_spec("gguf") is None:
        raise UserError(
            f"model.from: {files[0]}: to read it takes a package that is not installed: "
            "pip install gguf"
        )
    return files[0]


def place(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for a folder, a hub name or a GGUF file."""
    file = find_gguf(name)
    if file is None:
        return {"pretrained_model_name_or_path": str(name), "revision": revision or "main"}
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def forget_quantization(model: Any) -> None:
    """Takes off what is left of a GGUF file's quantisation: a model with it cannot be saved."""
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)


def unpack(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as a folder of transformers, in float32: it loses nothing.

    peft and transformers find an adapter's base there, and loading it takes a second instead of
    the several that reading GGUF does.

    Raises:
        UserError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"unpacking {file.name} into {folder.parent / 'base'}")
    try:
        with quiet(Path(os.devnull)):
            tokenizer = AutoTokenizer.from_pretrained(**place(file), trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(
                **place(file), dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever a broken file or an unknown architecture leads to
        raise UserError(f"model.from: {file}: no model can be read there: {error}") from None
    forget_quantization(model)
    with quiet(Path(os.devnull)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
