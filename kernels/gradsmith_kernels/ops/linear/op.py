"""gradsmith::linear: schemas, checks, fakes, autograd, backends.

x, dx (..., K); weight, dweight (N, K); bias, dbias (N,); y, dy (..., N); of one dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import X86, Implementation, Op, native, torch_multiplies_bf16
from gradsmith_kernels.ops.common.registration import FLOATS, differentiable


class _LinearOp(Op):
    """Where nobody asks for a backend, the products are those that were measured to be faster.

    On an x86 CPU: ours in bfloat16 where torch's are a slow loop, and in float16 without AMX; else
    torch's (docs/log.md, "Linear").
    """

    def _default(self, device: str, dtype: torch.dtype) -> str:
        isa = _isa(device)
        ours = (dtype == torch.bfloat16 and not torch_multiplies_bf16()) or (
            dtype == torch.float16 and isa != "amx"
        )
        return "cpu" if isa and ours else "reference"


OP = _LinearOp(
    "linear",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", (torch.bfloat16, torch.float16)),
    },
)


def _isa(device: str) -> str | None:
    """The instruction set of the native module on an x86 CPU, else None."""
    found = native() if device == "cpu" and X86 else None
    if found is None:
        return None
    isa: str = found["isa"]
    return isa


def dweight_backend(device: str, dtype: torch.dtype) -> str:
    """The backend of the weight's gradient where nobody asks for one.

    As for the other products; and ours in bfloat16 on AMX, where torch's is slower than its own
    forward product. Its other products have no such gap, and need not be packed for.
    """
    if dtype == torch.bfloat16 and _isa(device) == "amx":
        return "cpu"
    return OP.resolve(None, device, dtype)


torch.library.define(
    "gradsmith::linear", "(Tensor x, Tensor weight, Tensor? bias, str? backend=None) -> Tensor"
)
torch.library.define(
    "gradsmith::linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight, bool need_dbias,"
    " str? backend=None) -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError or ValueError for arguments that do not fit."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (*FLOATS, torch.float64):
            raise TypeError(
                f"linear: {name} is {tensor.dtype}; it must be float32, bfloat16, float16 or "
                "float64"
            )
        if tensor.dtype != x.dtype:
            raise TypeError(f"linear: {name} is {tensor.dtype}, x is {x.dtype}; they must agree")
        if tensor.device != x.device:
            raise ValueError(f"linear: x is on {x.device}, {name} on {tensor.device}")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            "linear: weight must be (N, K) and x (..., K): x is "
            f"{tuple(x.shape)}, weight is {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must be ({weight.shape[0]},); it is {tuple(bias.shape)}")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None = None) -> Tensor:
    _check(x, weight, bias)
    y: Tensor = OP.choose(backend, x.device, x.dtype).forward(x, weight, bias)
    return y


def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None = None
) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; dweight by the backend that is faster for it, unless one was named."""
    module = for_dweight = OP.choose(backend, x.device, x.dtype)
    if backend is None:
        for_dweight = OP.choose(dweight_backend(x.device.type, x.dtype), x.device, x.dtype)
    dx, dweight, dbias = module.backward(
        dy, x, weight, (need_dx, need_dweight and for_dweight is module, need_dbias)
    )
    if need_dweight and for_dweight is not module:
        _, dweight, _ = for_dweight.backward(dy, x, weight, (False, True, False))
    return dx, dweight, dbias


def _linear_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dweight else (0,)),
        x.new_empty(weight.shape[:1] if need_dbias else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    # What no gradient needs is not kept: x under frozen weights, weight under frozen inputs.
    x, weight, _, ctx.backend = inputs
    of_x, of_weight, of_bias, _ = ctx.needs_input_grad
    ctx.needs, ctx.shapes = (of_x, of_weight, of_bias), (x.shape, weight.shape)
    ctx.save_for_backward(x if of_weight else None, weight if of_x else None)


def _of_linear(ctx: Any, saved: tuple[Tensor | None, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    # Stands in, without memory, for a tensor of which the products read the shape alone.
    x, weight = (
        dy.new_empty(1).expand(shape) if tensor is None else tensor
        for tensor, shape in zip(saved, ctx.shapes, strict=True)
    )
    gradients = BACKWARD(dy, x, weight, *ctx.needs, ctx.backend)
    return *(d if need else None for d, need in zip(gradients, ctx.needs, strict=True)), None


LINEAR = differentiable("linear", _linear, _linear_fake, _setup, _of_linear)
BACKWARD = differentiable("linear_backward", _linear_backward, _linear_backward_fake)
