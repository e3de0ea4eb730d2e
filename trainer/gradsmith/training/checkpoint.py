"""Checkpoints: whole or not there, verified before they are used, the same for any ZeRO stage.

```
step-000100/
  model/                              what transformers or peft would write, with the tokenizer
  optimizer-00000-of-00002.safetensors  rank 0's pieces: float32 weights and optimizer states
  optimizer-00000-of-00002.json         which piece of which parameter is where, and the hash
  state.json                          step, tokens, seconds, the optimizer's step count
  manifest.json                       size and SHA-256 of every file above
```

A checkpoint is written to `step-000100.tmp/`, every file flushed to disk, the manifest last, and
then rank 0 alone renames it: a folder without `.tmp` is whole. Optimizer states are kept as pieces
of named parameters, so a run may go on under another ZeRO stage or on another number of ranks.
Sample order and dropout are functions of the seed and the step (gradsmith.data.loader,
gradsmith.training.loop), so there is no loader or random state to keep.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..errors import RunError, one_line, system_error
from ..reading import read_json
from ..run import write_json
from .engine import device

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FORMAT = 1
STATE_BLOCK = (
    256  # elements of an 8-bit state that share a scale; as gradsmith_kernels.optim has it
)
EIGHT_BIT = {"absmax1": ("state1", True), "absmax2": ("state2", False)}  # scales: codes, signed
STEP = "step"  # the state that is one number for all parameters
MASTER = "float32"  # the float32 weights' key beside the optimizer's own: exp_avg, exp_avg_sq


# ------------------------------------------------------------------------- what a rank holds


@dataclass(frozen=True)
class Piece:
    """A stretch of a parameter whose float32 weights and states this rank holds.

    `owner` is the tensor that the optimizer steps (DeepSpeed flattens parameters into a few);
    the stretch is `owner[offset : offset + length]`, and `name[start : start + length]`.
    """

    name: str
    start: int
    length: int
    owner: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This stretch of the owner, or of a state of the owner's shape."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]

    def blocks(self, scales: torch.Tensor) -> torch.Tensor:
        """The scales of the blocks of an 8-bit state that this stretch lies in."""
        return scales[self.offset // STATE_BLOCK : -(-(self.offset + self.length) // STATE_BLOCK)]


def pieces(engine: DeepSpeedEngine) -> Iterator[Piece]:
    """The pieces of this rank, under any ZeRO stage (DeepSpeed 0.19)."""
    wrapper = engine.optimizer
    stage = engine.zero_optimization_stage()
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 0:
        groups = getattr(wrapper, "fp16_groups", None)
        if groups is None:  # float32: the parameters themselves are stepped
            owners = {id(p): p for _, p in named}
        else:
            pairs = zip(groups, wrapper.fp32_groups, strict=True)
            owners = {id(a): b for g16, g32 in pairs for a, b in zip(g16, g32, strict=True)}
        for name, parameter in named:
            yield Piece(name, 0, parameter.numel(), owners[id(parameter)], 0)
    elif stage in (1, 2):
        flats = flat_partitions(engine)
        for name, parameter in named:
            mapping = parameter._hp_mapping
            if mapping is not None:
                yield Piece(
                    name,
                    mapping.lp_fragment_address.start,
                    mapping.lp_fragment_address.numel,
                    flats[mapping.param_group_index],
                    mapping.hp_fragment_address.start,
                )
    else:
        flats = flat_partitions(engine)
        for name, parameter in named:
            group, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = size * dist.get_rank()
            length = min(size, parameter.ds_numel - start)
            if length > 0:
                yield Piece(name, start, length, flats[group], offset)


def flat_partitions(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The flat float32 tensors that this rank's optimizer steps, under ZeRO 1 to 3."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return wrapper.fp32_partitioned_groups_flat
    flats = getattr(wrapper, "single_partition_of_fp32_groups", None)
    if flats is None:  # bf16 weights with float32 gradients at stage 1
        flats = wrapper.fp32_groups_flat_partition
    return flats


def _states(state: dict[str, Any], owner: torch.Tensor) -> dict[str, torch.Tensor]:
    """The owner's tensor states: those with an entry for each of its elements."""
    return {key: value for key, value in _tensors(state) if value.shape == owner.shape}


