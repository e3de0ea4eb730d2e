"""What is refused before training, and what stops it: no run goes wrong in silence."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from ..console import bytes_in_words
from ..errors import RunError, UserError
from ..recipe import Recipe

if TYPE_CHECKING:
    from ..data.packing import Sequences
    from ..data.shards import PreparedData

MAX_SKIPPED = 20  # steps in a row with a gradient that is not finite
ADVICE = (
    "A lower training.optimizer.lr or a longer training.schedule.warmup usually helps, with "
    "--fresh or another output=...; where only the newest checkpoint is bad, delete it to go on "
    "from the one before"
)


def check_data(data: PreparedData, sequences: Sequences) -> None:
    """
    Raises:
        UserError: there is nothing to learn from, or the model would never learn to stop.
    """
    if sequences.target_tokens == 0:
        raise UserError("data: the training split has no target token: nothing to learn from")
    train = data.manifest["splits"]["train"]
    if train["eos_targets"] == 0:
        raise UserError(
            "data: the end-of-sequence token is in the loss of none of the "
            f"{train['documents']} training documents, so the model would never learn to stop; "
            "end the chat template's answers with eos_token, or raise data.sequence_length if "
            "everything was truncated"
        )


def check_packing(model: Any) -> None:
    """Tries whether another first document changes what the model says of the second.

    Args:
        model: the causal LM, or an engine around it; in evaluation mode.

    Raises:
        UserError: it does. transformers has models that do not hand the positions to their masks,
            and a state-space layer carries its state along.
    """
    import torch

    device = next(model.parameters()).device
    positions = torch.arange(4, device=device).repeat(1, 2)
    found = []
    for first in ([0, 1, 2, 3], [7, 6, 5, 4]):
        tokens = torch.tensor([[*first, 4, 5, 6, 7]], device=device)
        with torch.no_grad():
            output = model(input_ids=tokens, position_ids=positions, use_cache=False)
        found.append(output.logits[:, 4:].double())
    # Experts may get the tokens in another order and round otherwise: 1e-7 in float32. An untrained
    # model of 32 channels says 2e-3 when it leaks, and larger ones more.
    if (found[0] - found[1]).norm() > 1e-3 * found[0].norm():
        raise UserError(
            "data.packing: found true, but this model lets the documents of a row see each other "
            "(transformers keeps them apart in some models only); set data.packing to false"
        )


def check_space(folder: Path, trainable: int, total: int, recipe: Recipe) -> None:
    """
    Raises:
        UserError: the checkpoints that the recipe keeps do not fit on the disk.
    """
    saved = trainable if recipe.model.adapter else total
    bytes_each = 12 * trainable + (4 if recipe.training.precision == "fp32" else 2) * saved
    needed = bytes_each * (recipe.training.checkpoint.keep + 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"output: {folder} has {bytes_in_words(free)} free; training.checkpoint.keep "
            f"{recipe.training.checkpoint.keep} needs {bytes_in_words(needed)} "
            "(one more than is kept is there while it is written)"
        )


def check_same_run(before: Recipe, now: Recipe, folder: Path) -> None:
    """A run goes on only as what it was.

    Raises:
        UserError: naming the keys that differ. How long to train, what to log and keep, and how
            the work is laid out over machines may change.
    """
    free = re.compile(
        r"name|output|evaluation\..*|model\.kernels|training\.(steps|tokens|epochs|minutes"
        r"|micro_batch|activation_checkpointing|(zero|log|validate|checkpoint)\..*)"
    )
    old, new = dict(_leaves(before.dump())), dict(_leaves(now.dump()))
    changed = [
        f"{key}: {old.get(key)} before, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not free.fullmatch(key)
    ]
    if changed:
        raise UserError(
            f"{folder}: the run there was started from another recipe:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nGo on with the old values, start over with --fresh, or choose another output=..."
        )


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree of plain data, by its dotted key."""
    if isinstance(tree, dict | list):
        for name, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(branch, f"{key}.{name}" if key else str(name))
    else:
        yield key, tree


class Divergence:
    """Counts steps in a row that were skipped for a gradient that is not finite.

    Args:
        scaled: the loss is scaled (fp16), so a gradient beyond the format's range is no sign of
            divergence while the loss is finite: the next scale is smaller.
    """

    def __init__(self, scaled: bool = False) -> None:
        self.scaled = scaled
        self.skipped = 0
        self.standing = False  # whether the last step was skipped for more than its scale

    def check(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the step was sound.

        Raises:
            RunError: `MAX_SKIPPED` steps in a row were not.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped, self.standing = 0, False
            return True
        self.skipped += 1
        self.standing = not (self.scaled and math.isfinite(loss))
        if self.skipped >= MAX_SKIPPED:
            raise RunError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: {MAX_SKIPPED} steps in a "
                "row were not finite and were skipped: the run has diverged. No checkpoint was "
                f"written meanwhile. {ADVICE}"
            )
        return False


class StopRequest:
    """SIGINT, SIGTERM and SIGHUP ask for a stop at the next step; a second one stops at once.

    So does the end of the launcher that started this rank, as if by SIGTERM: with it, nobody would
    be left to end the rank.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._parent = os.getppid() if "MASTER_ADDR" in os.environ else None

    @property
    def signal(self) -> int | None:
        """The signal that asked for a stop, or None."""
        if self._signal is None and self._parent not in (None, os.getppid()):
            self._signal = signal.SIGTERM
        return self._signal

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it for SIGHUP
                self._before[number] = signal.signal(number, self._asked)
        return self

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(number, self._before[number])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
