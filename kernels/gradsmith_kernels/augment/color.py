"""Transforms that change colours. Names, arguments and ranges are torchvision.transforms.v2's
(RandomGamma is albumentations' name: torchvision has a function only). Pixels are 0 to 255.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradsmith_kernels.augment import steps
from gradsmith_kernels.augment.random import NOISE_STREAMS
from gradsmith_kernels.augment.steps import Program
from gradsmith_kernels.augment.transform import (
    Transform,
    around,
    below,
    between,
    interval,
    number,
    probability,
    three,
    whole,
)


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue, each by a factor drawn for each image, in an order
    drawn for each image. One number x is the interval [max(0, 1 - x), 1 + x], for hue [-x, x]."""

    kind = "statistic"
    names_of_settings = ("brightness", "contrast", "saturation", "hue")

    def __init__(
        self, brightness: Any = None, contrast: Any = None, saturation: Any = None, hue: Any = None
    ) -> None:
        owner = "ColorJitter"
        self.brightness = _factor(owner, "brightness", brightness)
        self.contrast = _factor(owner, "contrast", contrast)
        self.saturation = _factor(owner, "saturation", saturation)
        self.hue = None
        if hue:
            first, last = around(owner, "hue", hue)
            self.hue = interval(owner, "hue", (first, last), -0.5, 0.5)
        if self.contrast is None:
            self.kind = "pixel"

    def add_to(self, program: Program) -> None:
        u = program.uniform(8)
        kinds = [
            (steps.AFFINE, self.brightness),
            (steps.CONTRAST, self.contrast),
            (steps.SATURATION, self.saturation),
            (steps.HUE, self.hue),
        ]
        present = [k for k, (_, ranges) in enumerate(kinds) if ranges is not None]
        order = u[:, present].argsort(1)
        for turn in range(len(present)):
            which = np.asarray(present)[order[:, turn]]
            ops = np.asarray([op for op, _ in kinds], np.int32)[which]
            factors = np.zeros(program.images)
            for k in present:
                drawn = between(u[:, 4 + k], *kinds[k][1])  # type: ignore[misc]
                factors = np.where(
                    which == k, 6 * drawn if kinds[k][0] == steps.HUE else drawn, factors
                )
            program.add(ops, factors, factors, factors, 0, 0, 0, 1)


def _factor(owner: str, name: str, value: Any) -> tuple[float, float] | None:
    if value is None or value == 0:
        return None
    return around(owner, name, value, 1.0, 0.0)


class _Sometimes(Transform):
    """One step with probability p."""

    kind = "pixel"
    names_of_settings: tuple[str, ...] = ("p",)

    def __init__(self, p: float) -> None:
        self.p = probability(type(self).__name__, p)

    @abstractmethod
    def step(self) -> tuple[Any, ...]:
        """The op and its parameters."""

    def add_to(self, program: Program) -> None:
        where = program.uniform(1)[:, 0] < self.p
        op, *numbers = self.step()
        program.add(op, *numbers, where=where)


class RandomGrayscale(_Sometimes):
    """The luma in every channel, with probability p."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__(p)

    def step(self) -> tuple[Any, ...]:
        return (steps.SATURATION, 0.0)


class Grayscale(RandomGrayscale):
    """The luma in every channel; the number of channels stays."""

    def __init__(self, num_output_channels: int = 3) -> None:
        if num_output_channels != 3:
            raise ValueError(
                f"Grayscale: num_output_channels must be 3, not {num_output_channels!r}: "
                "take one of the three, which are equal"
            )
        super().__init__(1.0)


class RandomInvert(_Sometimes):
    """255 - x, with probability p."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def step(self) -> tuple[Any, ...]:
        return (steps.AFFINE, -1, -1, -1, 255, 255, 255, 1)


class RandomPosterize(_Sometimes):
    """The highest `bits` bits of each pixel, with probability p."""

    names_of_settings = ("bits", "p")

    def __init__(self, bits: int, p: float = 0.5) -> None:
        super().__init__(p)
        self.bits = whole("RandomPosterize", "bits", bits, 0)
        number("RandomPosterize", "bits", bits, 0, 8)

    def step(self) -> tuple[Any, ...]:
        return (steps.POSTERIZE, 2.0 ** (8 - self.bits))


class RandomSolarize(_Sometimes):
    """Inverts what is at least `threshold` (0 to 255), with probability p."""

    names_of_settings = ("threshold", "p")

    def __init__(self, threshold: float, p: float = 0.5) -> None:
        super().__init__(p)
        self.threshold = float(number("RandomSolarize", "threshold", threshold, 0, 255))

    def step(self) -> tuple[Any, ...]:
        return (steps.SOLARIZE, self.threshold)


class RandomAutocontrast(_Sometimes):
    """Stretches each channel to 0 to 255, with probability p."""

    kind = "statistic"

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def step(self) -> tuple[Any, ...]:
        return (steps.AUTOCONTRAST,)


class RandomEqualize(RandomAutocontrast):
    """Makes each channel's histogram flat, with probability p."""

    def step(self) -> tuple[Any, ...]:
        return (steps.EQUALIZE,)


class RandomAdjustSharpness(_Sometimes):
    """Away from (factor above 1) or towards its blurred self, with probability p."""

    kind = "neighbourhood"
    names_of_settings = ("sharpness_factor", "p")

    def __init__(self, sharpness_factor: float, p: float = 0.5) -> None:
        super().__init__(p)
        self.sharpness_factor = float(
            number("RandomAdjustSharpness", "sharpness_factor", sharpness_factor, 0)
        )

    def step(self) -> tuple[Any, ...]:
        return (steps.SHARPNESS, self.sharpness_factor)