def _factors(state: dict[str, Any], owner: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensor states of another shape than their owner, which is then a whole parameter."""
    return {
        key: value
        for key, value in _tensors(state)
        if value.shape != owner.shape and key not in EIGHT_BIT
    }


def _tensors(state: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(k, v) for k, v in state.items() if torch.is_tensor(v) and k != STEP]


def _scales(state: dict[str, Any], piece: Piece) -> dict[str, torch.Tensor]:
    """The scales of the blocks that a piece of an 8-bit state lies in."""
    return {key: piece.blocks(state[key]) for key in EIGHT_BIT if key in state}


# ------------------------------------------------------------------------------------ writing


def save(
    engine: DeepSpeedEngine, tokenizer: Any, folder: Path, step: int, state: dict[str, Any]
) -> Path:
    """Writes `folder/step-NNNNNN` on all ranks together.

    Args:
        engine: whose weights and optimizer states to write.
        tokenizer: goes into the model's folder.
        folder: the run's checkpoints.
        step: optimizer steps done.
        state: what else goes into state.json.

    Raises:
        RunError: on every rank, if any rank could not write; what was there before is untouched.
    """
    final = folder / f"step-{step:06}"
    scratch = folder / f"step-{step:06}.tmp"
    rank, world = dist.get_rank(), dist.get_world_size()

    def prepare() -> None:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

    def write() -> None:
        _write_optimizer(engine, scratch, rank, world)
        if rank == 0:
            _write_model(engine.module, tokenizer, scratch / "model", weights)
            write_json(scratch / "state.json", {"format": FORMAT, "step": step, **state, **scalars})

    def publish() -> None:
        if rank == 0:
            _write_manifest(scratch)
            if final.exists():
                shutil.rmtree(final)
            scratch.rename(final)
            _fsync(folder)

    weights = gather_weights(engine.module)
    optimizer = engine.basic_optimizer
    counted = {name: optimizer.param_groups[0][name] for name in optimizer.counted}
    scalars = {"optimizer": _scalars(engine), "groups": counted}
    try:
        for stage in (prepare, write, publish):
            _together(stage)
    except RunError as error:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise RunError(f"{error}; {newest_in_words(folder)}") from None
    return final


def keep_newest(folder: Path, count: int) -> None:
    """Deletes all but the newest `count` checkpoints; never leaves half of one behind its name."""
    for _, checkpoint in _all(folder)[count:]:
        doomed = checkpoint.with_name(checkpoint.name + ".tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def gather_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The full state dict on rank 0 (elsewhere an empty one), also where ZeRO-3 holds parts.

    Parameters that are frozen and belong to an adapter's base are left out.
    """
    adapter = hasattr(model, "peft_config")
    weights = {}
    for name, tensor in [*model.named_parameters(), *_saved_buffers(model)]:
        if adapter and not tensor.requires_grad:
            continue
        if hasattr(tensor, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                if dist.get_rank() == 0:
                    weights[name] = tensor.detach().cpu().clone()
        elif dist.get_rank() == 0:
            weights[name] = tensor.detach()
    return weights


def _saved_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    names = set(model.state_dict().keys())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in names]


def _write_model(
    model: Any, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    _check_written(model, folder)


def _check_written(model: Any, folder: Path) -> None:
    """Compares the shapes in the files with the model's; ZeRO-3 is known to leave empty ones.

    Raises:
        RuntimeError: a tensor is missing or has another shape.
    """
    from safetensors import safe_open

    adapter = hasattr(model, "peft_config")
    wanted = sorted(
        tuple(getattr(p, "ds_shape", p.shape))
        for p in model.parameters()
        if p.requires_grad or not adapter
    )
    written = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            written += [tuple(file.get_slice(name).get_shape()) for name in names]
    missing = list((Counter(wanted) - Counter(written)).elements())
    if missing:
        raise RuntimeError(f"{folder}: lacks {len(missing)} tensors, of shapes {missing[:5]}")


def _write_optimizer(engine: DeepSpeedEngine, folder: Path, rank: int, world: int) -> None:
    from safetensors.torch import save_file

    tensors, index = {}, {}
    for piece in pieces(engine):
        state = engine.basic_optimizer.state.get(piece.owner, {})
        sources = {MASTER: piece.owner, **_states(state, piece.owner)}
        index[piece.name] = {
            "start": piece.start,
            "length": piece.length,
            "phase": piece.offset % STATE_BLOCK,
        }
        for key, source in sources.items():
            tensors[f"{piece.name}:{key}"] = piece.of(source).cpu().clone()
        for key, whole in {**_scales(state, piece), **_factors(state, piece.owner)}.items():
            tensors[f"{piece.name}:{key}"] = whole.cpu().clone()
    path = folder / f"optimizer-{rank:05}-of-{world:05}.safetensors"
    save_file(tensors, path)
    _fsync(path)
    entry = {"pieces": index, "sha256": _sha256(path)}
    write_json(path.with_suffix(".json"), entry)


def _scalars(engine: DeepSpeedEngine) -> dict[str, float]:
    """The optimizer's step count: one value for all parameters."""
    for state in engine.basic_optimizer.state.values():
        if STEP in state:
            return {STEP: float(state[STEP])}
    return {}


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _fsync(path)
        index = path.with_suffix(".json")
        known = path.name.startswith("optimizer-") and path.suffix == ".safetensors"
        digest = read_json(index)["sha256"] if known else _sha256(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(folder / "manifest.json", {"format": FORMAT, "files": files})
    for directory in (folder / "model", folder):
        _fsync(directory)


def _together(work: Any) -> None:
    """Runs `work` on all ranks; if it fails on one, it fails on all."""
    error: BaseException | None = None
    try:
        work()
    except Exception as caught:  # whatever it is, the other ranks must not wait for this one
        error = caught
    failed = torch.tensor([0 if error is None else 1], device=device())
    dist.all_reduce(failed)
    if error is not None:
        told = system_error(error) if isinstance(error, OSError) else one_line(error)
        raise RunError(f"the checkpoint could not be written: {told}") from error
    if failed.item():
        raise RunError("the checkpoint could not be written on another rank; see its log")


# ------------------------------------------------------------------------------------ reading


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there at their full size."""
    return next((path for _, path in _all(folder) if not damage(path, hashes=False)), None)


def newest_in_words(folder: Path) -> str:
    """What is left when a run fails."""
    path = newest_checkpoint(folder)
    if path is None:
        return "no checkpoint is saved yet"
    return f"saved is {path}, and the same command goes on from there"


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written, and what newer ones lack."""
    complaints: list[str] = []
    for _, path in _all(folder):
        problem = damage(path, hashes=True)
        if problem is None:
            return path, complaints
        complaints.append(f"{path}: {problem}")
    return None, complaints


def damage(checkpoint: Path, *, hashes: bool) -> str | None:
    """What is wrong with a checkpoint, or None."""
    path = checkpoint / "manifest.json"
    if not path.is_file():
        return "no manifest.json"
    try:
        manifest = read_json(path)
        for name, expected in manifest["files"].items():
            file = checkpoint / name
            if not file.resolve().is_relative_to(checkpoint.resolve()):
                return f"the manifest names a file outside of the folder: {name}"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if hashes and _sha256(file) != expected["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
    except Exception as error:  # whatever a damaged manifest leads to, it names the damage
        return f"manifest.json cannot be read: {error}"
    return None


def load_optimizer(engine: DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Puts float32 weights and optimizer states back, for any ZeRO stage and number of ranks.

    The weights that the model computes with come from `model/`, before the engine is built.

    Returns:
        state.json.

    Raises:
        RunError: the checkpoint lacks a piece of a parameter.
    """
    from safetensors import safe_open

    saved: dict[str, list[Saved]] = {}
    for index in sorted(checkpoint.glob("optimizer-*.json")):
        file = safe_open(index.with_suffix(".safetensors"), framework="pt")
        keys = set(file.keys())
        for name, entry in read_json(index)["pieces"].items():
            own = {key for key in keys if key.rpartition(":")[0] == name}
            phase = entry.get("phase", 0)
            saved.setdefault(name, []).append(
                Saved(name, entry["start"], entry["length"], phase, file, own)
            )
    state_json: dict[str, Any] = read_json(checkpoint / "state.json")
    optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        group.update((name, state_json["groups"][name]) for name in optimizer.counted)
    mine = list(pieces(engine))
    for piece in mine:
        state = optimizer.state[piece.owner]
        if not state:
            state.update(optimizer.new_state(piece.owner))
        for key, value in state_json["optimizer"].items():
            if key in state:
                state[key].fill_(value)
    # 8-bit states are put back as they were where every piece lies in its blocks as it did; else
    # their values are spread over the new blocks.
    as_they_were = all(
        any(entry.is_as(piece, optimizer.state[piece.owner]) for entry in saved.get(piece.name, []))
        for piece in mine
    )
    spread: dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
    for piece in mine:
        state = optimizer.state[piece.owner]
        codes = {code: scale for scale, (code, _) in EIGHT_BIT.items() if scale in state}
        targets = {MASTER: piece.owner, **_states(state, piece.owner)}
        if codes and not as_they_were:
            _, values = spread.setdefault(
                id(piece.owner),
                (piece.owner, {c: torch.zeros(piece.owner.numel()) for c in codes}),
            )
            targets |= values
        filled = 0
        for entry in saved.get(piece.name, []):
            low = max(entry.start, piece.start)
            high = min(entry.start + entry.length, piece.start + piece.length)
            if low >= high:
                continue
            for key, target in targets.items():
                exact = key in codes and as_they_were
                source = entry.read(key, low, high, decoded=not exact)
                piece.of(target)[low - piece.start : high - piece.start].copy_(source)
                if exact:
                    scales = entry.file.get_tensor(f"{entry.name}:{codes[key]}")
                    piece.blocks(state[codes[key]]).copy_(scales)
            for key, factor in _factors(state, piece.owner).items():
                factor.copy_(entry.file.get_tensor(f"{entry.name}:{key}"))
            filled += high - low
        if filled != piece.length:
            raise RunError(
                f"{checkpoint}: holds {filled} of {piece.length} states of {piece.name}; "
                "the model is not the one that was saved"
            )
    for owner, values in spread.values():
        _encode(optimizer.state[owner], values)
    return state_json


@dataclass(frozen=True)
class Saved:
    """A stretch of a parameter's weights and states in a checkpoint's file."""

    name: str
    start: int
    length: int
    phase: int  # where in its first block of an 8-bit state it begins
    file: Any
    keys: set[str]

    def is_as(self, piece: Piece, state: dict[str, torch.Tensor]) -> bool:
        """Whether it is this piece, with the same elements in the same blocks."""
        scales = {f"{self.name}:{scale}" for scale in EIGHT_BIT if scale in state}
        place = (piece.start, piece.length, piece.offset % STATE_BLOCK)
        return place == (self.start, self.length, self.phase) and scales <= self.keys

    def read(self, key: str, low: int, high: int, *, decoded: bool) -> torch.Tensor:
        """Elements [low, high) of the parameter; 8-bit ones as values if `decoded`."""
        source: torch.Tensor = self.file.get_slice(f"{self.name}:{key}")[
            low - self.start : high - self.start
        ]
        scale = next((scale for scale, (code, _) in EIGHT_BIT.items() if code == key), None)
        if not decoded or f"{self.name}:{scale}" not in self.keys:
            return source
        from gradsmith_kernels.optim import decode

        assert scale is not None
        # From the begin of the first block, so that scales and elements are in step.
        lead = (self.phase + low - self.start) % STATE_BLOCK
        first = (self.phase + low - self.start) // STATE_BLOCK
        codes = torch.nn.functional.pad(source, (lead, 0))
        blocks = -(-len(codes) // STATE_BLOCK)
        scales = self.file.get_tensor(f"{self.name}:{scale}")[first : first + blocks]
        return decode(codes, scales, EIGHT_BIT[scale][1])[lead:]


def _encode(state: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Rounds an owner's values to the nearest 8-bit states."""
    from gradsmith_kernels.optim import encode

    for scale, (code, signed) in EIGHT_BIT.items():
        codes, absmax = encode(values[code], signed)
        state[code].copy_(codes.view_as(state[code]))
        state[scale].copy_(absmax)


# ---------------------------------------------------------------------------------------- files


def _all(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, the newest first."""
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            match = re.fullmatch(r"step-(\d+)", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
