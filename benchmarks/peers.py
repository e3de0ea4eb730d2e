"""Peers from libraries that the kernels do not import, by the case's label. What is not installed
is left out, and then missing from the results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.optim.bench import OnMasters, optimizer_of
from gradsmith_kernels.verify.spec import Inputs

Peer = Callable[[Inputs], Any]


def of(label: str) -> Mapping[str, Peer]:
    """The further peers of a case."""
    found: dict[str, Peer] = {}
    for name, make in _PEERS.get(label, {}).items():
        with contextlib.suppress(ImportError):
            found[name] = make()
    return found


def known() -> set[str]:
    """The labels of the cases that have peers here."""
    return set(_PEERS)


def _deepspeed(clip: bool) -> Peer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return partial(_step, DeepSpeedCPUAdam, {"adamw_mode": True}, clip)


def _deepspeed_on_masters() -> Peer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class DeepSpeedOnMasters(OnMasters):
        def make(self, masters: list[Tensor]) -> Any:
            return DeepSpeedCPUAdam(masters, adamw_mode=True)

    return partial(_step, DeepSpeedOnMasters, {}, True)


def _bitsandbytes() -> Peer:
    import bitsandbytes

    return partial(_step, bitsandbytes.optim.AdamW8bit, {}, False)


def _transformers_adafactor() -> Peer:
    from transformers import Adafactor

    # The same algorithm as torch's: no step size of its own, scaled by the weights' size.
    settings = {"lr": 1e-2, "relative_step": False, "scale_parameter": True}
    return partial(_step, Adafactor, settings, False)


def _step(cls: Any, keywords: dict[str, Any], clip: bool, inputs: Inputs) -> None:
    made = optimizer_of(cls, keywords, inputs)
    if clip:
        torch.nn.utils.clip_grad_norm_(inputs["params"], 1.0)
    made.step()
    if clip:
        made.zero_grad(set_to_none=False)


_PEERS: dict[str, dict[str, Callable[[], Peer]]] = {
    "adamw one tensor of 50M float32": {"DeepSpeedCPUAdam": partial(_deepspeed, False)},
    "adamw 2000 tensors of 4096 float32": {"DeepSpeedCPUAdam": partial(_deepspeed, False)},
    "clip + adamw + zero_grad one tensor of 50M float32": {
        "clip, DeepSpeedCPUAdam, zero_grad": partial(_deepspeed, True)
    },
    "clip + adamw + zero_grad one tensor of 50M bfloat16, float32 moments and masters": {
        "clip, DeepSpeedCPUAdam on float32 copies, zero_grad": _deepspeed_on_masters
    },
    "adafactor 12 matrices of 1024x4096 float32": {"transformers": _transformers_adafactor},
    "adafactor 2000 tensors of 4096 float32": {"transformers": _transformers_adafactor},
    "adamw 8-bit, nearest, one tensor of 50M float32": {"bitsandbytes": _bitsandbytes},
    "adamw 8-bit one tensor of 50M float32": {"bitsandbytes": _bitsandbytes},
}
