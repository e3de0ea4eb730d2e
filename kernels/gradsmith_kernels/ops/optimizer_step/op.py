"""gradsmith::optimizer_step_: schema (what it writes to), checks, fake, backends.

Lists with an entry a tensor: a state has its parameter's shape, absmax one float32 for each
STATE_BLOCK elements of an 8-bit state, steps one float32 element each, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.registration import register
from gradsmith_kernels.ops.optimizer_step.rules import RULES
from gradsmith_kernels.ops.optimizer_step.tensors import DTYPES, Tensors, check

OP = Op(
    "optimizer_step",
    {
        "reference": Implementation(f"{__package__}.reference", (*DTYPES, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", DTYPES),
        "triton": Implementation(f"{__package__}.triton_kernels", DTYPES),
    },
)

torch.library.define(
    "gradsmith::optimizer_step_",
    "(str rule, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states1,"
    " Tensor(d!)[] states2, Tensor(e!)[] states3, Tensor(f!)[] absmax1, Tensor(g!)[] absmax2,"
    " Tensor(h!)[] masters, Tensor(i!)[] compensations, Tensor(j!)[] steps, int[] streams,"
    " float[] options,"
    " float scale, bool zero_grads, int? seed, str? backend=None) -> ()",
)


def _step_fake(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *rest: Any,
) -> None:
    check(RULES[rule], Tensors(params, *rest[:9]), grads)


def _step(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *rest: Any,
) -> None:
    options, scale, zero_grads, seed, *backend = rest[9:]
    tensors = Tensors(params, *rest[:9])
    check(RULES[rule], tensors, grads)
    if params:
        name = backend[0] if backend else None
        module = OP.choose(name, params[0].device, params[0].dtype)
        named = dict(zip(RULES[rule].options, options, strict=True))
        module.Plan(RULES[rule], tensors).step(grads, named, scale, zero_grads, seed)


register("optimizer_step_", _step, _step_fake)
