"""The tensors that one call steps together, what may be in them, and the numbers of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsmith_kernels.ops.common.tensor_lists import Columns, check_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Options:
    """A step's numbers; see `adafactor_step_`."""

    lr: float
    beta2_decay: float
    eps1: float | None
    eps2: float
    d: float
    weight_decay: float
    l1: float

    def least_root(self, compute: torch.dtype) -> float:
        """eps1 for arithmetic in `compute`."""
        return torch.finfo(compute).eps if self.eps1 is None else self.eps1

    def coefficients(self, t: float) -> tuple[float, float, float, float, float, float, float]:
        """What the float32 kernels are told of step t: the share of the new squares, rho, eps1,
        eps2, d, the decay and the L1 threshold."""
        return (
            t**self.beta2_decay,
            min(self.lr, 1 / math.sqrt(t)),
            self.least_root(torch.float32),
            self.eps2,
            self.d,
            self.lr * self.weight_decay,
            self.lr * self.l1,
        )


@dataclass(frozen=True)
class Tensors(Columns):
    """Columns with an entry for each of params, or empty where the caller has none.

    row_vars, col_vars: the factors of the second moment; the variance and an empty tensor for a
        parameter of fewer than two dimensions.
    masters: float32 weights behind 16-bit params.
    compensations: bfloat16, what rounding took from 16-bit params.
    steps: steps done, one float32 element on the CPU each.
    """

    row_vars: Sequence[Tensor]
    col_vars: Sequence[Tensor]
    masters: Sequence[Tensor]
    compensations: Sequence[Tensor]
    steps: Sequence[Tensor]


def factor_shapes(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of row_var (or the variance) and col_var (or nothing) for a parameter's."""
    if len(shape) < 2:
        return tuple(shape), (0,)
    return (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])


def matrices_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """Matrices, rows, columns; a parameter of fewer than two dimensions is a row."""
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def check(tensors: Tensors, grads: Sequence[Tensor]) -> None:
    """
    Raises:
        ValueError: numbers of tensors, shapes or devices do not fit.
        TypeError: a dtype is not one that is taken.
    """
    count = len(tensors.params)
    lengths = {"grads": len(grads)}
    lengths |= {name: len(getattr(tensors, name)) for name in ("row_vars", "col_vars", "steps")}
    if set(lengths.values()) != {count}:
        raise ValueError(f"adafactor_step_: {count} params need as many of each; got {lengths}")
    for name in ("masters", "compensations"):
        if len(getattr(tensors, name)) not in (0, count):
            raise ValueError(
                f"adafactor_step_: {name} has {len(getattr(tensors, name))} tensors for {count} "
                f"params; allowed are 0 and {count}"
            )
    if tensors.masters and tensors.compensations:
        raise ValueError("adafactor_step_: give masters or compensations, not both")
    for i, grad in enumerate(grads):
        _check_one(tensors, i, grad)


def _check_one(tensors: Tensors, i: int, g: Tensor) -> None:
    """Raises TypeError or ValueError for what does not fit about params[i] and its gradient g."""
    p = tensors.params[i]
    what = f"adafactor_step_: params[{i}]"
    float64 = p.dtype == torch.float64
    allowed = (torch.float64,) if float64 else DTYPES
    if p.dtype not in allowed or g.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(
            f"{what} is {p.dtype} and its gradient {g.dtype}; "
            f"both must be {names} (and float64 does not mix with the others)"
        )
    check_step(what, tensors.steps[i])
    row_shape, col_shape = factor_shapes(p.shape)
    state = torch.float64 if float64 else torch.float32
    wanted = [("grads", g, g.dtype, tuple(p.shape))]
    wanted += [("row_vars", tensors.row_vars[i], state, row_shape)]
    wanted += [("col_vars", tensors.col_vars[i], state, col_shape)]
    for name, dtype in (("masters", torch.float32), ("compensations", torch.bfloat16)):
        if column := getattr(tensors, name):
            wanted.append((name, column[i], dtype, tuple(p.shape)))
            if p.dtype not in (torch.bfloat16, torch.float16):
                raise TypeError(f"{what} is {p.dtype}; {name} are for bfloat16 and float16 params")
    for name, tensor, dtype, shape in wanted:
        if tensor.dtype != dtype:
            raise TypeError(f"{what}: its {name} is {tensor.dtype}; it must be {dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{what} is {tuple(p.shape)} and its {name} {tuple(tensor.shape)}; "
                f"it must be {shape}"
            )
        if not tensor.device == p.device == tensors.params[0].device:
            raise ValueError(
                f"{what} or one of its tensors is on {tensor.device}; all must be on "
                f"{tensors.params[0].device}, like params[0]"
            )
