"""Puts gradsmith's kernels under a transformers model, in place and undoable.

Attention comes in by transformers' own door (transformers_attention.py). Another module is replaced
by giving it a subclass of its own class with another `forward`. Parameters, state-dict names,
hooks, `isinstance` and saving stay as they were.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsmith_kernels import backends, transformers_loss
from gradsmith_kernels.attention import op as attention_op
from gradsmith_kernels.linear_cross_entropy import op as linear_cross_entropy_op
from gradsmith_kernels.rms_norm import op as rms_norm_op
from gradsmith_kernels.rms_norm import rms_norm

__all__ = ["Report", "accelerate"]

# Classes of transformers whose forward is y = weight * (x / rms(x)), with `variance_epsilon`.
# Others that are called RMSNorm scale by 1 + weight (Gemma) or gate the input (Mamba).
_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


@dataclass
class Report:
    """What `accelerate` did to a model.

    replaced: module name -> (op, backend) that now computes it. For attention that is the name of
        the model whose layers it is, "" for the one that was given; for the loss that of lm_head.
    left_alone: module name -> why it was not replaced, for modules that look as if they could be.
    """

    replaced: dict[str, tuple[str, str]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives every replaced module its own forward back."""
        for restore in self._undo:
            restore()
        self._undo.clear()

    def __str__(self) -> str:
        lines = [
            f"{name or 'model'}: {op} ({backend})" for name, (op, backend) in self.replaced.items()
        ]
        lines += [
            f"{name or 'model'}: left alone, {reason}" for name, reason in self.left_alone.items()
        ]
        return "\n".join(lines) or "no module that gradsmith_kernels could replace"


