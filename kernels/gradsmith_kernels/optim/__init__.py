"""Optimizers on gradsmith's kernels, with the names, groups and state dicts of torch.optim.

Formulas and sources: `gradsmith_kernels.ops.optimizer_step.rules`; of Adafactor,
`gradsmith_kernels.ops.adafactor_step`. What all of them take besides (`max_grad_norm`, `weights`,
`state_dtype`, ...): `FusedOptimizer`.
"""

from gradsmith_kernels.ops.optimizer_step.quantize import decode, encode
from gradsmith_kernels.ops.optimizer_step.tensors import STATE_BLOCK
from gradsmith_kernels.optim.adafactor import Adafactor
from gradsmith_kernels.optim.base import FusedOptimizer
from gradsmith_kernels.optim.elementwise import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    AdamW8bit,
    Lion,
    ScheduleFreeAdamW,
)
from gradsmith_kernels.optim.muon import Muon, Partition, Piece

__all__ = [
    "LAMB",
    "SGD",
    "STATE_BLOCK",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "FusedOptimizer",
    "Lion",
    "Muon",
    "Partition",
    "Piece",
    "ScheduleFreeAdamW",
    "decode",
    "encode",
]
