"""The loss of transformers' causal language models, without their logits.

A model that is trained with labels computes its loss from all logits in float32. Here its class is
given a `forward` that hands the hidden states and the labels to `lm_head` instead, and lm_head's
class one that computes the loss. So whoever hooks into lm_head (DeepSpeed's ZeRO-3 gathers its
weight there) still does. Without labels, in evaluation, when some logits are asked for, when
somebody has given the model another loss, or when hooks on lm_head are to see its logits, the
model's own forward runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradsmith_kernels import backends
from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.linear_cross_entropy import linear_cross_entropy
from gradsmith_kernels.ops.linear_cross_entropy.op import OP
from gradsmith_kernels.transformers.exchange import Accelerated, exchange, subclass, watched

# Those that cap their logits if their config has final_logit_softcapping.
CAPPED = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
# Classes whose logits are lm_head's of the last hidden state, with that cap at most, and whose
# loss is transformers' ForCausalLMLoss. Others scale the logits (Granite, Cohere) or add to the
# loss (mixtures of experts).
MODELS = (
    *CAPPED,
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)


def looks_like_one(module: nn.Module) -> bool:
    # Not hasattr: peft's models hand on what the model within has.
    named = type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return named and "lm_head" in dict(module.named_children())


def reason_not(model: Any) -> str | None:
    """Why a causal model of transformers computes its loss as before."""
    cls, head = type(model), model.lm_head
    if type(head) is _Head:
        return "already accelerated"
    if not cls.__module__.startswith("transformers.models.") or cls.__name__ not in MODELS:
        return f"{cls.__name__} is not a class whose loss is known to be lm_head's cross-entropy"
    if type(head) is not nn.Linear:
        return f"its lm_head is a {type(head).__module__}.{type(head).__name__}, not a plain Linear"
    if "forward" in vars(model):
        return "somebody has given the model a forward of its own"
    if not _has_causal_loss(model):
        return "somebody has given it another loss"
    if head.weight.device.type == "meta":
        return "its lm_head is on the meta device: accelerate the model after loading it"
    if head.weight.dtype not in FLOATS:
        return f"its lm_head is {head.weight.dtype}, beyond what the kernels take"
    try:
        OP.resolve(None, head.weight.device.type, head.weight.dtype)
    except backends.BackendError as error:
        return str(error)
    return None


def _has_causal_loss(model: Any) -> bool:
    return model.loss_function is sys.modules["transformers"].loss.loss_utils.ForCausalLMLoss


def replace(model: Any) -> list[Callable[[], None]]:
    """Gives a fit model the loss; returns what undoes it."""
    return [exchange(model, subclass(type(model), _with_loss)), exchange(model.lm_head, _Head)]


class _Head(Accelerated, nn.Linear):
    def forward(self, input: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
        if target is None:
            return super().forward(input)
        dtype, device = self.weight.dtype, input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return linear_cross_entropy(
            input.to(dtype), self.weight.to(dtype), target, bias=bias, **options
        )


def _with_loss(original: Any) -> Any:
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return original(self, *args, **kwargs)
        plain = (
            not self.training
            or type(self.lm_head) is not _Head  # replaced since, by peft for instance
            or watched(self.lm_head)
            or not _has_causal_loss(self)
            or not isinstance(kwargs.get("logits_to_keep", 0), int)
            or kwargs.get("logits_to_keep", 0) != 0
            or kwargs.get("return_dict", self.config.return_dict) is False
        )
        if plain:
            return original(self, *args, labels=labels, **kwargs)
        return _forward(self, labels, *args, **kwargs)

    return forward


def _forward(
    self: Any,
    labels: Tensor,
    *args: Any,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    logits_to_keep: int = 0,
    **kwargs: Any,
) -> Any:
    """As transformers' forward and ForCausalLMLoss do it."""
    outputs = self.base_model(*args, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = self.lm_head(
        outputs.last_hidden_state,
        target=shift_labels.to(outputs.last_hidden_state.device),
        softcap=(type(self).__name__ in CAPPED and self.config.final_logit_softcapping) or 0.0,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    output = sys.modules["transformers"].modeling_outputs.CausalLMOutputWithPast
    return output(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
