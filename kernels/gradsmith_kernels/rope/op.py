"""gradsmith::rope: schema, checks, fake, autograd, backends.

The operator rotates a list of tensors in one pass: q and k, or those of their gradients that there
are. A rotation is linear and its gradient is the transposed rotation, so the operator with
`transposed` flipped is its own backward pass, and that one's as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.registration import register

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OP = Op(
    "rope",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

torch.library.define(
    "gradsmith::rope",
    "(Tensor[] x, Tensor cos, Tensor sin, bool interleaved, bool transposed, str? backend=None)"
    " -> Tensor[]",
)


def _check(x: list[Tensor], cos: Tensor, sin: Tensor) -> None:
    if len(x) not in (1, 2):
        raise ValueError(f"rope: x holds {len(x)} tensors; it must hold one or two")
    q = x[0]
    if q.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"rope: q is {q.dtype}; it must be float32, bfloat16, float16 or float64")
    if q.dim() != 4:
        raise ValueError(f"rope: q must be (B, S, H, D); it is {tuple(q.shape)}")
    batch, length, _, size = q.shape
    for k in x[1:]:
        if k.dtype != q.dtype:
            raise TypeError(f"rope: k is {k.dtype}, q is {q.dtype}")
        if k.device != q.device:
            raise ValueError(f"rope: q is on {q.device}, k on {k.device}")
        if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != size:
            raise ValueError(
                f"rope: k must be (B, S, Hk, D) with q's B, S and D; q is {tuple(q.shape)}, "
                f"k is {tuple(k.shape)}"
            )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (q.dtype, torch.float32):
            raise TypeError(
                f"rope: {name} is {table.dtype}; it must be float32 or of q's dtype, {q.dtype}"
            )
        if table.device != q.device:
            raise ValueError(f"rope: q is on {q.device}, {name} on {table.device}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"rope: cos is {cos.dtype}, sin is {sin.dtype}")
    if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != length:
        raise ValueError(
            f"rope: cos must be (B or 1, S, R); q is {tuple(q.shape)}, cos is {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(
            f"rope: sin must be like cos, which is {tuple(cos.shape)}; it is {tuple(sin.shape)}"
        )
    if not 0 < cos.shape[2] <= size or cos.shape[2] % 2:
        raise ValueError(
            f"rope: cos has {cos.shape[2]} columns; they must be even, more than 0 and no more "
            f"than q's last dimension, {size}"
        )


def _rope(
    x: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
    backend: str | None = None,
) -> list[Tensor]:
    _check(x, cos, sin)
    result: list[Tensor] = OP.choose(backend, x[0].device, x[0].dtype).rotate(
        x, cos, sin, interleaved, transposed
    )
    return result


def _rope_fake(
    x: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
    backend: str | None = None,
) -> list[Tensor]:
    _check(x, cos, sin)
    return [tensor.new_empty(tensor.shape) for tensor in x]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        transposed: bool,
        backend: str | None,
        *x: Tensor,
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y = torch.ops.gradsmith.rope.default(
                list(x), cos, sin, interleaved, transposed, backend
            )
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)  # a gradient that does not arrive is not computed
        ctx.options = interleaved, not transposed, backend
        return tuple(y)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[-len(dy) :]
        given = {i: d for i, d in enumerate(dy) if d is not None and needed[i]}
        dx: list[Tensor | None] = [None] * len(dy)
        if given:
            rotated = torch.ops.gradsmith.rope.default(
                list(given.values()), *ctx.saved_tensors, *ctx.options
            )
            for i, tensor in zip(given, rotated, strict=True):
                dx[i] = tensor
        return None, None, None, None, None, *dx


def _rope_autograd(
    x: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
    backend: str | None = None,
) -> list[Tensor]:
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"rope: {name} requires grad, but gets no gradient: detach it")
    apply: Any = _Rope.apply  # untyped in torch
    return list(apply(cos, sin, interleaved, transposed, backend, *x))


register("rope", _rope, _rope_fake, _rope_autograd)
