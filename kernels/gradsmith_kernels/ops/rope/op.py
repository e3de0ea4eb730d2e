"""gradsmith::rope: schema, checks, fake, autograd, backends.

The operator rotates one or two tensors in one pass: q and k, or those of their gradients that there
are. A rotation is linear and its gradient is the transposed rotation, so the operator with
`transposed` flipped is its own backward pass, and that one's as well.

q (B, S, H, D), k (B, S, Hk, D), cos and sin (B or 1, S, R) with R <= D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.registration import FLOATS, differentiable

OP = Op(
    "rope",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

# Without k the second result has the shape (0,).
torch.library.define(
    "gradsmith::rope",
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool transposed,"
    " str? backend=None) -> (Tensor, Tensor)",
)


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    """Raises TypeError or ValueError for arguments that do not fit."""
    if q.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"rope: q is {q.dtype}; it must be float32, bfloat16, float16 or float64")
    if q.dim() != 4:
        raise ValueError(f"rope: q must be (B, S, H, D); it is {tuple(q.shape)}")
    batch, length, _, size = q.shape
    if k is not None:
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
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k rotated; (0,) for a k that is None."""
    _check(q, k, cos, sin)
    rotate = OP.choose(backend, q.device, q.dtype).rotate
    if k is None:
        return rotate([q], cos, sin, interleaved, transposed)[0], q.new_empty(0)
    q, k = rotate([q, k], cos, sin, interleaved, transposed)
    return q, k


def _rope_fake(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin)
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], _: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, interleaved, transposed, backend = inputs
    for name, needs in zip(("cos", "sin"), ctx.needs_input_grad[2:4], strict=True):
        if needs:
            raise ValueError(f"rope: {name} requires grad, but gets no gradient: detach it")
    ctx.save_for_backward(cos, sin)
    ctx.options = interleaved, not transposed, backend


def _of_rope(
    ctx: Any, saved: tuple[Tensor, Tensor], dq: Tensor | None, dk: Tensor | None
) -> tuple[Tensor | None, ...]:
    # What does not arrive, or is not needed, is not computed.
    needs = ctx.needs_input_grad
    dq, dk = dq if needs[0] else None, dk if needs[1] else None
    if dq is not None:
        dq, rotated = ROPE(dq, dk, *saved, *ctx.options)
        dk = None if dk is None else rotated
    elif dk is not None:
        dk, _ = ROPE(dk, None, *saved, *ctx.options)
    return dq, dk, None, None, None, None, None


ROPE = differentiable("rope", _rope, _rope_fake, _setup, _of_rope)
