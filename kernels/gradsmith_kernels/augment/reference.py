"""The definition of every step, in float64, one image at a time.

Pixels are real numbers from 0 to 255: nothing is rounded between the steps, but for what is defined
on whole numbers (posterize, equalize), which round first. Geometry that follows geometry composes:
the output is sampled once, from the input of the first step. It is not composed with what lies
before it if the whole both shrinks and turns; then what is before is done first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradsmith_kernels.augment import steps as s
from gradsmith_kernels.augment.random import normal_numbers
from gradsmith_kernels.augment.steps import Floats

MOST_FRAMES = 4


def run(
    image: npt.NDArray[np.uint8], ops: Any, parameters: Floats, seed: int, place: int
) -> Floats:
    """The image (H, W, C) after its steps (S,) and (S, PARAMETERS), as (H', W', C) float64."""
    state = _State(image.astype(np.float64), seed, place)
    for op, p in zip(ops, parameters, strict=True):
        if op == s.GEOMETRY:
            state.move(p)
        elif op != s.NOTHING:
            state.sample()
            state.image = _STEPS[int(op)](state, p)
    state.sample()
    return state.image


class _Frame(NamedTuple):
    """An image on the way: output -> its coordinates, its size."""

    matrix: Floats
    width: float
    height: float


class _State:
    """The image, and the geometry that is still to be done to it."""

    def __init__(self, image: Floats, seed: int, place: int) -> None:
        self.image, self.seed, self.place = image, seed, place
        self.kept = self.mixed = image
        self._start()

    def _start(self) -> None:
        self.size = self.image.shape[:2]
        self.matrix = np.eye(3)
        self.cut = (0, 0, self.size[1], self.size[0])  # left, top, right, bottom of what exists
        self.frames: list[_Frame] = []
        self.fill = np.zeros(3)
        self.interpolation = s.NEAREST
        self.moved = False

    def move(self, p: Floats) -> None:
        """Adds a step of geometry."""
        if not self._composes(p):
            self.sample()
        step, fresh = p[:9].reshape(3, 3), _whole_pixels(self.matrix)
        self.frames = [_Frame(f.matrix @ step, f.width, f.height) for f in self.frames]
        if p[12] == s.FILL:
            self.frames.append(_Frame(step, self.size[1], self.size[0]))
            self.fill = p[13:16]
        self.matrix = self.matrix @ step
        self.size = (int(p[9]), int(p[10]))
        self.interpolation = max(self.interpolation, int(p[11]))
        self.moved = True
        if p[12] == s.CUT and fresh and _whole_pixels(self.matrix):
            ends = self.matrix @ np.array([[0, self.size[1]], [0, self.size[0]], [1, 1]])
            (left, right), (top, bottom) = np.sort(ends[:2], axis=1)
            x0, y0, x1, y1 = self.cut
            cut = (max(x0, left), max(y0, top), min(x1, right), min(y1, bottom))
            self.cut = (int(cut[0]), int(cut[1]), int(cut[2]), int(cut[3]))

    def _composes(self, p: Floats) -> bool:
        most = len(self.frames) == MOST_FRAMES
        other = bool(self.frames) and not np.array_equal(self.fill, p[13:16])
        if p[12] == s.FILL and (most or other):
            return False
        after = self.matrix @ p[:9].reshape(3, 3)
        if _whole_pixels(self.matrix) or _aligned(after):
            return True
        size = (p[9], p[10])
        return max(_shrink(after, size), _shrink_along(self.matrix, self.size)) <= 1 + 1e-6

    def sample(self) -> None:
        """Does the geometry that is due."""
        if not self.moved:
            return
        if _aligned(self.matrix):
            image, cover = self._along_the_axes()
        else:
            image, cover = self._through_the_map()
        channels = image.shape[2]
        self.image = self.fill[:channels] + (image - self.fill[:channels]) * cover[..., None]
        self._start()

    def _along_the_axes(self) -> tuple[Floats, Floats]:
        x0, y0, x1, y1 = self.cut
        soft = self.interpolation != s.NEAREST
        weights, cover = [], []
        axes = ((1, self.size[0], y0, y1), (0, self.size[1], x0, x1))
        for axis, count, low, high in axes:
            centres = np.arange(count) + 0.5
            at = self.matrix[axis, axis] * centres + self.matrix[axis, 2]
            wide = max(1.0, abs(self.matrix[axis, axis]))
            weights.append(_weights(at, wide, low, high, self.image.shape[1 - axis], self))
            share = np.ones(count)
            for f in self.frames:
                p = f.matrix[axis, axis] * centres + f.matrix[axis, 2]
                share *= _inside(p, (f.width, f.height)[axis], soft)
            cover.append(share)
        image = np.einsum("yi,ijc->yjc", weights[0], self.image)
        # As Pillow and torchvision, which also keep what one direction makes in bytes.
        image = image.clip(0, 255) if self.interpolation == s.BICUBIC else image
        image = np.einsum("xj,yjc->yxc", weights[1], image)
        image = image.clip(0, 255) if self.interpolation == s.BICUBIC else image
        return image, np.outer(cover[0], cover[1])

    def _through_the_map(self) -> tuple[Floats, Floats]:
        height, width = self.size
        v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
        points = np.stack((u, v, np.ones_like(u)), -1)
        x0, y0, x1, y1 = self.cut
        inset = 0.0 if self.interpolation == s.NEAREST else 0.5
        x, y = _project(self.matrix, points)
        x, y = x.clip(x0 + inset, x1 - 0.5), y.clip(y0 + inset, y1 - 0.5)
        if self.interpolation == s.NEAREST:
            image = self.image[y.astype(np.int64), x.astype(np.int64)]
        else:
            wide = _shrink(self.matrix, self.size)
            wide = wide if wide > 1 + 1e-6 else 1.0
            image = self._filtered(x, y, wide)
        soft = self.interpolation != s.NEAREST
        cover = np.ones((height, width))
        for f in self.frames:
            px, py = _project(f.matrix, points)
            cover *= _inside(px, f.width, soft) * _inside(py, f.height, soft)
        return image, cover

    def _filtered(self, x: Floats, y: Floats, wide: float) -> Floats:
        x0, y0, x1, y1 = self.cut
        columns = list(_window(x, wide, x0, x1, self.interpolation))
        total = np.zeros((*x.shape, self.image.shape[2]))
        for row, weight_y in _window(y, wide, y0, y1, self.interpolation):
            for column, weight_x in columns:
                total += (weight_x * weight_y)[..., None] * self.image[row, column]
        return total.clip(0, 255) if self.interpolation == s.BICUBIC else total


def _whole_pixels(m: Floats) -> bool:
    """Whether the map only crops, pads and flips."""
    scales = abs(m[0, 0]) == 1 and abs(m[1, 1]) == 1
    return bool(_aligned(m) and scales and m[0, 2] % 1 == 0 and m[1, 2] % 1 == 0)


def _aligned(m: Floats) -> bool:
    return bool(max(abs(m[0, 1]), abs(m[1, 0])) < 1e-9 and m[2, 0] == 0 and m[2, 1] == 0)


def _shrink(m: Floats, size: Any) -> float:
    """How far a map shrinks in the middle of its output, in the mean of both directions; at least
    1: the root of the determinant of its derivative."""
    u, v, w = (float(x) for x in m @ np.asarray([size[1] / 2, size[0] / 2, 1]))
    derivative = (m[:2, :2] - np.outer((u / w, v / w), m[2, :2])) / w
    shrunk: float = abs(float(np.linalg.det(derivative))) ** 0.5
    return max(1.0, shrunk)


def _shrink_along(m: Floats, size: Any) -> float:
    """How far a map shrinks the axis that it shrinks most, if it does not turn."""
    both = _shrink(m, size)
    return max(both, abs(float(m[0, 0])), abs(float(m[1, 1]))) if _aligned(m) else both


def _project(m: Floats, points: Floats) -> tuple[Floats, Floats]:
    p = points @ m.T
    if m[2, 0] == 0 and m[2, 1] == 0:
        return p[..., 0], p[..., 1]
    seen = p[..., 2] > 1e-6
    w = np.where(seen, p[..., 2], 1)
    return np.where(seen, p[..., 0] / w, -1e9), np.where(seen, p[..., 1] / w, -1e9)


def _inside(p: Floats, size: float, soft: bool) -> Floats:
    """The share of a pixel at p that is inside of [0, size)."""
    if soft:
        share: Floats = (p + 0.5).clip(0, 1) * (size - p + 0.5).clip(0, 1)
        return share
    return ((p >= 0) & (p < size)).astype(np.float64)


def _filter(x: Floats, interpolation: int) -> Floats:
    x = abs(x)
    if interpolation == s.BILINEAR:
        return (1 - x).clip(0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _weights(at: Floats, wide: float, low: int, high: int, size: int, state: _State) -> Floats:
    """(outputs, size): the weights of an axis, its filter cut off where the source ends."""
    pixels = np.arange(size)
    if state.interpolation == s.NEAREST:
        nearest: Floats = (np.floor(at).clip(low, high - 1)[:, None] == pixels).astype(np.float64)
        return nearest
    at = at.clip(low, high)[:, None]
    weights = _filter((pixels + 0.5 - at) / wide, state.interpolation)
    weights[:, (pixels < low) | (pixels >= high)] = 0
    normalized: Floats = weights / weights.sum(1, keepdims=True)
    return normalized


def _window(at: Floats, wide: float, low: int, high: int, interpolation: int) -> Any:
    """Pairs (index, weight) of arrays: the filter at each point, cut off where the source ends."""
    reach = wide * (2 if interpolation == s.BICUBIC else 1)
    first = np.floor(at - reach + 0.5).astype(np.int64)
    taps = [first + k for k in range(int(np.ceil(2 * reach)) + 1)]
    weights = [
        np.where((i >= low) & (i < high), _filter((i + 0.5 - at) / wide, interpolation), 0.0)
        for i in taps
    ]
    total = sum(weights)
    for i, weight in zip(taps, weights, strict=True):
        yield i.clip(low, high - 1), weight / total


# ------------------------------------------------------------------------------------- colours


def _gray(x: Floats) -> Floats:
    return x[..., 0] if x.shape[2] == 1 else x @ np.array([0.2989, 0.587, 0.114])


def _affine(state: _State, p: Floats) -> Floats:
    channels = state.image.shape[2]
    x = state.image * p[:channels] + p[3 : 3 + channels]
    return x.clip(0, 255) if p[6] else x


def _blend(x: Floats, other: Any, factor: float) -> Floats:
    mixed: Floats = (factor * x + (1 - factor) * other).clip(0, 255)
    return mixed


def _saturation(state: _State, p: Floats) -> Floats:
    if state.image.shape[2] == 1:
        return state.image
    return _blend(state.image, _gray(state.image)[..., None], p[0])


def _contrast(state: _State, p: Floats) -> Floats:
    return _blend(state.image, _gray(state.image).mean(), p[0])


def _hue(state: _State, p: Floats) -> Floats:
    if state.image.shape[2] == 1:
        return state.image
    r, g, b = np.moveaxis(state.image, -1, 0)
    high = np.maximum(np.maximum(r, g), b)
    chroma = high - np.minimum(np.minimum(r, g), b)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [high == r, high == g], [(g - b) / safe, (b - r) / safe + 2], (r - g) / safe + 4
    )
    hue = (hue + p[0]) % 6
    shares = []
    for n in (5, 3, 1):
        k = (n + hue) % 6
        shares.append(high - chroma * np.minimum(k, 4 - k).clip(0, 1))
    return np.stack(shares, -1)


def _solarize(state: _State, p: Floats) -> Floats:
    return np.where(state.image >= p[0], 255 - state.image, state.image)


def _posterize(state: _State, p: Floats) -> Floats:
    x: Floats = np.floor(state.image.round() / p[0]) * p[0]
    return x


def _gamma(state: _State, p: Floats) -> Floats:
    x: Floats = (255 * p[1] * (state.image / 255) ** p[0]).clip(0, 255)
    return x


def _autocontrast(state: _State, p: Floats) -> Floats:
    low, high = state.image.min((0, 1)), state.image.max((0, 1))
    scale = np.where(high > low, 255 / np.where(high > low, high - low, 1), 1)
    x: Floats = ((state.image - np.where(high > low, low, 0)) * scale).clip(0, 255)
    return x


def _equalize(state: _State, p: Floats) -> Floats:
    out = np.empty_like(state.image)
    for c in range(out.shape[2]):
        values = state.image[..., c].round().astype(np.int64)
        counts = np.bincount(values.reshape(-1), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.cumsum(counts) - counts
        table = (below + step // 2) // step if step else np.arange(256)
        out[..., c] = table.clip(0, 255)[values]
    return out


def _sharpness(state: _State, p: Floats) -> Floats:
    x = state.image
    height, width = x.shape[:2]
    if height <= 2 or width <= 2:
        return x
    around = sum(x[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    smooth = (around + 4 * x[1:-1, 1:-1]) / 13
    out = x.copy()
    out[1:-1, 1:-1] = _blend(x[1:-1, 1:-1], smooth, p[0])
    return out


def _blur(state: _State, p: Floats) -> Floats:
    x = state.image
    for axis, taps, sigma in ((1, int(p[0]), p[1]), (0, int(p[2]), p[3])):
        weights = np.exp(-0.5 * ((np.arange(taps) - (taps - 1) / 2) / sigma) ** 2)
        weights /= weights.sum()
        pad = [(taps // 2, taps // 2) if axis == a else (0, 0) for a in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, pad, "reflect"), taps, axis)
        x = windows @ weights
    return x


def _noise(state: _State, p: Floats) -> Floats:
    height, width, channels = state.image.shape
    numbers = normal_numbers(state.place, state.seed, int(p[3]), state.image.size)
    noise = numbers.reshape(channels, height, width).transpose(1, 2, 0)
    x = state.image + p[0] + p[1] * noise
    noisy: Floats = x.clip(0, 255) if p[2] else x
    return noisy


def _erase(state: _State, p: Floats) -> Floats:
    out = state.image.copy()
    top, left, bottom, right = (int(x) for x in p[:4])
    out[top:bottom, left:right] = p[4 : 4 + out.shape[2]]
    return out


def _mix_begin(state: _State, p: Floats) -> Floats:
    state.kept, state.mixed = state.image, np.zeros_like(state.image)
    return state.image


def _mix_add(state: _State, p: Floats) -> Floats:
    state.mixed = state.mixed + p[0] * state.image
    state.image = state.kept
    state._start()
    return state.kept


def _mix_end(state: _State, p: Floats) -> Floats:
    x: Floats = (1 - p[0]) * state.image + p[0] * state.mixed
    return x


_STEPS = {
    s.AFFINE: _affine,
    s.SATURATION: _saturation,
    s.HUE: _hue,
    s.SOLARIZE: _solarize,
    s.POSTERIZE: _posterize,
    s.GAMMA: _gamma,
    s.CONTRAST: _contrast,
    s.AUTOCONTRAST: _autocontrast,
    s.EQUALIZE: _equalize,
    s.SHARPNESS: _sharpness,
    s.BLUR: _blur,
    s.NOISE: _noise,
    s.ERASE: _erase,
    s.MIX_BEGIN: _mix_begin,
    s.MIX_ADD: _mix_add,
    s.MIX_END: _mix_end,
}
