"""Batch transforms: MixUp (arXiv 1710.09412) and CutMix (1905.04899), on images and labels.

Neighbours are mixed: the images at places 2j and 2j + 1 of the run, which must lie side by side in
the batch. So the result does not depend on how the run is cut into batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradsmith_kernels.augment.random import gamma_numbers, gamma_uniforms, uniform_numbers
from gradsmith_kernels.augment.transform import below, number, whole
from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.native import DTYPE_CODES

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STREAM = (1 << 31) - 1  # no transform of a chain has this number
OP = Op(
    "augment",
    {
        "reference": Implementation("gradsmith_kernels.augment.mixing", (*_FLOATS, torch.uint8)),
        "cpu": Implementation("gradsmith_kernels.augment.mixing", (*_FLOATS, torch.uint8)),
    },
)
Floats = npt.NDArray[np.float64]


class _Mix(ABC):
    """mix(images, labels, seed=...) -> (images, labels); the images are changed in place."""

    dtypes: tuple[torch.dtype, ...]

    def __init__(self, *, alpha: float = 1.0, num_classes: int | None = None) -> None:
        self.alpha = float(number(type(self).__name__, "alpha", alpha, 1e-3))
        self.num_classes = num_classes
        if num_classes is not None:
            whole(type(self).__name__, "num_classes", num_classes)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int,
        places: Any = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mixes a batch in place.

        Args:
            images: (B, C, H, W), contiguous, B even: what a pipeline has made.
            labels: (B,) class numbers, for which `num_classes` must be set; or (B, K) shares.
            seed, places: as those of the pipeline; places must be 2j, 2j + 1, 2k, 2k + 1, ...

        Returns:
            The images, and labels (B, K) float32, mixed alike.
        """
        owner = type(self).__name__
        if images.dim() != 4 or len(images) % 2 or not images.is_contiguous():
            raise ValueError(
                f"{owner}: images must be (B, C, H, W), contiguous, B even; not "
                f"{tuple(images.shape)}{'' if images.is_contiguous() else ', not contiguous'}"
            )
        if images.dtype not in self.dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            raise ValueError(f"{owner}: images must be of {allowed}, not {images.dtype}")
        shares = self._shares(labels, len(images))
        if not len(images):
            return images, shares
        pairs = _pairs(owner, places, len(images))
        u = uniform_numbers(pairs, seed, _STREAM, 2 * gamma_uniforms() + 2)
        first = gamma_numbers(u[:, : gamma_uniforms()], self.alpha)
        second = gamma_numbers(u[:, gamma_uniforms() : 2 * gamma_uniforms()], self.alpha)
        keep = self._mix(
            images,
            first / (first + second),
            u[:, -2:],
            OP.resolve(backend, images.device.type, images.dtype),
        )
        weight = torch.from_numpy(keep).float().to(shares.device)[:, None, None]
        pair = shares.view(-1, 2, shares.shape[1])
        return images, (weight * pair + (1 - weight) * pair.flip(1)).view_as(shares)

    def _shares(self, labels: Tensor, images: int) -> Tensor:
        owner = type(self).__name__
        if labels.dim() == 2 and len(labels) == images:
            return labels.float()
        if labels.dim() != 1 or len(labels) != images or labels.is_floating_point():
            raise ValueError(
                f"{owner}: labels must be ({images},) class numbers or ({images}, classes), not "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        if self.num_classes is None:
            raise ValueError(f"{owner}: class numbers need num_classes")
        if images and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"{owner}: labels must be from 0 to {self.num_classes - 1}; they are from "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        return torch.nn.functional.one_hot(labels.long(), self.num_classes).float()

    @abstractmethod
    def _mix(self, images: Tensor, keep: Floats, u: Floats, backend: str) -> Floats:
        """Mixes the pairs; returns what share of itself each image has kept."""


def _pairs(owner: str, places: Any, images: int) -> Any:
    """The places of the first of each pair."""
    at = np.arange(images) if places is None else np.asarray(places)
    first, second = at[0::2], at[1::2]
    if at.shape != (images,) or (first % 2).any() or (second != first + 1).any():
        raise ValueError(
            f"{owner}: places must be pairs 2j, 2j + 1 side by side, for {images} images; they are "
            f"{at.tolist() if at.size <= 8 else [*at[:8].tolist(), '...']}"
        )
    return first.astype(np.uint64)


class MixUp(_Mix):
    """keep * image + (1 - keep) * neighbour, with keep of Beta(alpha, alpha), one for a pair."""

    dtypes = _FLOATS

    def _mix(self, images: Tensor, keep: Floats, u: Floats, backend: str) -> Floats:
        if backend == "cpu":
            from gradsmith_kernels import _native

            weights = np.ascontiguousarray(keep, np.float32)
            _native.augment_mix_pairs(
                images.data_ptr(),
                len(keep),
                images[0].numel(),
                DTYPE_CODES[images.dtype],
                weights.ctypes.data,
                torch.get_num_threads(),
            )
            return keep
        pair = images.view(-1, 2, *images.shape[1:])
        weight = torch.from_numpy(keep).to(images.device).view(-1, 1, 1, 1, 1)
        images.copy_((weight * pair + (1 - weight) * pair.flip(1)).view_as(images))
        return keep


class CutMix(_Mix):
    """Neighbours exchange a box that covers a share 1 - keep, keep of Beta(alpha, alpha), around a
    point drawn anywhere; the labels follow what is left of it within the image."""

    dtypes = (*_FLOATS, torch.uint8)

    def _mix(self, images: Tensor, keep: Floats, u: Floats, backend: str) -> Floats:
        height, width = images.shape[2:]
        half = 0.5 * np.sqrt(1 - keep)
        x, y = below(u[:, 0], width), below(u[:, 1], height)
        rw, rh = np.trunc(half * width), np.trunc(half * height)
        boxes = np.stack(
            (
                (y - rh).clip(0, height),
                (x - rw).clip(0, width),
                (y + rh).clip(0, height),
                (x + rw).clip(0, width),
            ),
            -1,
        ).astype(np.int64)
        if backend == "cpu":
            from gradsmith_kernels import _native

            boxes = np.ascontiguousarray(boxes)
            _native.augment_swap_boxes(
                images.data_ptr(),
                (len(images), images.shape[1], height, width),
                images.element_size(),
                boxes.ctypes.data,
                torch.get_num_threads(),
            )
        else:
            for j, (top, left, bottom, right) in enumerate(boxes.tolist()):
                pair = images[2 * j : 2 * j + 2, :, top:bottom, left:right]
                pair.copy_(pair.flip(0))
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return 1 - area / float(height * width)
