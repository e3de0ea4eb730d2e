"""Transforms that move pixels. Names, arguments and ranges are those of torchvision.transforms.v2.

Each adds a matrix that takes a point of its output to one of its input, in coordinates in which
pixel i covers [i, i + 1). Resizing is always antialiased where it shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradsmith_kernels.augment.steps import CLAMP, CUT, FILL, Floats, Program, identity
from gradsmith_kernels.augment.transform import (
    Transform,
    around,
    below,
    between,
    height_and_width,
    interpolation_code,
    interval,
    number,
    probability,
    three,
    whole,
)


def _placed(images: int, scale: tuple[Any, Any], offset: tuple[Any, Any]) -> Floats:
    """(B, 3, 3): x * scale + offset, for (y, x)."""
    m = identity(images)
    m[:, 1, 1], m[:, 0, 0] = scale
    m[:, 1, 2], m[:, 0, 2] = offset
    return m


def _resized(
    program: Program, box: tuple[Any, Any, Any, Any], size: tuple[Any, Any], interpolation: int
) -> None:
    """Cuts out box (top, left, height, width), whole numbers, and resizes it."""
    top, left, height, width = box
    one = np.ones(program.images)
    program.add_map(
        _placed(program.images, (one, one), (top, left)), beyond=CUT, size=(height, width)
    )
    scale = (height / np.asarray(size[0]), width / np.asarray(size[1]))
    program.add_map(
        _placed(program.images, scale, (0, 0)),
        beyond=CLAMP,
        size=size,
        interpolation=interpolation,
    )


def _only_antialiased(owner: str, antialias: Any) -> None:
    if antialias is not True:
        raise ValueError(f"{owner}: antialias must be True, not {antialias!r}: it always is")


class Resize(Transform):
    """To (height, width); one number is the shorter edge, and the longer one follows."""

    kind = "geometry"
    names_of_settings = ("size",)

    def __init__(
        self, size: Any, interpolation: Any = "bilinear", *, antialias: bool = True
    ) -> None:
        self.shorter = size if isinstance(size, int) else None
        if isinstance(size, Sequence) and len(size) == 1:
            self.shorter = size[0]
        self.size = height_and_width("Resize", size)
        self.interpolation = interpolation_code("Resize", interpolation)
        _only_antialiased("Resize", antialias)

    def add_to(self, program: Program) -> None:
        h, w = program.height, program.width
        size: tuple[Any, Any] = self.size
        if self.shorter is not None:
            shorter = np.minimum(h, w)
            size = (
                np.maximum(1, (self.shorter * h / shorter).astype(np.int64)),
                np.maximum(1, (self.shorter * w / shorter).astype(np.int64)),
            )
        zero = np.zeros(program.images)
        _resized(program, (zero, zero, h, w), size, self.interpolation)


class CenterCrop(Transform):
    """The middle of the image, which must be at least that large."""

    kind = "geometry"
    names_of_settings = ("size",)

    def __init__(self, size: Any) -> None:
        self.size = height_and_width("CenterCrop", size)

    def add_to(self, program: Program) -> None:
        _check_room("CenterCrop", program, *self.size)
        offset = (
            np.round((program.height - self.size[0]) / 2),
            np.round((program.width - self.size[1]) / 2),
        )
        program.add_map(_placed(program.images, (1, 1), offset), beyond=CUT, size=self.size)


def _check_room(owner: str, program: Program, height: Any, width: Any) -> None:
    small = (program.height < height) | (program.width < width)
    if small.any():
        i = int(np.flatnonzero(small)[0])
        raise ValueError(
            f"{owner}: image {i} is {program.height[i]} x {program.width[i]} here, smaller than "
            f"the crop of {height} x {width}"
        )


class Pad(Transform):
    """padding: all sides, or (left and right, top and bottom), or (left, top, right, bottom)."""

    kind = "geometry"
    names_of_settings = ("padding", "fill")

    def __init__(self, padding: Any, fill: Any = 0, padding_mode: str = "constant") -> None:
        self.padding = _sides("Pad", padding)
        self.fill = three("Pad", "fill", fill)
        _only_constant("Pad", padding_mode)

    def add_to(self, program: Program) -> None:
        _padded(program, self.padding, self.fill)


def _sides(owner: str, padding: Any) -> tuple[int, int, int, int]:
    values = list(padding) if isinstance(padding, Sequence) else [padding]
    if len(values) not in (1, 2, 4):
        raise ValueError(f"{owner}: padding must be one, two or four numbers, not {padding!r}")
    left, top, right, bottom = (whole(owner, "padding", v, 0) for v in values * (4 // len(values)))
    return left, top, right, bottom


def _only_constant(owner: str, mode: str) -> None:
    if mode != "constant":
        raise ValueError(f"{owner}: padding_mode must be 'constant', not {mode!r}")


def _padded(program: Program, sides: tuple[Any, Any, Any, Any], fill: Any) -> None:
    left, top, right, bottom = sides
    program.add_map(
        _placed(program.images, (1, 1), (-np.asarray(top), -np.asarray(left))),
        beyond=FILL,
        size=(program.height + top + bottom, program.width + left + right),
        fill=fill,
    )


class RandomCrop(Transform):
    """A window of the image, which may be padded first. One that is too small is an error, unless
    `pad_if_needed`."""

    kind = "geometry"
    names_of_settings = ("size", "padding")

    def __init__(
        self,
        size: Any,
        padding: Any = None,
        pad_if_needed: bool = False,
        fill: Any = 0,
        padding_mode: str = "constant",
    ) -> None:
        self.size = height_and_width("RandomCrop", size)
        self.padding = None if padding is None else _sides("RandomCrop", padding)
        self.pad_if_needed = pad_if_needed
        self.fill = three("RandomCrop", "fill", fill)
        _only_constant("RandomCrop", padding_mode)

    def add_to(self, program: Program) -> None:
        u = program.uniform(2)
        if self.padding:
            _padded(program, self.padding, self.fill)
        if self.pad_if_needed:
            high = np.maximum(0, self.size[0] - program.height)
            wide = np.maximum(0, self.size[1] - program.width)
            if high.any() or wide.any():
                _padded(program, (wide, high, wide, high), self.fill)
        _check_room("RandomCrop", program, *self.size)
        top = below(u[:, 0], program.height - self.size[0] + 1)
        left = below(u[:, 1], program.width - self.size[1] + 1)
        program.add_map(_placed(program.images, (1, 1), (top, left)), beyond=CUT, size=self.size)


class RandomResizedCrop(Transform):
    """A box with a share `scale` of the area and an aspect in `ratio`, resized. If ten boxes in a
    row do not fit into the image: the largest one in its middle whose aspect is in `ratio`."""

    kind = "geometry"
    names_of_settings = ("size", "scale", "ratio")
    tries = 10

    def __init__(
        self,
        size: Any,
        scale: Any = (0.08, 1.0),
        ratio: Any = (3 / 4, 4 / 3),
        interpolation: Any = "bilinear",
        antialias: bool = True,
    ) -> None:
        self.size = height_and_width("RandomResizedCrop", size)
        self.scale = interval("RandomResizedCrop", "scale", scale, 0)
        self.ratio = interval("RandomResizedCrop", "ratio", ratio, 1e-3, 1e3)
        self.interpolation = interpolation_code("RandomResizedCrop", interpolation)
        _only_antialiased("RandomResizedCrop", antialias)

    def add_to(self, program: Program) -> None:
        u = program.uniform(2 * self.tries + 2)
        h, w = program.height[:, None], program.width[:, None]
        area = h * w * between(u[:, : self.tries], *self.scale)
        logs = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        aspect = np.exp(between(u[:, self.tries : 2 * self.tries], *logs))
        wide, high = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
        fits = (wide > 0) & (wide <= w) & (high > 0) & (high <= h)
        first = (np.arange(program.images), fits.argmax(1))
        wide, high, found = wide[first], high[first], fits.any(1)

        h, w = program.height.astype(float), program.width.astype(float)
        fallback_w = np.minimum(w, np.maximum(1, np.round(h * self.ratio[1])))
        fallback_h = np.minimum(h, np.maximum(1, np.round(w / self.ratio[0])))
        wide, high = np.where(found, wide, fallback_w), np.where(found, high, fallback_h)
        top = np.where(found, below(u[:, -2], h - high + 1), (h - high) // 2)
        left = np.where(found, below(u[:, -1], w - wide + 1), (w - wide) // 2)
        _resized(program, (top, left, high, wide), self.size, self.interpolation)


class RandomHorizontalFlip(Transform):
    """Left becomes right, with probability p."""

    kind = "geometry"
    names_of_settings = ("p",)

    def __init__(self, p: float = 0.5) -> None:
        self.p = probability(type(self).__name__, p)

    def add_to(self, program: Program) -> None:
        where = program.uniform(1)[:, 0] < self.p
        m = self._matrix(program)
        program.add_map(m, beyond=CUT, where=where)

    def _matrix(self, program: Program) -> Floats:
        return _placed(program.images, (1, -1), (0, program.width))


class RandomVerticalFlip(RandomHorizontalFlip):
    """Top becomes bottom, with probability p."""

    def _matrix(self, program: Program) -> Floats:
        return _placed(program.images, (-1, 1), (program.height, 0))


def turned(
    program: Program,
    angle: Any,
    *,
    translate: tuple[Any, Any] = (0, 0),
    scale: Any = 1,
    shear: tuple[Any, Any] = (0, 0),
    center: tuple[Any, Any] | None = None,
) -> Floats:
    """(B, 3, 3), output -> input, of torchvision's affine: clockwise degrees, pixels (x, y)."""
    rot, sx, sy = (np.radians(np.broadcast_to(v, program.images)) for v in (angle, *shear))
    a = np.cos(rot - sy) / np.cos(sy)
    b = -(a * np.tan(sx) + np.sin(rot))
    c = np.sin(rot - sy) / np.cos(sy)
    d = np.cos(rot) - c * np.tan(sx)
    cx, cy = (program.width / 2, program.height / 2) if center is None else center
    m = identity(program.images)
    m[:, 0, 0], m[:, 0, 1], m[:, 1, 0], m[:, 1, 1] = d / scale, -b / scale, -c / scale, a / scale
    x, y = cx + translate[0], cy + translate[1]
    m[:, 0, 2] = cx - m[:, 0, 0] * x - m[:, 0, 1] * y
    m[:, 1, 2] = cy - m[:, 1, 0] * x - m[:, 1, 1] * y
    return m


