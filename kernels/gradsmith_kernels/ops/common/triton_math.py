"""Functions of Triton's language that several ops' kernels call."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.9259629911266175e-08)  # what float32 loses of it
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    positive = tl.abs(x)
    result = 1 - 2 / (tl.exp2(positive * (2 * LOG2E)) + 1)
    if EXACT:
        # Near 0 that difference cancels: the continued fraction of tanh, to 1e-8 below 0.6.
        y = x * x
        fraction = positive * (y * (y + 105) + 945) / (y * (y * 15 + 420) + 945)
        result = tl.where(positive < 0.6, fraction, result)
    return tl.where(x < 0, -result, result)


@triton.jit
def power(x, EXACT: tl.constexpr):
    """e^x, as exact as 2^x is in hardware; or 2^x, for scores that were scaled by log2(e)."""
    if EXACT:
        x = tl.where(x < -200, -200.0, x)  # e^-200 is 0, and -inf would give NaN below
        exponent = x * LOG2E
        lost = tl.fma(x, LOG2E, -exponent) + x * LOG2E_REST
        p = tl.exp2(exponent)
        return p + p * (lost * LN2)
    else:
        return tl.exp2(x)
