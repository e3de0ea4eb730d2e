"""Models in GGUF files, which llama.cpp's users share: read by transformers, unpacked once."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..console import quiet, say
from ..errors import UserError
from ..run import read_json, write_json

SOURCE = "gguf.json"  # in the folder that a file was unpacked into: which one it was


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


def place(name: str | Path) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for a folder, a hub name or a GGUF file."""
    file = find_gguf(name)
    if file is None:
        return {"pretrained_model_name_or_path": str(name)}
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def unpack(file: Path, folder: Path) -> Path:
    """The model of a GGUF file as a folder of transformers, in float32, which loses nothing.

    peft and transformers find an adapter's base there, and loading it takes a second instead of
    the several that reading GGUF does. A folder that was made of this file is left as it is.

    Raises:
        UserError: transformers cannot read the file.
    """
    stat = file.stat()
    source = {"file": str(file.resolve()), "size": stat.st_size, "modified": stat.st_mtime_ns}
    if (folder / SOURCE).is_file() and read_json(folder / SOURCE) == source:
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"unpacking {file.name} into {folder}")
    try:
        with quiet(Path(os.devnull)):
            tokenizer = AutoTokenizer.from_pretrained(**place(file), trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(
                **place(file), dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever a broken file or an unknown architecture leads to
        raise UserError(f"model.from: {file}: no model can be read there: {error}") from None
    # What is left of the quantisation, and would keep transformers from saving the weights.
    del model.hf_quantizer, model.config.quantization_config
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    with quiet(Path(os.devnull)):
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    write_json(scratch / SOURCE, source)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder
