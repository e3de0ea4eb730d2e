"""The rotary embedding inside the attention of transformers' models, by `rope`.

There is no module to exchange: each family's attention calls apply_rotary_pos_emb, a function that
it finds by that name in the file of the model. To set the name there would change every model of
the family, also those that nobody asked to accelerate, and could not be undone for one alone. So
the class's forward is made once more from its own code, over a copy of the file's globals in which
this one name is ours. All else that the forward calls is what it was when the copy was made.
What carries decorators is copied from the outside in: a decorator's function finds the one that it
calls in its closure, and is given a closure that holds our copy.
"""

from __future__ import annotations

import functools
import inspect
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from gradsmith_kernels.ops.rope import rope
from gradsmith_kernels.transformers.exchange import Forward

ROTARY = "apply_rotary_pos_emb"


def attention(original: Any, keeps_dtype: bool = False) -> Forward:
    """The class's own forward in a copy of its module's namespace, where one name is ours.

    The module's namespace itself stays as it is. The copy has no __name__, by which torch.compile
    would look the name up in the module.
    """
    inner = _decorated(original)
    if inner is None:
        namespace = {k: value for k, value in original.__globals__.items() if k != "__name__"}
        namespace[ROTARY] = _rotary(original.__globals__[ROTARY], keeps_dtype)
        return _copied(original, namespace, original.__closure__ or ())
    ours = attention(inner, keeps_dtype)
    cells = original.__closure__ or ()
    cells = tuple(CellType(ours) if cell.cell_contents is inner else cell for cell in cells)
    return _copied(original, original.__globals__, cells)


def _decorated(function: Any) -> Any:
    """What a decorator's function calls (as one that takes an argument by its old name too), where
    a copy of it could call another."""
    inner = getattr(function, "__wrapped__", None)
    cells = getattr(function, "__closure__", None) or ()
    return inner if any(cell.cell_contents is inner for cell in cells) else None


def _copied(original: Any, namespace: dict[str, Any], cells: tuple[CellType, ...]) -> Forward:
    """The function with other globals, and with other values for the names around it."""
    copy = FunctionType(
        original.__code__, namespace, original.__name__, original.__defaults__, cells
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


def modernbert_attention(original: Any) -> Forward:
    return attention(original, keeps_dtype=True)


def _rotary(original: Forward, keeps_dtype: bool) -> Forward:
    """apply_rotary_pos_emb by `rope`. keeps_dtype: the result has q's dtype, whatever cos has."""

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> Any:
        batch, _, length, size = q.shape
        dtype = q.dtype if keeps_dtype else torch.promote_types(q.dtype, cos.dtype)
        fits = (
            unsqueeze_dim == 1
            and q.dtype == k.dtype
            and q.shape[2] == k.shape[2]
            and cos.dim() == 3
            and cos.shape == sin.shape
            and cos.shape[0] in (1, batch)
            and cos.shape[1] == length
            and cos.shape[2] <= size
            and cos.dtype == sin.dtype
            and cos.dtype in (dtype, torch.float32)
            and not (cos.requires_grad or sin.requires_grad)
        )
        if not fits:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        q, k = rope(q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotary_pos_emb


def misfit(module: Any) -> str | None:
    forward = type(module).forward
    while inner := _decorated(forward):
        forward = inner
    apply = getattr(forward, "__globals__", {}).get(ROTARY)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return f"its forward is not one that calls {ROTARY}"
    if getattr(apply, "__module__", None) != forward.__module__:
        return f"somebody has exchanged its {ROTARY}"
    if not getattr(module, "use_rope", True):
        return "it is a layer without rotary positions"
    return None


def looks_like_one(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = code.co_names if code else ()
    return any(name.startswith("apply_") and "rot" in name for name in names)
