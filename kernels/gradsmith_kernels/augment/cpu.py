"""The C++ kernels: hands a batch of images and its steps to the native module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.augment.random import normal_quantiles
from gradsmith_kernels.augment.steps import NOISE, Floats
from gradsmith_kernels.ops.common.native import DTYPE_CODES


def run(
    images: Tensor | Sequence[Tensor],
    ops: Any,
    parameters: Floats,
    outputs: Tensor | Sequence[Tensor],
    seed: int,
    places: Any,
) -> None:
    """Fills the outputs, (C, H, W) and contiguous each, from the images, (H, W, C) each."""
    sources = _described(images)
    if isinstance(outputs, Tensor):
        step = outputs.stride(0) * outputs.element_size() if len(outputs) else 0
        addresses = outputs.data_ptr() + step * np.arange(len(outputs), dtype=np.int64)
    else:
        addresses = np.asarray([out.data_ptr() for out in outputs], np.int64)
    noisy = (ops == NOISE).any()
    _native.augment(
        sources.ctypes.data,
        ops.ctypes.data,
        parameters.ctypes.data,
        addresses.ctypes.data,
        (*ops.shape, images[0].shape[2]),
        DTYPE_CODES[outputs[0].dtype],
        seed,
        places.ctypes.data,
        normal_quantiles().ctypes.data if noisy else 0,
        torch.get_num_threads(),
    )


def _described(images: Tensor | Sequence[Tensor]) -> Any:
    """(B, 6): address, height, width, strides of row, pixel and channel."""
    if isinstance(images, Tensor):
        described = np.empty((len(images), 6), np.int64)
        described[:, 0] = images.data_ptr() + images.stride(0) * np.arange(len(images))
        described[:, 1:] = (*images.shape[1:3], *images.stride()[1:])
        return described
    return np.asarray([(i.data_ptr(), *i.shape[:2], *i.stride()) for i in images], np.int64)
