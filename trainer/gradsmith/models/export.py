"""Folders for other programs: a Hugging Face model, a peft adapter, one merged into its base.

Nothing is called done before it was read back by transformers or peft, without our kernels, and
its outputs compared with those of the run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.processor import Batch
from ..errors import RunError, UserError
from ..files import OurFolders, making, write_json
from ..reading import read_json
from ..run import Run
from ..shapes import AdapterConfig
from ..tasks.task import Task
from .base import Model, adapter_base, open_model
from .build import load_model, open_task
from .config import auto_class
from .folder import is_adapter

Form = Literal["model", "adapter", "merged"]

# Largest relative difference of the outputs, ‖out - ours‖ / ‖ours‖, both computed in float32 from
# the stored weights. A copy must give the same bits; merging rounds every weight once more.
MERGED_BOUND = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}


def export(run: Run, out: str | Path, form: Form | None = None) -> tuple[Path, float]:
    """Writes the newest checkpoint of a run as a folder for transformers or peft.

    Args:
        run: a trained run.
        out: the folder to make; it must not be there, or be empty.
        form: `model` for a run that trained all weights; `adapter` or `merged` for one that
            trained an adapter. Default: `model` or `adapter`, as the run is.

    Returns:
        The folder, and the relative difference of its outputs from the run's.

    Raises:
        UserError: the form does not fit the run, or `out` is taken.
        RunError: what was written does not give the run's outputs; `out` is not made.
    """
    out = Path(out)
    around = OurFolders().around(out.resolve())
    if around is not None:
        raise UserError(f"{out}: lies in {around}, which is gradsmith's own; name another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; name a new or an empty folder")
    with open_model(run.folder) as model:
        return out, _export(open_task(run.recipe(), model), model, out, form)


def _export(task: Task, model: Model, out: Path, form: Form | None) -> float:
    source = Path(model.place)
    forms = ("adapter", "merged") if is_adapter(source) else ("model",)
    form = form or forms[0]  # type: ignore[assignment]
    if form not in forms:
        raise UserError(
            f"form: found {form}; this run allows {' and '.join(forms)}, since it trained "
            + ("an adapter" if is_adapter(source) else "all weights")
        )
    ours = load_model(model, task, kernels=False)
    with making(out) as scratch:
        bound = 0.0
        if form == "merged":
            _merge(task, model, scratch)
            bound = MERGED_BOUND[ours.dtype]
        else:
            shutil.copytree(source, scratch, dirs_exist_ok=True)
            if form == "adapter":
                _name_base(source, scratch)
        difference = _compare(task, ours, _reload(task, scratch))
        if not difference <= bound:  # a NaN must not pass
            raise RunError(
                f"{out}: not written: read back, its logits differ from the run's by "
                f"{difference:.2e} relative to their norm; allowed are {bound:.0e}"
            )
    return difference


def _name_base(source: Path, folder: Path) -> None:
    """Writes into an adapter's folder where its base is now: the run may have been moved."""
    base = adapter_base(source)
    place = Path(base.place)
    path = folder / "adapter_config.json"
    config = read_json(path)
    config["base_model_name_or_path"] = str(place.resolve() if place.is_dir() else place)
    config["revision"] = base.revision
    write_json(path, config)


def _merge(task: Task, source: Model, folder: Path) -> None:
    """Base + adapter, added in float32 and rounded once."""
    model: Any = load_model(source, task, kernels=False).cpu()
    dtype = model.dtype
    merged = model.float().merge_and_unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    merged.config.dtype = dtype
    merged.save_pretrained(folder)
    task.processor.save_pretrained(folder)


def _reload(task: Task, folder: Path) -> torch.nn.Module:
    """What somebody without gradsmith gets."""
    auto = auto_class(task)
    if is_adapter(folder):
        from peft import PeftModel

        config = read_json(folder / "adapter_config.json", AdapterConfig)
        base, revision = config["base_model_name_or_path"], config["revision"] or "main"
        model = auto.from_pretrained(
            base,
            revision=revision,
            dtype="auto",
            **task.head(),
            ignore_mismatched_sizes=True,  # of the head, which the adapter's folder has
        )
        return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    loaded: torch.nn.Module = auto.from_pretrained(folder, dtype="auto")
    return loaded


@torch.no_grad()
def _compare(task: Task, ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """‖theirs - ours‖ / ‖ours‖ over the outputs of one batch, in float32."""
    device = next(ours.parameters()).device
    inputs = task.processor.dummy_inputs(2, torch.Generator().manual_seed(0))
    batch = Batch(inputs, {}).to(device, torch.float32)
    expected = task.outputs(ours.float().eval(), batch)
    found = task.outputs(theirs.float().eval().to(device), batch)
    return float((found - expected).norm() / expected.norm())
