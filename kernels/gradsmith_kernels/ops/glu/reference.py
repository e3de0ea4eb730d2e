"""Gated linear units in plain PyTorch: the definition. In float32, or in float64 for float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBE = 0.044715


def activated(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation of x and its derivative."""
    if activation == "gelu":
        # Of the normal distribution: the share below x, and the density at x.
        share = (1 + torch.erf(x * math.sqrt(0.5))) / 2
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return x * share, share + x * density
    if activation == "gelu_tanh":
        c = x.clamp(-20, 20)  # where tanh is -1 or 1 and x^3 is finite
        tanh = torch.tanh(SQRT_2_OVER_PI * (c + CUBE * c * c * c))
        inner_slope = SQRT_2_OVER_PI * (1 + 3 * CUBE * c * c)
        share = (1 + tanh) / 2
        return x * share, share + x * (1 - tanh * tanh) / 2 * inner_slope
    sigmoid = torch.sigmoid(x)
    value = x / (1 + torch.exp(-x))
    return value, sigmoid + value * (1 - sigmoid)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    compute = torch.promote_types(gate.dtype, torch.float32)
    value, _ = activated(gate.to(compute), activation)
    return (value * up.to(compute)).to(gate.dtype).contiguous()


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """dgate = dy * up * activation'(gate),    dup = dy * activation(gate)."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    dy = dy.to(compute)
    value, slope = activated(gate.to(compute), activation)
    dgate = dup = gate.new_empty(0)
    if need_dgate:
        dgate = (dy * up.to(compute) * slope).to(gate.dtype).contiguous()
    if need_dup:
        dup = (dy * value).to(gate.dtype).contiguous()
    return dgate, dup
