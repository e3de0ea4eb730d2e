"""Rotary position embedding of queries and keys, in one pass over both."""

from __future__ import annotations

from torch import Tensor

from gradsmith_kernels.ops.rope import op

__all__ = ["rope"]


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys.

    The first R elements of each head are R/2 pairs (a, b); the rest is copied (partial rotary):

        a' = a * cos_a - b * sin_a,    b' = b * cos_b + a * sin_b

    where a pair is (x[i], x[i + R/2]), as in Llama and GPT-NeoX, or, `interleaved`,
    (x[2i], x[2i + 1]), as in GPT-J and Cohere. cos and sin have their full width R, as transformers
    computes them: cos_a and cos_b stand at a's and b's places, and need not be equal. Computed in
    float32 and rounded once.

    Args:
        q: (B, S, H, D), float32, bfloat16 or float16 (float64: reference backend only). Any
            strides; where the elements of a head are not adjacent, it is copied. A model with
            (B, H, S, D) passes `q.transpose(1, 2)`.
        k: (B, S, Hk, D), of q's dtype; Hk may differ from H.
        cos, sin: (B, S, R) or (1, S, R), float32 or of q's dtype; R even, 0 < R <= D.
            They get no gradient.
        interleaved: which elements are a pair, as above.
        backend: reference, cpu or triton; None chooses by device, see `backends`.

    Returns:
        q and k rotated, contiguous, of their shapes and dtype; differentiable any number of times.
        The backward pass is the transposed rotation of those gradients that arrive and are needed;
        it keeps cos and sin, and neither q nor k.

    Raises:
        ValueError: shapes or devices do not fit, or cos or sin requires grad.
        TypeError: a dtype is not one of the above.
        BackendError: the backend cannot run here.
    """
    rotated: tuple[Tensor, Tensor] = op.ROPE(q, k, cos, sin, interleaved, False, backend)
    return rotated
