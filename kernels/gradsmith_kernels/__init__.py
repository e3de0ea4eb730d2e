"""gradsmith's kernels: training ops with a definition in plain PyTorch and fast backends beside it.

>>> from gradsmith_kernels import attention, rms_norm, rope, optim, accelerate
>>> out = attention(q, k, v, causal=True)                  # (B, S, H, D), as flash-attention
>>> y = rms_norm(x, weight)                                # or rms_norm(x, weight, residual=r)
>>> q, k = rope(q, k, cos, sin)                            # rotary embedding, one pass over both
>>> y = swiglu(gate, up)                                   # silu(gate) * up; geglu likewise
>>> y = layer_norm(x, weight, bias)                        # likewise
>>> loss = linear_cross_entropy(hidden, lm_head.weight, target)   # without the logits
>>> optimizer = optim.AdamW(model.parameters(), lr=3e-4)   # a torch.optim.Optimizer
>>> report = accelerate(model)                             # our kernels under a transformers model
>>> images = augment.Compose([augment.RandomResizedCrop(224)])(photos, seed=0)    # in one pass

Needs torch and numpy; triton for GPUs. `python -m gradsmith_kernels.certify` proves the numbers on
your machine, and `gradsmith_kernels.backends.availability()` says what runs where.
"""

from gradsmith_kernels import augment, backends, optim
from gradsmith_kernels.ops.attention import attention, attention_varlen
from gradsmith_kernels.ops.glu import geglu, swiglu
from gradsmith_kernels.ops.layer_norm import layer_norm
from gradsmith_kernels.ops.linear import linear
from gradsmith_kernels.ops.linear_cross_entropy import linear_cross_entropy
from gradsmith_kernels.ops.rms_norm import rms_norm
from gradsmith_kernels.ops.rope import rope
from gradsmith_kernels.transformers import accelerate

__all__ = [
    "accelerate",
    "attention",
    "attention_varlen",
    "augment",
    "backends",
    "geglu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "optim",
    "rms_norm",
    "rope",
    "swiglu",
]
