"""gradsmith's kernels: training ops with a definition in plain PyTorch and fast backends beside it.

>>> from gradsmith_kernels import rms_norm, optim, accelerate
>>> y = rms_norm(x, weight)                                # or rms_norm(x, weight, residual=r)
>>> optimizer = optim.AdamW(model.parameters(), lr=3e-4)   # a torch.optim.Optimizer
>>> report = accelerate(model)                             # our kernels under a transformers model

Needs torch and numpy; triton for GPUs. `python -m gradsmith_kernels.certify` proves the numbers on
your machine, and `gradsmith_kernels.backends.availability()` says what runs where.
"""

from gradsmith_kernels import backends, optim
from gradsmith_kernels.accelerate import accelerate
from gradsmith_kernels.rms_norm import rms_norm

__all__ = ["accelerate", "backends", "optim", "rms_norm"]
