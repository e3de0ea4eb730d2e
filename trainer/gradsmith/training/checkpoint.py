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

import contextlib
import fcntl
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..errors import RunError, one_line, system_error
from ..files import (
    MARKER,
    is_ours,
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
from ..run import Run
from .engine import world

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FORMAT = 1
LOADED = re.compile(r"model/|optimizer-")  # files that are read because they are there
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
            _together(stage)
    except RunError as error:
        if rank == 0:
            remove(scratch)
        raise RunError(f"{error}; {newest_in_words(Run(folder.parent))}") from None
    return final


def keep_newest(run: Run, count: int) -> None:
    """Deletes all but the newest `count` whole checkpoints.

    A damaged one counts for nothing: it goes with the whole ones that are older than those kept,
    and stays where it is newer. One that somebody reads (see `reading`) stays this time.
    """
    kept = 0
    for _, path in run.steps():
        if kept < count:
            kept += damage(path) is None
        elif is_ours(path):
            with _alone(path) as alone:
                if alone:
                    remove(path)


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keeps a training process from deleting a checkpoint while it is read.

    Raises:
        FileNotFoundError: it is gone.
    """
    manifest = checkpoint / "manifest.json"
    with manifest.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        manifest.stat()  # it may have gone while this process waited
        yield


@contextlib.contextmanager
def _alone(checkpoint: Path) -> Iterator[bool]:
    """Whether nobody reads a checkpoint; if so, nobody begins to in the block."""
    alone = True
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((checkpoint / "manifest.json").open("r+b"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except FileNotFoundError:  # damaged, so nobody does
            pass
        yield alone


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


def _together(work: Any) -> None:
    """Runs `work` on all ranks; if it fails on one, it fails on all, with its reason."""
    error: Exception | None = None
    told = ""
    try:
        work()
    except Exception as caught:  # whatever it is, the other ranks wait for this one
        error = caught
        told = system_error(error) if isinstance(error, OSError) else one_line(error)
    reasons = [""] * world()
    dist.all_gather_object(reasons, told)
    for number, reason in enumerate(reasons):
        if reason:
            by = f" by rank {number}" if world() > 1 else ""
            raise RunError(f"the checkpoint could not be written{by}: {reason}") from error


# ------------------------------------------------------------------------------------ reading


def newest_in_words(run: Run) -> str:
    """What is left when a run fails."""
    path = next((path for _, path in run.steps() if not damage(path, hashes=False)), None)
    if path is None:
        return "no checkpoint is saved yet"
    return f"saved is {path}, and the same command goes on from there"


def newest(run: Run) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written, and what newer ones lack."""
    while True:
        complaints: list[str] = []
        steps = run.steps()
        for _, path in steps:
            problem = damage(path)
            if problem is None:
                return path, complaints
            complaints.append(f"{path}: {problem}")
        if run.steps() == steps:  # none was written or deleted meanwhile
            return None, complaints


def damage(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None; without `hashes` only sizes are looked at."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}; this version reads {FORMAT}"
        listed: dict[str, Any] = manifest["files"]
        for name in listed:
            if not (checkpoint / name).resolve().is_relative_to(checkpoint.resolve()):
                return f"the manifest names a file outside of the folder: {name}"
        there = [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()]
        if unknown := [p for p in there if p not in listed and LOADED.match(p)]:
            return f"{unknown[0]} is not what was written (the manifest does not list it)"
        if "state.json" not in listed or not any(p.startswith("model/") for p in listed):
            return "the manifest lists no state.json or no model"
        for name, expected in listed.items():
            if problem := file_damage(checkpoint / name, expected, hashes):
                return f"{name} {problem}"
        step = read_json(checkpoint / "state.json")["step"]
        if checkpoint.name != f"step-{step:06}":
            return f"state.json says that it is of step {step}"
    except FileNotFoundError as error:
        return f"no {Path(str(error.filename)).name}"
    except Exception as error:  # whatever a damaged file leads to, it names the damage
        return f"manifest.json or state.json cannot be read: {error}"
    return None


def file_damage(file: Path, expected: dict[str, Any], hashes: bool = True) -> str | None:
    """How a file differs from its entry in a manifest, {bytes, sha256}, or None."""
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != expected["bytes"]:
        return f"has {file.stat().st_size} bytes instead of {expected['bytes']}"
    if hashes and sha256(file) != expected["sha256"]:
        return "is not what was written (its SHA-256 differs)"
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
