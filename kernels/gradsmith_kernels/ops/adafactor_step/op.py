"""gradsmith::adafactor_step_: schema (what it writes to), checks, fake, backends.

Lists with an entry a tensor. Of a (..., R, C), row_var is (..., R, 1) and col_var (..., 1, C),
float32 (`tensors.factor_shapes`). steps: one float32 element each, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.adafactor_step.tensors import DTYPES, Options, Tensors, check
from gradsmith_kernels.ops.common.registration import register

OP = Op(
    "adafactor_step",
    {
        "reference": Implementation(f"{__package__}.reference", (*DTYPES, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", DTYPES),
        "triton": Implementation(f"{__package__}.triton_kernels", DTYPES),
    },
)

torch.library.define(
    "gradsmith::adafactor_step_",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] row_vars, Tensor(d!)[] col_vars,"
    " Tensor(e!)[] masters, Tensor(f!)[] compensations, Tensor(g!)[] steps, float lr,"
    " float beta2_decay, float? eps1, float eps2, float d, float weight_decay, float l1,"
    " float scale, bool zero_grads, str? backend=None) -> ()",
)


def _step_fake(params: Sequence[Tensor], grads: Sequence[Tensor], *rest: Any) -> None:
    check(Tensors(params, *rest[:5]), grads)


def _step(params: Sequence[Tensor], grads: Sequence[Tensor], *rest: Any) -> None:
    scale, zero_grads, *backend = rest[12:]
    tensors = Tensors(params, *rest[:5])
    check(tensors, grads)
    if params:
        name = backend[0] if backend else None
        module = OP.choose(name, params[0].device, params[0].dtype)
        module.Plan(tensors).step(grads, Options(*rest[5:12]), scale, zero_grads)


register("adafactor_step_", _step, _step_fake)
