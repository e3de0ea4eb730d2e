"""What norms over the last dimension share: the check of their arguments, and their samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.ops.common.registration import FLOATS

Inputs = dict[str, Any]
_DTYPES = frozenset((*FLOATS, torch.float64))


def check_norm(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """What every norm over the last dimension asks of its arguments."""
    dtype, shape, device = x.dtype, x.shape, x.device
    if dtype not in _DTYPES:
        raise TypeError(_not_a_float(op, "x", dtype))
    if not shape:
        raise ValueError(f"{op}: x is (); it needs a last dimension to normalise over")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            if tensor.dtype not in _DTYPES:
                raise TypeError(_not_a_float(op, name, tensor.dtype))
            if torch.float64 in (dtype, tensor.dtype):
                raise TypeError(f"{op}: float64 does not mix: x is {dtype}, {name} {tensor.dtype}")
        if tensor.shape != shape[-1:]:
            raise ValueError(
                f"{op}: {name} must have the size of x's last dimension: x is {tuple(shape)}, "
                f"{name} is {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: x is on {device}, {name} on {tensor.device}")
    if residual is not None:
        if residual.shape != shape or residual.device != device:
            raise ValueError(
                f"{op}: residual must be like x, which is {tuple(shape)} on {device}; "
                f"it is {tuple(residual.shape)} on {residual.device}"
            )
        if residual.dtype != dtype:
            raise TypeError(f"{op}: residual is {residual.dtype}, x is {dtype}")
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}; it must be > 0")


def _not_a_float(op: str, name: str, dtype: torch.dtype) -> str:
    return f"{op}: {name} is {dtype}; it must be float32, bfloat16, float16 or float64"


# -------------------------------------------------------------------------------------- samples

SHAPES = (
    (1, 1),
    (3, 7),
    (2, 5, 130),
    (33, 100),
    (300, 64),
    (129, 128),
    (6, 4096),
    (5, 9001),  # longer than one Triton block, and no multiple of anything
    (0, 8),
    (4, 0),
)


def in_layout(
    layout: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    mean: float = 0.0,
) -> Tensor:
    """Normal numbers of deviation 1 in a tensor of this shape.

    layout: "contiguous"; "rows" (rows further apart than they are long); "columns" (elements of a
    row not adjacent); "heads" (a transposed view of four dimensions).
    """

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) + mean).to(dtype).to(device)

    if layout == "rows":
        return normal(*shape[:-1], shape[-1] + 24)[..., 8 : 8 + shape[-1]]
    if layout == "columns":
        return normal(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "heads":
        batch, heads, length, size = shape
        return normal(batch, length, heads, size).transpose(1, 2)
    return normal(*shape)


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], parameters: tuple[str, ...], inputs: Inputs
) -> dict[str, Tensor]:
    """y, h where there is a residual, and the gradients of all that is given, by name.

    function: (x, *parameters, residual) -> y, h.
    parameters: the names of weights and biases, which may be None.
    """
    names = ("x", *parameters, "residual")
    given = {name: inputs[name] for name in names if inputs[name] is not None}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    y, h = function(*(leaves.get(name) for name in names))
    results, upstream = {"y": y}, [inputs["dy"]]
    if inputs["residual"] is not None:
        results["h"] = h
        upstream.append(inputs["dh"])
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), upstream)
    outputs = {name: result.detach() for name, result in results.items()}
    return outputs | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
