"""What is refused before training, and what stops it: no run goes wrong in silence."""

from __future__ import annotations

import math
import os
import signal
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import RunError

if TYPE_CHECKING:
    pass

MAX_SKIPPED = 20  # steps in a row with a gradient that is not finite
ADVICE = (
    "A lower training.optimizer.lr or a longer training.schedule.warmup usually helps, with "
    "--fresh or another output=...; where only the newest checkpoint is bad, delete it to go on "
    "from the one before"
)


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


class Best:
    """The best value of a validation's metric so far, and how long ago it was.

    Args:
        greater: whether greater is better.
        patience: validations in a row without an improvement after which the run ends; None: it
            never does.
        min_delta: an improvement is larger than this.
        state: of a run that goes on, as `state` gave it.
    """

    def __init__(
        self,
        greater: bool,
        patience: int | None = None,
        min_delta: float = 0.0,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.greater, self.patience, self.min_delta = greater, patience, min_delta
        self.value: float | None = None
        self.step = self.since = 0
        if state is not None:
            self.value, self.step, self.since = state["value"], state["step"], state["since"]

    def update(self, value: float, step: int) -> bool:
        """Whether this validation is the best so far."""
        gain = math.inf if self.value is None else value - self.value
        if self.value is not None and not self.greater:
            gain = -gain
        if not math.isfinite(value) or gain <= (0 if self.value is None else self.min_delta):
            self.since += 1
            return False
        self.value, self.step, self.since = value, step, 0
        return True

    @property
    def over(self) -> bool:
        """Whether there was no improvement for too long."""
        return self.patience is not None and self.since >= self.patience

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "since": self.since}


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