class RandomRotation(Transform):
    """By an angle in `degrees`, counter-clockwise, around the middle or `center` (x, y)."""

    kind = "geometry"
    names_of_settings = ("degrees",)

    def __init__(
        self,
        degrees: Any,
        interpolation: Any = "nearest",
        expand: bool = False,
        center: Any = None,
        fill: Any = 0,
    ) -> None:
        self.degrees = around("RandomRotation", "degrees", degrees)
        self.interpolation = interpolation_code("RandomRotation", interpolation)
        if expand:
            raise ValueError("RandomRotation: expand must be False; pad before instead")
        self.center = None if center is None else _pair("RandomRotation", "center", center)
        self.fill = three("RandomRotation", "fill", fill)

    def add_to(self, program: Program) -> None:
        angle = between(program.uniform(1)[:, 0], *self.degrees)
        program.add_map(
            turned(program, -angle, center=self.center),
            beyond=FILL,
            interpolation=self.interpolation,
            fill=self.fill,
        )


def _pair(owner: str, name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{owner}: {name} must be two numbers, not {value!r}")
    return float(number(owner, name, value[0])), float(number(owner, name, value[1]))


class RandomAffine(Transform):
    """Rotation (clockwise), translation (shares of the size), scale and shear (degrees) in one."""

    kind = "geometry"
    names_of_settings = ("degrees", "translate", "scale", "shear")

    def __init__(
        self,
        degrees: Any,
        translate: Any = None,
        scale: Any = None,
        shear: Any = None,
        interpolation: Any = "nearest",
        fill: Any = 0,
        center: Any = None,
    ) -> None:
        owner = "RandomAffine"
        self.degrees = around(owner, "degrees", degrees)
        self.translate = None if translate is None else _pair(owner, "translate", translate)
        for share in self.translate or ():
            number(owner, "translate", share, 0, 1)
        # Below, the filter that keeps it from aliasing would be wider than the kernels take.
        self.scale = None if scale is None else interval(owner, "scale", scale, 0.05)
        self.shear = ((0.0, 0.0), (0.0, 0.0))
        if isinstance(shear, Sequence) and len(shear) == 4:
            self.shear = (
                interval(owner, "shear", list(shear[:2]), -89, 89),
                interval(owner, "shear", list(shear[2:]), -89, 89),
            )
        elif shear is not None:
            self.shear = (around(owner, "shear", shear), (0.0, 0.0))
        self.interpolation = interpolation_code(owner, interpolation)
        self.fill = three(owner, "fill", fill)
        self.center = None if center is None else _pair(owner, "center", center)

    def add_to(self, program: Program) -> None:
        u = program.uniform(6)
        share = self.translate or (0.0, 0.0)
        most = (share[0] * program.width, share[1] * program.height)
        matrix = turned(
            program,
            between(u[:, 0], *self.degrees),
            translate=(
                np.round(between(u[:, 1], -most[0], most[0])),
                np.round(between(u[:, 2], -most[1], most[1])),
            ),
            scale=between(u[:, 3], *(self.scale or (1.0, 1.0))),
            shear=(between(u[:, 4], *self.shear[0]), between(u[:, 5], *self.shear[1])),
            center=self.center,
        )
        program.add_map(matrix, beyond=FILL, interpolation=self.interpolation, fill=self.fill)


class RandomPerspective(Transform):
    """The corners move inwards by up to half of `distortion_scale` of the size, with probability
    p."""

    kind = "geometry"
    names_of_settings = ("distortion_scale", "p")

    def __init__(
        self,
        distortion_scale: float = 0.5,
        p: float = 0.5,
        interpolation: Any = "bilinear",
        fill: Any = 0,
    ) -> None:
        owner = "RandomPerspective"
        self.distortion_scale = float(number(owner, "distortion_scale", distortion_scale, 0, 1))
        self.p = probability(owner, p)
        self.interpolation = interpolation_code(owner, interpolation)
        self.fill = three(owner, "fill", fill)

    def add_to(self, program: Program) -> None:
        u = program.uniform(9)
        h, w = program.height, program.width
        reach_x = np.floor(self.distortion_scale * (w // 2)) + 1
        reach_y = np.floor(self.distortion_scale * (h // 2)) + 1
        dx = [below(u[:, k], reach_x) for k in range(4)]
        dy = [below(u[:, 4 + k], reach_y) for k in range(4)]
        start = [(0 * w, 0 * h), (w - 1, 0 * h), (w - 1, h - 1), (0 * w, h - 1)]
        end = [
            (dx[0], dy[0]),
            (w - 1 - dx[1], dy[1]),
            (w - 1 - dx[2], h - 1 - dy[2]),
            (dx[3], h - 1 - dy[3]),
        ]
        where = (u[:, 8] < self.p) & (w > 1) & (h > 1)
        program.add_map(
            corners_to_matrix(end, start, where),
            beyond=FILL,
            interpolation=self.interpolation,
            fill=self.fill,
            where=where,
        )


def corners_to_matrix(corners: Any, to: Any, where: Any) -> Floats:
    """(B, 3, 3): the perspective that takes four corners (x, y) to four others."""
    rows, right = [], []
    for (x, y), (u, v) in zip(corners, to, strict=True):
        one, zero = np.ones(len(x)), np.zeros(len(x))
        rows += [
            np.stack((x, y, one, zero, zero, zero, -u * x, -u * y), -1),
            np.stack((zero, zero, zero, x, y, one, -v * x, -v * y), -1),
        ]
        right += [u, v]
    a, b = np.stack(rows, 1).astype(float), np.stack(right, 1).astype(float)
    a[~where] = np.eye(8)
    b[~where] = identity(1)[0].reshape(9)[:8]
    m = np.concatenate((np.linalg.solve(a, b[..., None])[..., 0], np.ones((len(a), 1))), 1)
    return m.reshape(-1, 3, 3)
