"""Policies: operations drawn from a list for each image. Lists, magnitudes and arguments are those
of torchvision.transforms.v2, and so are the papers: RandAugment (arXiv 1909.13719),
TrivialAugment (2103.10158), AutoAugment (1805.09501), AugMix (1912.02781).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradsmith_kernels.augment import steps
from gradsmith_kernels.augment.autoaugment_policies import POLICIES
from gradsmith_kernels.augment.geometry import turned
from gradsmith_kernels.augment.random import gamma_numbers, gamma_uniforms
from gradsmith_kernels.augment.steps import FILL, Flags, Floats, Program
from gradsmith_kernels.augment.transform import (
    Transform,
    below,
    interpolation_code,
    number,
    three,
    whole,
)

# Magnitude of an operation at a level from 0 to 1, and whether it goes both ways.
Magnitude = Callable[[Floats, Program], Any]
Space = Mapping[str, tuple[Magnitude, bool]]


def _up_to(most: float) -> Magnitude:
    return lambda level, program: most * level


def _space(
    shear: float,
    translate_x: Magnitude,
    translate_y: Magnitude,
    rotate: float,
    factor: float,
    bits: tuple[int, int],
) -> dict[str, tuple[Magnitude, bool]]:
    return {
        "ShearX": (_up_to(shear), True),
        "ShearY": (_up_to(shear), True),
        "TranslateX": (translate_x, True),
        "TranslateY": (translate_y, True),
        "Rotate": (_up_to(rotate), True),
        "Brightness": (_up_to(factor), True),
        "Color": (_up_to(factor), True),
        "Contrast": (_up_to(factor), True),
        "Sharpness": (_up_to(factor), True),
        "Posterize": (lambda level, program: np.round(bits[0] - bits[1] * level), False),
        "Solarize": (lambda level, program: 1 - level, False),
        "AutoContrast": (_up_to(0), False),
        "Equalize": (_up_to(0), False),
    }


def _share_of_width(share: float) -> Magnitude:
    return lambda level, program: share * program.width * level


def _share_of_height(share: float) -> Magnitude:
    return lambda level, program: share * program.height * level


_SHARE = 150 / 331
_STANDARD = _space(0.3, _share_of_width(_SHARE), _share_of_height(_SHARE), 30, 0.9, (8, 4))
_WIDE = _space(0.99, _up_to(32), _up_to(32), 135, 0.99, (8, 6))
_MIX = _space(0.3, _share_of_width(1 / 3), _share_of_height(1 / 3), 30, 0.9, (4, 4))
_IDENTITY = {"Identity": (_up_to(0), False)}
_TURNS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class _Policy(Transform):
    kind = "mixed"

    def __init__(self, interpolation: Any, fill: Any) -> None:
        self.interpolation = interpolation_code(type(self).__name__, interpolation)
        self.fill = three(type(self).__name__, "fill", fill)

    def _apply(
        self,
        program: Program,
        space: Space,
        which: Any,
        level: Floats,
        sign: Floats,
        where: Flags | None = None,
    ) -> None:
        """One operation for each image: which (B,) of the space, level (B,) from 0 to 1; sign (B,)
        uniform: below a half turns a signed one around."""
        here = np.ones(program.images, bool) if where is None else where
        names = np.asarray(list(space))[which]
        magnitude = np.zeros(program.images)
        for name, (of_level, signed) in space.items():
            m = of_level(level, program)
            m = np.where(sign < 0.5, -m, m) if signed else m
            magnitude = np.where(names == name, m, magnitude)
        self._turn(program, names, magnitude, here)

        def some(name: str, op: int, *numbers: Any) -> None:
            chosen = here & (names == name)
            ops[chosen] = op
            for k, value in enumerate(numbers):
                parameters[k] = np.where(chosen, value, parameters[k])

        ops = np.zeros(program.images, np.int32)
        parameters = [np.zeros(program.images) for _ in range(7)]
        factor = 1 + magnitude
        some("Brightness", steps.AFFINE, factor, factor, factor, 0, 0, 0, 1)
        some("Color", steps.SATURATION, factor)
        some("Contrast", steps.CONTRAST, factor)
        some("Sharpness", steps.SHARPNESS, factor)
        some("Posterize", steps.POSTERIZE, 2.0 ** (8 - magnitude))
        some("Solarize", steps.SOLARIZE, 255 * magnitude)
        some("AutoContrast", steps.AUTOCONTRAST)
        some("Equalize", steps.EQUALIZE)
        some("Invert", steps.AFFINE, -1, -1, -1, 255, 255, 255, 1)
        program.add(ops, *parameters)

    def _turn(self, program: Program, names: Any, magnitude: Floats, here: Flags) -> None:
        where = here & np.isin(names, _TURNS)
        if not where.any():
            return

        def of(name: str, value: Floats) -> Floats:
            return np.where(names == name, value, 0.0)

        degrees = np.degrees(np.arctan(magnitude))
        sheared = np.isin(names, ("ShearX", "ShearY"))
        matrix = turned(
            program,
            -of("Rotate", magnitude),
            translate=(
                of("TranslateX", np.trunc(magnitude)),
                of("TranslateY", np.trunc(magnitude)),
            ),
            shear=(of("ShearX", degrees), of("ShearY", degrees)),
            center=(
                np.where(sheared, 0, program.width / 2),
                np.where(sheared, 0, program.height / 2),
            ),
        )
        program.add_map(
            matrix, beyond=FILL, interpolation=self.interpolation, fill=self.fill, where=where
        )


class RandAugment(_Policy):
    """`num_ops` operations of the list, one after the other, all at one magnitude."""

    names_of_settings = ("num_ops", "magnitude")
    _SPACE = _IDENTITY | _STANDARD

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: Any = "nearest",
        fill: Any = None,
    ) -> None:
        super().__init__(interpolation, fill)
        self.num_ops = whole("RandAugment", "num_ops", num_ops, 0)
        bins = whole("RandAugment", "num_magnitude_bins", num_magnitude_bins, 2)
        self.magnitude = whole("RandAugment", "magnitude", magnitude, 0)
        number("RandAugment", "magnitude", magnitude, 0, bins - 1)
        self.level = magnitude / (bins - 1)

    def add_to(self, program: Program) -> None:
        u = program.uniform(2 * self.num_ops)
        level = np.full(program.images, self.level)
        for k in range(self.num_ops):
            which = below(u[:, 2 * k], len(self._SPACE)).astype(int)
            self._apply(program, self._SPACE, which, level, u[:, 2 * k + 1])


class TrivialAugmentWide(_Policy):
    """One operation of the list, at a magnitude drawn as well."""

    names_of_settings = ("bins",)
    _SPACE = _IDENTITY | _WIDE

    def __init__(
        self, num_magnitude_bins: int = 31, interpolation: Any = "nearest", fill: Any = None
    ) -> None:
        super().__init__(interpolation, fill)
        self.bins = whole("TrivialAugmentWide", "num_magnitude_bins", num_magnitude_bins, 2)

    def add_to(self, program: Program) -> None:
        u = program.uniform(3)
        which = below(u[:, 0], len(self._SPACE)).astype(int)
        level = below(u[:, 1], self.bins) / (self.bins - 1)
        self._apply(program, self._SPACE, which, level, u[:, 2])


class AutoAugment(_Policy):
    """One of 25 pairs of operations, each with a probability and a magnitude of its own.

    policy: "imagenet", "cifar10" or "svhn", or torchvision's AutoAugmentPolicy.
    """

    names_of_settings = ("policy",)
    _SPACE = _STANDARD | {"Invert": (_up_to(0), False)}

    def __init__(
        self, policy: Any = "imagenet", interpolation: Any = "nearest", fill: Any = None
    ) -> None:
        super().__init__(interpolation, fill)
        self.policy = getattr(policy, "value", policy)
        if self.policy not in POLICIES:
            allowed = ", ".join(POLICIES)
            raise ValueError(f"AutoAugment: policy must be one of {allowed}, not {policy!r}")

    def add_to(self, program: Program) -> None:
        u = program.uniform(5)
        pairs = POLICIES[self.policy]
        drawn = below(u[:, 0], len(pairs)).astype(int)
        names = list(self._SPACE)
        for k in range(2):
            which = np.asarray([names.index(pair[k][0]) for pair in pairs])[drawn]
            p = np.asarray([pair[k][1] for pair in pairs])[drawn]
            level = np.asarray([pair[k][2] for pair in pairs])[drawn] / 9
            self._apply(program, self._SPACE, which, level, u[:, 2 + 2 * k], u[:, 1 + 2 * k] <= p)


class AugMix(_Policy):
    """The image, mixed with `mixture_width` chains of operations on it."""

    names_of_settings = ("severity", "mixture_width", "chain_depth", "alpha")

    def __init__(
        self,
        severity: int = 3,
        mixture_width: int = 3,
        chain_depth: int = -1,
        alpha: float = 1.0,
        all_ops: bool = True,
        interpolation: Any = "bilinear",
        fill: Any = None,
    ) -> None:
        super().__init__(interpolation, fill)
        self.severity = whole("AugMix", "severity", severity)
        number("AugMix", "severity", severity, 1, 10)
        self.mixture_width = whole("AugMix", "mixture_width", mixture_width)
        self.chain_depth = (
            chain_depth if chain_depth == -1 else whole("AugMix", "chain_depth", chain_depth)
        )
        self.alpha = float(number("AugMix", "alpha", alpha, 1e-3))
        factors = ("Brightness", "Color", "Contrast", "Sharpness")
        self.space = {k: v for k, v in _MIX.items() if all_ops or k not in factors}

    def add_to(self, program: Program) -> None:
        deepest = 3 if self.chain_depth == -1 else self.chain_depth
        of_gamma = gamma_uniforms()
        u = program.uniform(
            (2 + self.mixture_width) * of_gamma + self.mixture_width * (1 + 3 * deepest)
        )
        gammas = [
            gamma_numbers(u[:, k * of_gamma : (k + 1) * of_gamma], self.alpha)
            for k in range(2 + self.mixture_width)
        ]
        u = u[:, (2 + self.mixture_width) * of_gamma :]
        share = gammas[1] / (gammas[0] + gammas[1])
        total = sum(gammas[2:])
        program.add(steps.MIX_BEGIN)
        for chain in range(self.mixture_width):
            depth = 1 + below(u[:, 0], 3) if self.chain_depth == -1 else np.full(len(u), deepest)
            for k in range(deepest):
                which = below(u[:, 1 + 3 * k], len(self.space)).astype(int)
                level = below(u[:, 2 + 3 * k], self.severity) / 9
                self._apply(program, self.space, which, level, u[:, 3 + 3 * k], k < depth)
            program.add(steps.MIX_ADD, gammas[2 + chain] / total)
            u = u[:, 1 + 3 * deepest :]
        program.add(steps.MIX_END, share)
