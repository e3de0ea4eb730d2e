"""Newton-Schulz orthogonalisation of matrices, the heart of Muon."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradsmith_kernels.ops.newton_schulz import op

__all__ = ["COEFFICIENTS", "newton_schulz"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero (Jordan et al. 2024)


def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Sequence[float] = COEFFICIENTS,
    eps: float = 1e-7,
    backend: str | None = None,
) -> Tensor:
    """The quintic Newton-Schulz iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

        X = x / max(|x|, eps);   `steps` times:  A = X X^T,  X = (a I + b A + c A^2) X

    with the Frobenius norm |x|, and on the transposed matrix where it is tall. Singular vectors
    stay, singular values go to about 1 (with the default coefficients between 0.7 and 1.2), but
    for those that are too small for so many steps.

    Args:
        x: (..., m, n) matrices: bfloat16 as published, float32 or float16 (float64: reference
            backend only). The square of |x| must fit into float32.
        steps: iterations, >= 1.
        coefficients: a, b, c.
        eps: the smallest norm that is divided by; > 0.
        backend: reference, cpu or triton; None chooses by device, see `backends`.

    Returns:
        the matrices, contiguous, of x's shape and dtype. Zero gives zero; a NaN or an infinity
        gives a matrix of NaN. Not differentiable: asking for a derivative raises.

    Of the symmetric products only one half is computed. On the CPU bfloat16 matrices that are much
    wider than high (or the other way round) are iterated as Gram matrices in float32: less work
    than the published loop, and a fraction of its error. The products themselves are torch's: the
    same inputs give the same bits on the same machine with the same number of threads.

    Raises:
        ValueError: x is no matrix, or steps, coefficients or eps are outside of their range.
        TypeError: the dtype is not one of the above.
        BackendError: the backend cannot run here.
    """
    y: Tensor = op.NEWTON_SCHULZ(x, steps, list(coefficients), eps, backend)
    return y
