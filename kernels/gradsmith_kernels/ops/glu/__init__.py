"""Gated linear units: the product of an activated gate and a second branch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gradsmith_kernels.ops.glu import op

__all__ = ["geglu", "swiglu"]


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """SwiGLU's element-wise half (Shazeer 2020, arXiv:2002.05202), as Llama's MLP has it.

        y = silu(gate) * up,    silu(x) = x * sigmoid(x) = x / (1 + e^-x)

    Computed in float32 and rounded once. The backward pass computes the activation again: nothing
    but gate and up is kept for it.

    Args:
        gate: (..., N), float32, bfloat16 or float16 (float64: reference backend only). Rows may
            have any stride, so the halves of one (..., 2N) product are read where they are; where
            the elements of a row are not adjacent, it is copied.
        up: of gate's shape and dtype; its strides are its own.
        backend: reference, cpu or triton; None chooses by device, see `backends`.

    Returns:
        y, contiguous, of gate's shape and dtype. Differentiable once, with respect to gate and up.
        The same inputs give the same bits, for any number of threads.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype is not one of the above, or the two differ.
        BackendError: the backend cannot run here.
    """
    y: Tensor = op.GLU(gate, up, "silu", backend)
    return y


def geglu(
    gate: Tensor,
    up: Tensor,
    *,
    approximate: Literal["none", "tanh"] = "none",
    backend: str | None = None,
) -> Tensor:
    """GEGLU's element-wise half (Shazeer 2020, arXiv:2002.05202), as in Gemma and ModernBERT.

        y = gelu(gate) * up
        gelu(x) = x * (1 + erf(x / sqrt(2))) / 2                              approximate="none"
        gelu(x) = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2     approximate="tanh"

    Everything else is as in `swiglu`.

    Args:
        gate, up, backend: as in `swiglu`.
        approximate: "none" or "tanh", as in torch.nn.functional.gelu.

    Raises:
        ValueError: shapes or devices do not fit, or `approximate` is another word.
        TypeError: a dtype is not one of those, or the two differ.
        BackendError: the backend cannot run here.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate is {approximate!r}; it must be 'none' or 'tanh'")
    activation = "gelu_tanh" if approximate == "tanh" else "gelu"
    y: Tensor = op.GLU(gate, up, activation, backend)
    return y
