"""Cross-entropy of a linear layer's output that never holds all the logits."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gradsmith_kernels.ops.linear_cross_entropy import op

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias), target)`, chunk by chunk.

    Of each token, with s = label_smoothing and the means over the vocabulary:

        z    = hidden weight^T + bias,  then softcap * tanh(z / softcap) if softcap > 0
        lse  = log(sum(exp(z)))
        loss = (1 - s) * (lse - z[target]) + s * (lse - mean(z)) + z_loss * lse^2

    Softmax and sums are computed in float32 or wider whatever the dtype, and so are the sums of
    gradients over chunks: each is rounded once. (z_loss: Chowdhery et al. 2022, arXiv:2204.02311;
    softcap: Gemma 2, arXiv:2408.00118; the idea: Wijmans et al. 2024, arXiv:2411.09009.)

    On the CPU the gradients for "mean" and "sum" are made in the forward pass, which then costs
    three products and the backward pass none; they take four bytes an element of hidden and weight
    until then. Else the backward pass computes the logits a second time.

    Args:
        hidden: (N, C) or (B, S, C): float32, bfloat16 or float16 (float64: reference backend only).
        weight: (V, C), of hidden's dtype.
        target: (N,) or (B, S), int64, each in [0, V) or `ignore_index`.
        bias: (V,), of hidden's dtype.
        ignore_index: a target that counts for nothing: its loss and gradient are 0.
        label_smoothing: in [0, 1].
        z_loss: >= 0; the paper's is 1e-4.
        softcap: >= 0; 0 for none.
        reduction: "mean" over the targets that count (0 if none does, with gradients of 0);
            "sum"; "none" for target's shape. To normalise over a global batch take "sum" and
            divide by `(target != ignore_index).sum()` of the whole of it.
        chunk: tokens whose logits are held at a time; None chooses. It changes rounding only.
        backend: reference, cpu or triton; None chooses by device, see `backends`.

    Returns:
        The loss in nats: float32 (float64 for float64). Differentiable once, with respect to
        hidden, weight and bias. The same inputs give the same bits for any number of threads.

    Raises:
        ValueError: shapes, devices or options do not fit.
        TypeError: a dtype is not one of the above.
        IndexError: a target is neither in [0, V) nor `ignore_index`; on a GPU too.
        BackendError: the backend cannot run here.
    """
    loss: Tensor
    loss, _ = op.LINEAR_CROSS_ENTROPY(
        hidden,
        weight,
        bias,
        target,
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(softcap),
        reduction,
        chunk,
        backend,
    )
    return loss