def accelerate(
    model: nn.Module,
    *,
    only: Collection[str] | None = None,
    without: Collection[str] | None = None,
) -> Report:
    """Replaces what gradsmith has kernels for inside a transformers model.

    Today that is

    - `attention`, under every model whose attention transformers can exchange and that can do
      without a mask of Sq x Sk (those that take flash attention);
    - `rms_norm`, under Llama, Mistral, Qwen2 and Qwen3 models (with frozen weights too, whose
      gradient is then not computed);
    - `linear_cross_entropy`, in the loss of Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3,
      SmolLM3 and GPT-2 models in training, when they are called with labels: their output then
      holds the loss and no logits.

    The loss and the gradients stay those of the untouched model to rounding. What is replaced
    already is left alone, so calling it twice is harmless.

    Args:
        model: a model of transformers, on its device and with its weights loaded.
        only: op names to use; None for all.
        without: op names not to use.

    Raises:
        ValueError: `only` or `without` names an unknown op.
    """
    ops = {
        "attention": _accelerate_attention,
        "linear_cross_entropy": _accelerate_loss,
        "rms_norm": _accelerate_rms_norm,
    }
    for argument, names in (("only", only), ("without", without)):
        for name in names or ():
            if name not in ops:
                nearest = difflib.get_close_matches(name, ops, 1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(
                    f"accelerate: {argument} names {name!r}, not one of {[*ops]}{hint}"
                )
    report = Report()
    for op, replace in ops.items():
        if (only is None or op in only) and op not in (without or ()):
            replace(model, report)
    return report


def _accelerate_attention(model: nn.Module, report: Report) -> None:
    transformers = sys.modules.get("transformers")
    if transformers is None:  # then this is none of its models
        return
    from gradsmith_kernels import transformers_attention  # it imports torch._dynamo

    seen = set()  # a model and the model within it share a config
    for name, module in model.named_modules():
        if not isinstance(module, transformers.PreTrainedModel) or id(module.config) in seen:
            continue
        config: Any = module.config
        seen.add(id(config))
        reason = _unfit_attention(module)
        if reason:
            report.left_alone[name] = reason
            continue
        backend = attention_op.OP.resolve(None, module.device.type, module.dtype)
        before = config._attn_implementation
        # As a mapping it is for this config alone, not for those of the models within.
        config._attn_implementation = {"": transformers_attention.NAME}
        report.replaced[name] = ("attention", backend)
        report._undo.append(
            functools.partial(setattr, config, "_attn_implementation", {"": before})
        )


def _unfit_attention(model: Any) -> str | None:
    """Why the layers of a transformers model keep the attention that they have."""
    from gradsmith_kernels import transformers_attention

    implementation = model.config._attn_implementation
    if implementation == transformers_attention.NAME:
        return "already accelerated"
    if implementation not in ("sdpa", "eager"):
        return f"its attention is {implementation}, which somebody chose"
    if model.config.output_attentions:
        return "it is to return its attention weights, which the kernels do not keep"
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if not model._supports_flash_attn:
        return "its attention may need a mask of Sq x Sk: it does not take flash attention"
    if model.device.type == "meta":
        return "it is on the meta device: accelerate the model after loading it"
    if model.dtype not in attention_op.FLOATS:
        return f"it is {model.dtype}, beyond what the kernels take"
    try:
        attention_op.OP.resolve(None, model.device.type, model.dtype)
        transformers_attention.register()
    except RuntimeError as error:  # backends.BackendError is one
        return str(error)
    return None


def _accelerate_loss(model: nn.Module, report: Report) -> None:
    for name, module in list(model.named_modules()):
        if not transformers_loss.looks_like_one(module):
            continue
        head = f"{name}.lm_head" if name else "lm_head"
        reason = transformers_loss.unfit(module)
        if reason:
            report.left_alone[head] = reason
            continue
        weight: Any = module.lm_head.weight
        backend = linear_cross_entropy_op.OP.resolve(None, weight.device.type, weight.dtype)
        report._undo.append(transformers_loss.replace(module))
        report.replaced[head] = ("linear_cross_entropy", backend)


def _accelerate_rms_norm(model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        cls = type(module)
        if issubclass(cls, _Accelerated):
            report.left_alone[name] = "already accelerated"
        elif cls.__name__.endswith("RMSNorm"):
            reason = _unfit_rms_norm(module)
            if reason:
                report.left_alone[name] = reason
                continue
            weight: Any = module.weight
            backend = rms_norm_op.OP.resolve(None, weight.device.type, weight.dtype)
            module.__class__ = _subclass(cls)
            report.replaced[name] = ("rms_norm", backend)
            report._undo.append(functools.partial(setattr, module, "__class__", cls))


def _unfit_rms_norm(module: Any) -> str | None:
    """Why a module called ...RMSNorm is not one that `rms_norm` can stand in for."""
    cls = type(module)
    weight = getattr(module, "weight", None)
    if not cls.__module__.startswith("transformers.models.") or cls.__name__ not in _RMS_NORMS:
        return f"{cls.__name__} is not a class whose formula is known to be RMSNorm's"
    if not isinstance(weight, Tensor) or not hasattr(module, "variance_epsilon"):
        return "it has no weight and variance_epsilon"
    if weight.device.type == "meta":
        return "its weight is on the meta device: accelerate the model after loading it"
    if weight.dtype not in rms_norm_op.FLOATS:
        return f"its weight is {weight.dtype} (quantised, or beyond what the kernels take)"
    try:
        rms_norm_op.OP.resolve(None, weight.device.type, weight.dtype)
    except backends.BackendError as error:
        return str(error)
    return None


class _Accelerated:
    """Marks the subclasses that `accelerate` makes."""


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _subclasses:
        original: Callable[[nn.Module, Tensor], Tensor] = cls.forward

        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            # Where the dtypes differ, the module's own result has the wider one.
            if torch.promote_types(hidden_states.dtype, self.weight.dtype) != hidden_states.dtype:
                return original(self, hidden_states)
            return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

        name = f"Accelerated{cls.__name__}"
        _subclasses[cls] = type(name, (_Accelerated, cls), {"forward": forward})
    return _subclasses[cls]
