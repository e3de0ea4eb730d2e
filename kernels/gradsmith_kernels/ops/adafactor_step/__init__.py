"""One Adafactor step over many tensors; `gradsmith_kernels.optim.Adafactor` is the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import gradsmith_kernels.ops.adafactor_step.op  # noqa: F401 - registers gradsmith::adafactor_step_

__all__ = ["adafactor_step_"]


def adafactor_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_vars: Sequence[Tensor],
    col_vars: Sequence[Tensor],
    *,
    steps: Sequence[Tensor],
    lr: float,
    beta2_decay: float = -0.8,
    eps1: float | None = None,
    eps2: float = 1e-3,
    d: float = 1.0,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    masters: Sequence[Tensor] = (),
    compensations: Sequence[Tensor] = (),
    scale: float = 1.0,
    zero_grads: bool = False,
    backend: str | None = None,
) -> None:
    """One step of Adafactor as torch.optim.Adafactor has it, in place, at step t = 1, 2, ...

    The second moment of a matrix (of each one in the last two dimensions) is kept as the means of
    its rows and columns, that of fewer dimensions as it is:

        w = t^beta2_decay;  rho = min(lr, 1 / sqrt(t));  alpha = max(eps2, rms(x)) * rho
        R += w (mean of g^2 over columns - R);  C += w (mean of g^2 over rows - C)
        V = R C / max(mean of R, eps1)          (fewer than two dimensions: V += w (g^2 - V))
        u = g / max(sqrt(V), eps1)
        x -= lr * weight_decay * x;  x -= alpha * u / max(1, rms(u) / d)

    Then l1: every weight moves towards 0 by lr * l1 and stops there. rms is that of the whole
    tensor, of x before the decay. Means and rms are summed in float64, in an order that follows
    from the shapes; the rest is float32. Source: Shazeer and Stern 2018 (arXiv:1804.04235), with
    the changes that torch documents (lr as the largest rho; eps1 in V and u, not in g^2).

    Memory traffic of float32 tensors that no cache holds: 24 bytes an element, 28 with zero_grads
    (the mean square of u is known only after a second pass over g, the update takes a third).

    Args:
        params: float32, bfloat16 or float16, any shape (float64: reference backend, all in it).
        grads: like params in shape and device, not necessarily in dtype.
        row_vars: float32 [..., rows, 1] for a param [..., rows, cols]; for a param of fewer than
            two dimensions the variance, of its shape.
        col_vars: float32 [..., 1, cols]; for fewer than two dimensions an empty tensor.
        steps: the number of steps that each tensor has behind it, one float32 element on the CPU;
            raised by one.
        lr: largest relative step size, and the rate of the decay and of l1.
        beta2_decay: exponent of t in the share of the new squares; <= 0.
        eps1: least root of the second moment. None: of the arithmetic, 2^-23 (float64: 2^-52).
        eps2: least size of a tensor's weights in the step size.
        d: the update's rms is at most this.
        weight_decay: decoupled, multiplied by lr.
        l1: proximal L1 penalty, multiplied by lr.
        masters: float32 weights behind 16-bit params: stepped instead of the params, which get
            their rounded values.
        compensations: instead of masters, bfloat16: what rounding took from the 16-bit params; it
            is added before the next step (Kahan).
        scale: the gradients are multiplied by it first.
        zero_grads: set the gradients to zero in passing.
        backend: reference, cpu or triton; None chooses by device.

    Raises:
        ValueError: numbers of tensors, shapes or devices do not fit.
        TypeError: a dtype is not one of the above.
        BackendError: the backend cannot run here.
    """
    torch.ops.gradsmith.adafactor_step_.default(
        params,
        grads,
        row_vars,
        col_vars,
        masters,
        compensations,
        steps,
        lr,
        beta2_decay,
        eps1,
        eps2,
        d,
        weight_decay,
        l1,
        scale,
        zero_grads,
        backend,
    )
