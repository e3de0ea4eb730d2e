"""What follows an image's geometry: masks, boxes and keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsmith_kernels.augment.steps import GEOMETRY, NEAREST, NOTHING, Floats, identity


def geometry_only(ops: Any, parameters: Floats) -> tuple[Any, Floats]:
    """The steps for a mask: geometry alone, nearest, with 0 outside."""
    parameters = parameters.copy()
    parameters[..., 11] = NEAREST
    parameters[..., 13:16] = 0
    return np.where(ops == GEOMETRY, ops, NOTHING).astype(np.int32), parameters


def forward_maps(ops: Any, parameters: Floats) -> Floats:
    """(B, 3, 3): a point of the input -> the point of the output."""
    total = identity(len(ops))
    for k in range(ops.shape[1]):
        moved = ops[:, k] == GEOMETRY
        step = np.where(moved[:, None, None], parameters[:, k, :9].reshape(-1, 3, 3), np.eye(3))
        total = total @ step
    return np.linalg.inv(total).astype(np.float64)


def moved_points(points: Sequence[Tensor], maps: Floats) -> list[Tensor]:
    """Keypoints (N, 2), x and y, of each image."""
    return [_project(p, m) for p, m in zip(points, maps, strict=True)]


def moved_boxes(boxes: Sequence[Tensor], maps: Floats, height: Any, width: Any) -> list[Tensor]:
    """Boxes (N, 4), x1 y1 x2 y2: those around their moved corners, cut off at the image's edge."""
    out = []
    for box, m, h, w in zip(boxes, maps, height.tolist(), width.tolist(), strict=True):
        corners = box[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
        corners = _project(corners, m).reshape(-1, 4, 2)
        low, high = corners.amin(1), corners.amax(1)
        around = torch.cat((low, high), 1)
        out.append(torch.minimum(around.clamp(min=0), around.new_tensor([w, h, w, h])))
    return out


def checked(name: str, values: Any, images: int, last: int) -> list[Tensor]:
    """A list with one (N, last) tensor of numbers an image."""
    if not isinstance(values, Sequence) or len(values) != images:
        raise ValueError(f"augment: {name} must be a list of {images} tensors, one an image")
    for i, value in enumerate(values):
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != last:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"augment: {name}[{i}] must be a tensor (N, {last}), not {found}")
    return list(values)


def _project(points: Tensor, m: Floats) -> Tensor:
    p = torch.cat((points.double(), torch.ones(len(points), 1, dtype=torch.float64)), 1)
    p = p @ torch.from_numpy(m).T
    kind = points.dtype if points.is_floating_point() else torch.float32
    return (p[:, :2] / p[:, 2:]).to(kind)
