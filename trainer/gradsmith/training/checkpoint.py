"""Checkpoints: whole or not there, verified before they are used, the same for any ZeRO stage.

```
step-000100/
  model/                              what transformers or peft would write, with the tokenizer
  optimizer-00000-of-00002.safetensors  rank 0's pieces: float32 weights and optimizer states
  optimizer-00000-of-00002.json         which piece of which parameter is where, and the hash
  state.json                          step, tokens, seconds, the optimizer's step count
  manifest.json                       size and SHA-256 of every file above
```

A checkpoint is written beside its place (gradsmith.files), every file flushed to disk, the manifest
last, and then rank 0 alone renames it. Whoever uses one verifies its every byte before, and one
that is not as it was written counts for nothing: neither as the newest, nor among those that
`training.checkpoint.keep` asks for. Optimizer states are kept as pieces of named parameters, so a
run may go on under another ZeRO stage or on another number of ranks.
Sample order and dropout are functions of the seed and the step (gradsmith.data.loader,
gradsmith.training.loop), so there is no loader or random state to keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..checkpoints import FORMAT, newest_in_words
from ..errors import RunError
from ..files import (
    MARKER,
    new_scratch,
    publish,
    read_json,
    remove,
    scratch_of,
    sha256,
    sha256_is,
    sync,
    write_json,
)
from ..ranks import together
from ..run import Run
from .deepspeed_internals import STATE_BLOCK, Shard, shards

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

EIGHT_BIT = {"absmax1": ("state1", True), "absmax2": ("state2", False)}  # scales: codes, signed
STEP = "step"  # the state that is one number for all parameters
MASTER = "float32"  # the float32 weights' key beside the optimizer's own: exp_avg, exp_avg_sq


# ------------------------------------------------------------------------- what a rank holds


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


def _scales(state: dict[str, Any], piece: Shard) -> dict[str, torch.Tensor]:
    """The scales of the blocks that a piece of an 8-bit state lies in."""
    return {key: piece.blocks(state[key]) for key in EIGHT_BIT if key in state}


# ------------------------------------------------------------------------------------ writing


def save(
    engine: DeepSpeedEngine,
    tokenizer: Mapping[str, bytes],
    folder: Path,
    step: int,
    state: dict[str, Any],
) -> Path:
    """Writes `folder/step-NNNNNN` on all ranks together.

    Args:
        engine: whose weights and optimizer states to write.
        tokenizer: its files, by name, which go into the model's folder.
        folder: the run's checkpoints.
        step: optimizer steps done.
        state: what else goes into state.json.

    Raises:
        RunError: on every rank, if any rank could not write; what was there before is untouched.
    """
    final = folder / f"step-{step:06}"
    scratch = scratch_of(final)
    rank, world = dist.get_rank(), dist.get_world_size()

    def prepare() -> None:
        if rank == 0:
            new_scratch(final, "checkpoint")

    def write() -> None:
        _write_optimizer(engine, scratch, rank, world)
        if rank == 0:
            _write_model(engine.module, tokenizer, scratch / "model", weights)
            write_json(scratch / "state.json", {"format": FORMAT, "step": step, **state, **scalars})

    def finish() -> None:
        if rank == 0:
            _write_manifest(scratch)
            publish(scratch, final)

    weights = gather_weights(engine.module)
    optimizer = engine.basic_optimizer
    counted = {name: optimizer.param_groups[0][name] for name in optimizer.counted}
    scalars = {"optimizer": _scalars(engine), "groups": counted}
    try:
        for stage in (prepare, write, finish):
            together(stage, "the checkpoint could not be written")
    except RunError as error:
        if rank == 0:
            remove(scratch)
        raise RunError(f"{error}; {newest_in_words(Run(folder.parent))}") from None
    return final


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
    model: Any, tokenizer: Mapping[str, bytes], folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    model.save_pretrained(folder, state_dict=weights)
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
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
    everybody_has_all = engine.zero_optimization_stage() == 0
    for piece in () if everybody_has_all and rank else shards(engine):
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
    sync(path)
    entry = {"pieces": index, "sha256": sha256(path)}
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
        sync(path)
        index = path.with_suffix(".json")
        if path.name == MARKER:
            continue
        if path.name.startswith("optimizer-") and path.suffix == ".safetensors":
            sha256_is(path, read_json(index)["sha256"])  # by the rank that wrote it
        digest = sha256(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(folder / "manifest.json", {"format": FORMAT, "files": files})
    for directory in (folder / "model", folder):
        sync(directory)


# ------------------------------------------------------------------------------------ reading


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
            if any(other.start == entry["start"] for other in saved.get(name, [])):
                continue  # an older checkpoint of stage 0, where each rank wrote everything
            own = {key for key in keys if key.rpartition(":")[0] == name}
            phase = entry.get("phase", 0)
            saved.setdefault(name, []).append(
                Saved(name, entry["start"], entry["length"], phase, file, own)
            )
    state_json: dict[str, Any] = read_json(checkpoint / "state.json")
    optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        group.update((name, state_json["groups"][name]) for name in optimizer.counted)
    mine = list(shards(engine))
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

    def is_as(self, piece: Shard, state: dict[str, torch.Tensor]) -> bool:
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
