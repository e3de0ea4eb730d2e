"""Which model a name stands for, and what a run's base was when it began.

A run that starts from other weights keeps them: `pin` links (or copies) the files of `model.from`
into `<run>/base/` with their hashes. So the base may be trained on, moved or deleted; the run
goes on, and is evaluated and exported, with what it started from.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import checkpoints
from ..console import say
from ..data.processor import PROCESSOR_FILES
from ..errors import UserError
from ..files import building, file_entry, files_in, fingerprint_of, is_run, write_json
from ..gguf import find_gguf, unpack
from ..reading import read_json
from ..recipe import Recipe
from ..run import Run
from ..shapes import AdapterConfig, State
from .folder import check_weights

FORMAT = "gradsmith-base-1"
KEPT = {".safetensors", ".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class Model:
    """Where a model is."""

    place: str  # a folder, or a name on the hub
    revision: str | None = None  # on the hub
    step: int | None = None  # of the run that it is from
    checkpoint: Path | None = None


@contextlib.contextmanager
def open_model(name: str | Path, *, tell: bool = True) -> Iterator[Model]:
    """The model that a name stands for, its every byte verified; not deleted within the block.

    Args:
        name: a run's folder (its newest whole checkpoint counts), a checkpoint's folder, a folder
            that transformers or peft wrote, or a GGUF file or hub name, taken as it is.
        tell: say which checkpoint of a run it is, and which newer ones are damaged.

    Raises:
        UserError: a run without a whole checkpoint, or a damaged checkpoint.
    """
    while True:
        found = find_model(name, tell=tell)
        if found.checkpoint is None:
            yield found
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(checkpoints.reading(found.checkpoint))
            except FileNotFoundError:
                continue  # deleted a moment ago: there is a newer one
            yield found
            return


def find_model(name: str | Path, *, hashes: bool = True, tell: bool = False) -> Model:
    """`open_model` for whoever only looks; without `hashes` it reads no weights."""
    folder = Path(name)
    if not folder.is_dir():
        return Model(str(name))
    if is_run(folder) or (folder / "recipe.yaml").is_file():
        checkpoint = _newest(Run(folder), hashes, tell)
    elif (folder / "model").is_dir() and (folder / "state.json").is_file():
        checkpoint = folder
    elif folder.resolve().name == "model" and (folder.resolve().parent / "state.json").is_file():
        checkpoint = folder.resolve().parent
    else:
        if (folder / "manifest.json").is_file() and is_base(folder):
            check_base(folder)
        return Model(str(folder))
    if problem := checkpoints.damage(checkpoint, hashes=hashes):
        raise UserError(f"{checkpoint}: {problem}")
    state, model = read_json(checkpoint / "state.json"), checkpoint / "model"
    for name, files in PROCESSOR_FILES.items():  # the first versions did not name it
        if state.get(name) not in (None, fingerprint_of(files_in(model, files))):
            raise UserError(f"{model}: its {name} is not the one that it was trained with")
    return Model(str(model), step=int(state["step"]), checkpoint=checkpoint)


def _newest(run: Run, hashes: bool, tell: bool) -> Path:
    """A run's best checkpoint where it has looked for one, else its newest."""
    if not run.steps():
        raise UserError(f"{run.folder}: this run has no checkpoint yet; train it first")
    complaints: list[str] = []
    if not hashes:
        whole = (p for _, p in run.steps() if not checkpoints.damage(p, hashes=False))
        newest = next(whole, run.steps()[0][1])
    else:
        found, complaints = checkpoints.newest(run)
        if found is None:
            raise UserError(f"{run.folder}: every checkpoint is damaged: {'; '.join(complaints)}")
        newest = found
    best = _best(run, newest)
    if best is not None and (problem := checkpoints.damage(best, hashes=hashes)):
        complaints.append(f"{best}, the best: {problem}")
        best = None
    if tell:
        for complaint in complaints:
            say(f"not used: {complaint}")
        say(f"{run.folder}: {(best or newest).name}{', the best' if best else ''}")
    return best or newest


def _best(run: Run, newest: Path) -> Path | None:
    """The checkpoint that a run's newest one says is the best, where the run looks for it."""
    with contextlib.suppress(UserError, OSError):
        best = read_json(newest / "state.json", State).get("best")
        if best is not None and best["step"]:
            return run.checkpoints / f"step-{best['step']:06}"
    return None


