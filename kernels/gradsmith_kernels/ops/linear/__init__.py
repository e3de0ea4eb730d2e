"""A linear layer whose three products are ours where that is faster than torch's."""

from __future__ import annotations

from torch import Tensor

from gradsmith_kernels.ops.linear import op

__all__ = ["linear"]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """The linear layer y = x weight^T + bias, its input's and its weight's gradient.

        dx = dy weight,    dweight = dy^T x,    dbias = the sum of dy's rows

    What was measured to be faster computes (docs/log.md, "Linear"). On an x86 CPU without
    AVX512_BF16 torch multiplies 16-bit numbers in a slow loop: there all three products are by
    csrc/linear, which widens them as it packs them. On CPUs with AMX the weight's gradient in
    bfloat16 is. Everything else, and everything with few rows, is torch's product.

    Args:
        x: (..., K), any floating dtype. Rows may have any stride.
        weight: (N, K), of x's dtype.
        bias: (N,), of x's dtype, or None.
        backend: reference (torch's products) or cpu (all three by csrc/linear; bfloat16
            and float16); None chooses as above.

    Returns:
        y: (..., N), contiguous, of x's dtype, under autocast too. Sums are in float32 and rounded
        once; on the cpu backend the same inputs give the same bits for any number of threads.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype is not one of the above.
        BackendError: the backend cannot run here.
    """
    y: Tensor = op.LINEAR(x, weight, bias, backend)
    return y
