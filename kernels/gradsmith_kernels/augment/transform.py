"""What a transform is, and the checks that all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradsmith_kernels.augment.steps import BICUBIC, BILINEAR, NEAREST, Floats, Program

_INTERPOLATIONS = {
    "nearest": NEAREST,
    "nearest-exact": NEAREST,
    "bilinear": BILINEAR,
    "bicubic": BICUBIC,
}


class Transform(ABC):
    """Draws its parameters for a batch, and adds its steps.

    kind: what it needs, which decides what it fuses with: "geometry", "pixel", "statistic" (of the
        image so far), "neighbourhood" (other pixels of the image so far), "mixed".
    """

    kind: str
    names_of_settings: tuple[str, ...] = ()

    @abstractmethod
    def add_to(self, program: Program) -> None:
        """Adds the steps. Takes numbers by `program.uniform` once, whatever they then decide."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in self.names_of_settings)
        return f"{type(self).__name__}({settings})"


def number(
    owner: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> Any:
    """`value`, if it is a finite number within [low, high]."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not low <= value <= high:
        wanted = f"a number from {low:g} to {high:g}"
        if math.isinf(high):
            wanted = "a number" if math.isinf(low) else f"a number of at least {low:g}"
        raise ValueError(f"{owner}: {name} must be {wanted}, not {value!r}")
    return value


def probability(owner: str, value: Any) -> float:
    return float(number(owner, "p", value, 0, 1))


def interval(
    owner: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> tuple[float, float]:
    """Two finite numbers in order, within [low, high]."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{owner}: {name} must be two numbers (from, to), not {value!r}")
    first, last = (float(number(owner, name, v, low, high)) for v in value)
    if first > last:
        raise ValueError(f"{owner}: {name} must be in order (from, to), not {value!r}")
    return first, last


def around(
    owner: str, name: str, value: Any, centre: float = 0.0, low: float = -math.inf
) -> tuple[float, float]:
    """torchvision's short form: one number is an interval around `centre`."""
    if isinstance(value, Sequence):
        return interval(owner, name, value, low)
    number(owner, name, value, 0)
    return max(low, centre - value), centre + value


def whole(owner: str, name: str, value: Any, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{owner}: {name} must be a whole number of at least {low}, not {value!r}")
    return value


def height_and_width(owner: str, value: Any) -> tuple[int, int]:
    if isinstance(value, Sequence) and len(value) in (1, 2):
        pair = (value[0], value[-1])
    else:
        pair = (value, value)
    return whole(owner, "size", pair[0]), whole(owner, "size", pair[1])


def interpolation_code(owner: str, value: Any) -> int:
    """Of a name, or of torchvision's InterpolationMode."""
    name = getattr(value, "value", value)
    if name not in _INTERPOLATIONS:
        allowed = ", ".join(_INTERPOLATIONS)
        raise ValueError(f"{owner}: interpolation must be one of {allowed}, not {value!r}")
    return _INTERPOLATIONS[name]


def three(owner: str, name: str, value: Any) -> tuple[float, float, float]:
    """One number for all channels, or three."""
    if value is None:
        value = 0
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(values) not in (1, 3):
        raise ValueError(f"{owner}: {name} must be one number or three, not {value!r}")
    values = values * 3 if len(values) == 1 else values
    a, b, c = (float(number(owner, name, v)) for v in values)
    return a, b, c


def between(u: Floats, low: Any, high: Any) -> Floats:
    """Uniform in [low, high] for u uniform in (0, 1)."""
    drawn: Floats = low + (high - low) * u
    return drawn


def below(u: Floats, count: Any) -> Floats:
    """Uniform in 0 .. count - 1, as whole float64 numbers."""
    drawn: Floats = np.minimum(np.floor(u * count), np.asarray(count) - 1.0)
    return drawn