class RandomGamma(Transform):
    """255 * gain * (x / 255)^gamma, gamma drawn from an interval, with probability p."""

    kind = "pixel"
    names_of_settings = ("gamma", "gain", "p")

    def __init__(self, gamma: Any = (0.8, 1.25), gain: float = 1.0, p: float = 0.5) -> None:
        self.gamma = interval("RandomGamma", "gamma", gamma, 0)
        self.gain = float(number("RandomGamma", "gain", gain, 0))
        self.p = probability("RandomGamma", p)

    def add_to(self, program: Program) -> None:
        u = program.uniform(2)
        gamma = between(u[:, 0], *self.gamma)
        program.add(steps.GAMMA, gamma, self.gain, where=u[:, 1] < self.p)


class GaussianBlur(Transform):
    """kernel_size: odd, one number or (width, height). sigma: one number, or an interval to draw
    from. The image goes on mirrored at its edges, without them."""

    kind = "neighbourhood"
    names_of_settings = ("kernel_size", "sigma")

    def __init__(self, kernel_size: Any, sigma: Any = (0.1, 2.0)) -> None:
        owner = "GaussianBlur"
        sizes = list(kernel_size) if isinstance(kernel_size, Sequence) else [kernel_size] * 2
        for size in sizes:
            if whole(owner, "kernel_size", size) % 2 == 0:
                raise ValueError(f"{owner}: kernel_size must be odd, not {kernel_size!r}")
        if len(sizes) != 2:
            raise ValueError(f"{owner}: kernel_size must be one number or two, not {kernel_size!r}")
        self.kernel_size = (sizes[0], sizes[1])
        interval_of = sigma if isinstance(sigma, Sequence) else (sigma, sigma)
        self.sigma = interval(owner, "sigma", interval_of, 1e-3)

    def add_to(self, program: Program) -> None:
        across, down = self.kernel_size
        small = (program.width <= across // 2) | (program.height <= down // 2)
        if small.any():
            i = int(np.flatnonzero(small)[0])
            raise ValueError(
                f"GaussianBlur: image {i} is {program.height[i]} x {program.width[i]} here, too "
                f"small to be mirrored for a kernel of {across} x {down} (width x height)"
            )
        sigma = between(program.uniform(1)[:, 0], *self.sigma)
        program.add(steps.BLUR, across, sigma, down, sigma)


class GaussianNoise(Transform):
    """Adds normal noise, in units of the whole range: x + 255 * (mean + sigma * n)."""

    kind = "pixel"
    names_of_settings = ("mean", "sigma")

    def __init__(self, mean: float = 0.0, sigma: float = 0.1, clip: bool = True) -> None:
        self.mean = float(number("GaussianNoise", "mean", mean))
        self.sigma = float(number("GaussianNoise", "sigma", sigma, 0))
        self.clip = clip

    def add_to(self, program: Program) -> None:
        program.uniform(1)
        stream = NOISE_STREAMS + program.stream
        program.add(steps.NOISE, 255 * self.mean, 255 * self.sigma, self.clip, stream)


class RandomErasing(Transform):
    """A box with a share `scale` of the area becomes `value`, with probability p; none does if ten
    boxes in a row do not fit. value: one number or three, 0 to 255, or after Normalize in its
    units."""

    kind = "pixel"
    names_of_settings = ("p", "scale")
    tries = 10

    def __init__(
        self, p: float = 0.5, scale: Any = (0.02, 0.33), ratio: Any = (0.3, 3.3), value: Any = 0.0
    ) -> None:
        owner = "RandomErasing"
        self.p = probability(owner, p)
        self.scale = interval(owner, "scale", scale, 0, 1)
        self.ratio = interval(owner, "ratio", ratio, 1e-3, 1e3)
        if isinstance(value, str):
            raise ValueError(f"{owner}: value must be one number or three, not {value!r}")
        self.value = three(owner, "value", value)

    def add_to(self, program: Program) -> None:
        u = program.uniform(2 * self.tries + 3)
        h, w = program.height[:, None], program.width[:, None]
        area = h * w * between(u[:, : self.tries], *self.scale)
        logs = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        aspect = np.exp(between(u[:, self.tries : 2 * self.tries], *logs))
        high, wide = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
        fits = (high < h) & (wide < w)
        first = (np.arange(program.images), fits.argmax(1))
        high, wide = high[first], wide[first]
        top = below(u[:, -3], np.maximum(1, program.height - high + 1))
        left = below(u[:, -2], np.maximum(1, program.width - wide + 1))
        where = (u[:, -1] < self.p) & fits.any(1)
        program.add(steps.ERASE, top, left, top + high, left + wide, *self.value, where=where)


class Normalize(Transform):
    """(x / 255 - mean) / std for each channel."""

    kind = "pixel"
    names_of_settings = ("mean", "std")

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean = three("Normalize", "mean", mean)
        self.std = three("Normalize", "std", std)
        for value in self.std:
            if value <= 0:
                raise ValueError(f"Normalize: std must be above 0, not {std!r}")

    def add_to(self, program: Program) -> None:
        scale = [1 / (255 * std) for std in self.std]
        bias = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        program.add(steps.AFFINE, *scale, *bias, 0)
