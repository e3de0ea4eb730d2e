"""gradsmith::rms_norm and gradsmith::add_rms_norm: schemas, checks, fakes, autograd, backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OP = Op(
    "rms_norm",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

_LIBRARY = torch.library.Library("gradsmith", "FRAGMENT")
_LIBRARY.define(
    "rms_norm(Tensor x, Tensor weight, float eps, str? backend=None) -> (Tensor y, Tensor rstd)"
)
_LIBRARY.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str? backend=None)"
    " -> (Tensor y, Tensor h, Tensor rstd)"
)
_LIBRARY.define(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd,"
    " bool need_dweight, str? backend=None) -> (Tensor dx, Tensor dweight)"
)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in (*FLOATS, torch.float64):
            raise TypeError(
                f"rms_norm: {name} is {tensor.dtype}; allowed are float32, bfloat16, float16, float64"
            )
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"rms_norm: float64 does not mix: x is {x.dtype}, weight {weight.dtype}")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must have the size of x's last dimension: x is {tuple(x.shape)}, "
            f"weight is {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"rms_norm: x is on {x.device}, weight on {weight.device}")
    if residual is not None:
        if residual.shape != x.shape or residual.device != x.device:
            raise ValueError(
                f"rms_norm: residual must be like x, which is {tuple(x.shape)} on {x.device}; "
                f"it is {tuple(residual.shape)} on {residual.device}"
            )
        if residual.dtype != x.dtype:
            raise TypeError(f"rms_norm: residual is {residual.dtype}, x is {x.dtype}")
    if not eps > 0:
        raise ValueError(f"rms_norm: eps is {eps}; it must be > 0")


def _implement(name: str, function: Any, fake: Any) -> None:
    torch.library.impl(f"gradsmith::{name}", "CompositeExplicitAutograd", function, lib=_LIBRARY)
    torch.library.register_fake(f"gradsmith::{name}", fake, lib=_LIBRARY)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _empty_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, None, weight, eps)
    y, _, rstd = OP.choose(backend, x.device, x.dtype).forward(x, None, weight, eps)
    return y, rstd


def _rms_norm_fake(
    x: Tensor, weight: Tensor, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, None, weight, eps)
    return _empty(x), _empty_rstd(x)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, residual, weight, eps)
    result: tuple[Tensor, Tensor, Tensor] = OP.choose(backend, x.device, x.dtype).forward(
        x, residual, weight, eps
    )
    return result


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, residual, weight, eps)
    return _empty(x), _empty(x), _empty_rstd(x)


def _rms_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dweight: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = OP.choose(backend, h.device, h.dtype).backward(
        dy, dh, h, weight, rstd, need_dweight
    )
    return result


def _rms_norm_backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dweight: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    return _empty(h), weight.new_empty(weight.shape if need_dweight else (0,))


_implement("rms_norm", _rms_norm, _rms_norm_fake)
_implement("add_rms_norm", _add_rms_norm, _add_rms_norm_fake)
_implement("rms_norm_backward", _rms_norm_backward, _rms_norm_backward_fake)


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.backend = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    need_dweight = ctx.needs_input_grad[1]
    dx, dweight = torch.ops.gradsmith.rms_norm_backward(
        dy, None, x, weight, rstd, need_dweight, ctx.backend
    )
    return dx, dweight if need_dweight else None, None, None


def _add_rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, ctx.backend = inputs
    _, h, rstd = output
    ctx.save_for_backward(h, weight, rstd)


def _add_rms_norm_autograd(
    ctx: Any, dy: Tensor, dh: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    need_dweight = ctx.needs_input_grad[2]
    dx, dweight = torch.ops.gradsmith.rms_norm_backward(
        dy, dh, h, weight, rstd, need_dweight, ctx.backend
    )
    return dx, dx, dweight if need_dweight else None, None, None


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("rms_norm has no second derivative (create_graph=True)")


torch.library.register_autograd(
    "gradsmith::rms_norm", _rms_norm_autograd, setup_context=_rms_norm_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "gradsmith::add_rms_norm",
    _add_rms_norm_autograd,
    setup_context=_add_rms_norm_context,
    lib=_LIBRARY,
)
torch.library.register_autograd("gradsmith::rms_norm_backward", _no_second_derivative, lib=_LIBRARY)
