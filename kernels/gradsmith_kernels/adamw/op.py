"""gradsmith::adamw_: schema (what it writes to), checks, fake, backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op

DTYPES = (torch.float32, torch.bfloat16)
OP = Op(
    "adamw",
    {
        "reference": Implementation(f"{__package__}.reference", (*DTYPES, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", DTYPES),
        "triton": Implementation(f"{__package__}.triton_kernels", DTYPES),
    },
)

torch.library.define(
    "gradsmith::adamw_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " str? backend=None) -> ()",
)


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> None:
    lengths = [len(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)]
    if len(set(lengths)) != 1:
        raise ValueError(
            "adamw_: params, grads, exp_avgs, exp_avg_sqs and steps must have the same length; "
            f"they have {lengths}"
        )
    if not params:
        return
    device, float64 = params[0].device, params[0].dtype == torch.float64
    allowed = (torch.float64,) if float64 else DTYPES
    state = torch.float64 if float64 else torch.float32
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    for i, (p, g, m, v, t) in enumerate(tensors):
        if p.dtype not in allowed or g.dtype not in allowed:
            names = " or ".join(str(dtype) for dtype in allowed)
            raise TypeError(
                f"adamw_: params[{i}] is {p.dtype} and its gradient {g.dtype}; "
                f"both must be {names} (and float64 does not mix with the others)"
            )
        if m.dtype != state or v.dtype != state:
            raise TypeError(
                f"adamw_: the moments of params[{i}] are {m.dtype} and {v.dtype}, not {state}"
            )
        if t.dtype != torch.float32 or t.numel() != 1 or not t.is_cpu:
            raise TypeError(f"adamw_: steps[{i}] must be one float32 element on the CPU; it is {t}")
        if not p.shape == g.shape == m.shape == v.shape:
            raise ValueError(
                f"adamw_: params[{i}] is {tuple(p.shape)}, its gradient {tuple(g.shape)}, its "
                f"moments {tuple(m.shape)} and {tuple(v.shape)}; the shapes must be equal"
            )
        if not p.device == g.device == m.device == v.device == device:
            raise ValueError(
                f"adamw_: params[{i}], its gradient and its moments are on {p.device}, {g.device}, "
                f"{m.device} and {v.device}; all must be on {device}, like params[0]"
            )


def _adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    backend: str | None = None,
) -> None:
    _check(params, grads, exp_avgs, exp_avg_sqs, steps)
    if params:
        OP.choose(backend, params[0].device, params[0].dtype).step(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay
        )


def _adamw_fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    backend: str | None = None,
) -> None:
    _check(params, grads, exp_avgs, exp_avg_sqs, steps)


torch.library.impl("gradsmith::adamw_", "CompositeExplicitAutograd", _adamw)
torch.library.register_fake("gradsmith::adamw_", _adamw_fake)