# ---------------------------------------------------------------------------------- a run's base


def is_base(folder: Path) -> bool:
    """Whether a folder is what `pin` made."""
    with contextlib.suppress(UserError, OSError):
        manifest = read_json(folder / "manifest.json")
        return isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return False


def base_of(run: Run, recipe: Recipe) -> Model:
    """What a run that fine-tunes starts from: what it has pinned, else what `model.from` is now."""
    if is_base(run.base):
        pinned = read_json(run.base / "manifest.json")
        if pinned["from"] == recipe.model.from_:
            place = str(run.base) if pinned["files"] else pinned["from"]
            return Model(place, pinned["revision"], pinned["step"])
    return find_model(str(recipe.model.from_), hashes=False)


def pin(run: Run, recipe: Recipe) -> None:
    """Keeps what `model.from` is now in the run's folder, unless the run has its base already.

    Rank 0 does it under the run's lock, before a rank builds the model.

    Raises:
        UserError: the base is not what it was when the run began, or is gone.
    """
    name = recipe.model.from_
    if name is None:
        return
    if is_base(run.base) and read_json(run.base / "manifest.json")["from"] == name:
        check_base(run.base)
        return
    if run.steps():  # of a version that kept no base
        name = _older_base(run)
        if name is None:
            return
    with open_model(name) as model:
        entry = {"format": FORMAT, "from": recipe.model.from_, "step": model.step}
        folder = Path(model.place)
        try:
            with building(run.base, "base") as scratch:
                if file := find_gguf(folder):
                    unpack(file, scratch)
                elif folder.is_dir():
                    for path in sorted(folder.iterdir()):
                        if path.suffix in KEPT and path.is_file() and path.name != "manifest.json":
                            _link(path.resolve(), scratch / path.name)
                files = {
                    p.name: file_entry(p) for p in sorted(scratch.iterdir()) if p.suffix in KEPT
                }
                revision = None if files else _commit(name)
                write_json(
                    scratch / "manifest.json", {**entry, "revision": revision, "files": files}
                )
        except OSError as error:
            raise UserError(f"{run.base}: cannot keep {name}: {error.strerror}") from None


def _link(source: Path, target: Path) -> None:
    """A second name for a file, which lives on when the first goes; else a copy."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one that has no links
        shutil.copyfile(source, target)


def _commit(name: str) -> str | None:
    """The commit that a hub name stands for now."""
    from transformers import AutoConfig

    commit = getattr(AutoConfig.from_pretrained(name), "_commit_hash", None)
    return None if commit is None else str(commit)


def _older_base(run: Run) -> str | None:
    """What an adapter of a run without a pinned base was trained on; None without an adapter."""
    newest, _ = checkpoints.newest(run)
    if newest is None or not (newest / "model" / "adapter_config.json").is_file():
        return None
    return adapter_base(newest / "model").place


def adapter_base(folder: Path) -> Model:
    """The model that an adapter's folder goes on.

    Raises:
        UserError: it is gone, or not what it was.
    """
    run = Run(folder.resolve().parents[2])  # runs/NAME/checkpoints/step-000100/model
    if is_run(run.folder) and is_base(run.base):
        pinned = read_json(run.base / "manifest.json")
        if not pinned["files"]:
            return Model(pinned["from"], pinned["revision"])
        check_base(run.base)
        return Model(str(run.base), step=pinned["step"])
    config = read_json(folder / "adapter_config.json", AdapterConfig)
    check_weights(folder, "adapter_model")
    name = config["base_model_name_or_path"]
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(f"{folder}: the model that this adapter was trained on is gone: {name}")
    return Model(find_model(name).place, config.get("revision"))


def check_base(folder: Path) -> None:
    """
    Raises:
        UserError: a pinned base is not what the run began with.
    """
    manifest = read_json(folder / "manifest.json")
    for name, entry in manifest["files"].items():
        if problem := checkpoints.file_damage(folder / name, entry):
            raise UserError(
                f"{folder}: {name} {problem}: this is not the base that the run began with "
                f"(model.from: {manifest['from']}). Put it back, or start over with --fresh"
            )
