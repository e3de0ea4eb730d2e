"""A batch's chain of steps: what each backend executes.

A transform draws its parameters and adds steps; a step is an op and `PARAMETERS` numbers for each
image. `ops` (B, S) and `parameters` (B, S, PARAMETERS) are the whole interface to a backend, and
reference.py says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from gradsmith_kernels.augment.random import uniform_numbers

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# The codes of csrc/augment/augment.h, and the parameters (p[0], p[1], ...). Pixels are 0 to 255.
NOTHING = 0
GEOMETRY = 1  # 9 of a matrix output -> input, height, width, interpolation, beyond, 3 of fill
AFFINE = 2  # 3 factors, 3 summands (one a channel), whether the result is kept within 0 to 255
SATURATION = 3  # factor
HUE = 4  # sixths of a turn
SOLARIZE = 5  # threshold
POSTERIZE = 6  # the step between levels: 2^(8 - bits)
GAMMA = 7  # exponent, gain
CONTRAST = 8  # factor
AUTOCONTRAST = 9
EQUALIZE = 10
SHARPNESS = 11  # factor
BLUR = 12  # taps and sigma along x, taps and sigma along y
NOISE = 13  # mean, sigma, whether the result is kept within 0 to 255, stream
ERASE = 14  # top, left, bottom, right, 3 values
MIX_BEGIN = 15  # keeps the image
MIX_ADD = 16  # weight: adds the image to a sum, and goes back to the one that was kept
MIX_END = 17  # weight of the sum; the rest is the image that was kept

PARAMETERS = 20

NEAREST, BILINEAR, BICUBIC = 0, 1, 2
CUT, CLAMP, FILL = 0, 1, 2  # what is beyond the input: cut off, its edge, a fill value


class Program:
    """The steps of one batch while its transforms add to them.

    height, width: (B,) of the images as they are after the steps so far.
    """

    def __init__(
        self, height: Integers, width: Integers, channels: int, seed: int, places: npt.NDArray[Any]
    ) -> None:
        self.height, self.width = height.copy(), width.copy()
        self.channels, self.seed, self.places = channels, seed, places
        self.stream = -1
        self._ops: list[npt.NDArray[np.int32]] = []
        self._parameters: list[Floats] = []
        self._where: Flags | None = None

    @property
    def images(self) -> int:
        return len(self.height)

    def uniform(self, count: int) -> Floats:
        """(B, count) numbers in (0, 1): those of the next transform of the chain."""
        self.stream += 1
        return uniform_numbers(self.places, self.seed, self.stream, count)

    def add(
        self, op: int | npt.NDArray[np.int32], *numbers: Any, where: Flags | None = None
    ) -> None:
        """A step; each number is for all images or (B,). `where`: the images that take it."""
        ops = np.empty(self.images, np.int32)
        ops[:] = op
        for flags in (where, self._where):
            if flags is not None:
                ops[~flags] = NOTHING
        parameters = np.zeros((self.images, PARAMETERS))
        for k, number in enumerate(numbers):
            parameters[:, k] = number
        self._ops.append(ops)
        self._parameters.append(parameters)

    def add_map(
        self,
        matrix: Floats,
        *,
        beyond: int,
        size: tuple[Any, Any] | None = None,
        interpolation: int = NEAREST,
        fill: tuple[float, ...] = (0.0, 0.0, 0.0),
        where: Flags | None = None,
    ) -> None:
        """Geometry: matrix (B, 3, 3) takes a point of the output to one of the input; pixel i of an
        axis covers [i, i + 1). `size`: the output's height and width, if they change."""
        height, width = (self.height, self.width) if size is None else size
        columns = [matrix[:, i, j] for i in range(3) for j in range(3)]
        self.add(GEOMETRY, *columns, height, width, interpolation, beyond, *fill, where=where)
        taken = np.ones(self.images, bool) if where is None else where
        if self._where is not None:
            taken = taken & self._where
        self.height = np.where(taken, height, self.height).astype(np.int64)
        self.width = np.where(taken, width, self.width).astype(np.int64)

    @contextmanager
    def only(self, where: Flags) -> Iterator[None]:
        """Steps added meanwhile are for these images."""
        before = self._where
        self._where = where if before is None else before & where
        yield
        self._where = before

    def arrays(self) -> tuple[npt.NDArray[np.int32], Floats]:
        """ops (B, S) and parameters (B, S, PARAMETERS)."""
        if not self._ops:
            return np.zeros((self.images, 0), np.int32), np.zeros((self.images, 0, PARAMETERS))
        ops = np.ascontiguousarray(np.stack(self._ops, 1))
        return ops, np.ascontiguousarray(np.stack(self._parameters, 1))


def identity(images: int) -> Floats:
    """(B, 3, 3)."""
    return np.broadcast_to(np.eye(3), (images, 3, 3)).copy()
