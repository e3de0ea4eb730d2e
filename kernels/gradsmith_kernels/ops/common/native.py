"""What every cpu backend needs to hand tensors to the native module."""

from __future__ import annotations

import torch
from torch import Tensor

# The codes of csrc/common/dtype.h; uint8 is a state of csrc/optimizer_step.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` (not empty) as rows of its last dimension, and the row stride in elements.

    A view where the strides allow it (any row stride, elements of a row adjacent), else a copy.
    The caller keeps the tensor alive for as long as its address is in use.
    """
    cols = x.shape[-1]
    if x.is_contiguous():
        return x, cols
    x = x.reshape(-1, cols)
    if x.stride(1) != 1 and cols != 1:
        x = x.contiguous()
    return x, x.stride(0)


def adjacent(x: Tensor) -> Tensor:
    """`x` with the elements of its last dimension next to each other; copied only where not.

    The caller keeps the tensor alive for as long as its address is in use.
    """
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def shape_as_rows(*tensors: Tensor) -> tuple[int, int]:
    """Rows and columns of tensors of one shape (not empty); one row if none of them has gaps."""
    numel, cols = tensors[0].numel(), tensors[0].shape[-1]
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, numel
    return numel // cols, cols
