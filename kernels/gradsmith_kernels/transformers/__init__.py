"""Puts gradsmith's kernels under a transformers model, in place and undoable.

Attention comes in by transformers' own door (attention.py). Another module is replaced
by giving it a subclass of its own class with another `forward` (exchange.py; modules.py, rotary.py
and loss.py have the forwards). Parameters, state-dict names, hooks, `isinstance` and saving stay as
they were. No other folder touches what is private to transformers.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gradsmith_kernels.ops.attention import op as attention_op
from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.linear_cross_entropy import op as linear_cross_entropy_op
from gradsmith_kernels.transformers import exchange, loss, memory, modules

__all__ = ["Report", "accelerate"]


@dataclass
class Report:
    """What `accelerate` did to a model.

    replaced: module name -> (op, backend) that now computes it. For attention that is the name of
        the model whose layers it is, "" for the one that was given; for the loss that of lm_head.
    left_alone: module name -> why it was not replaced, for modules that look as if they could be;
        "" alone where there are none in the whole model.
    memory: whether freed memory is now kept for the next tensors. `undo` leaves that as it is.
    """

    replaced: dict[str, tuple[str, str]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    memory: bool = False
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives every replaced module its own forward back, the last one first.

        Raises:
            RuntimeError: a module has been given another class since, by FSDP for instance; what
                was replaced before it is still to be undone.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __str__(self) -> str:
        lines = [
            f"{name or 'model'}: {op} ({backend})" for name, (op, backend) in self.replaced.items()
        ]
        lines += [
            f"{name or 'model'}: left alone, {reason}" for name, reason in self.left_alone.items()
        ]
        lines += ["memory: what is freed is kept for the next tensors"] * self.memory
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    only: Collection[str] | None = None,
    without: Collection[str] | None = None,
) -> Report:
    """Replaces what gradsmith has kernels for inside a transformers model.

    - `attention`, under every model whose attention transformers can exchange and that can do
      without a mask of Sq x Sk (those that take flash attention);
    - `layer_norm`, under every torch.nn.LayerNorm over one dimension, and ConvNeXt's own;
    - `rms_norm`, under Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3 and SmolLM3;
    - `rope`, in the attention of those and of ModernBERT;
    - `glu`, in the MLPs of all these and in DINOv2's with SwiGLU;
    - `linear`, in every torch.nn.Linear: in 16 bits on an x86 CPU without AVX512_BF16, and in
      bfloat16 on one with AMX, for the weight's gradient;
    - `linear_cross_entropy`, in the loss of those that are causal language models and of GPT-2, in
      training, when they are called with labels: their output then holds the loss and no logits.

    With a model on a CPU, freed memory is also kept for the next tensors (`memory`): the process
    then holds on to the most it has needed, see `gradsmith_kernels.transformers.memory.keep_freed`.

    The loss and the gradients stay those of the untouched model to rounding; gradients of frozen
    weights are not computed. Modules of other classes that do the same work are left alone, and the
    report names them. What is replaced already is left alone, so calling it twice is harmless.

    Args:
        model: a model of transformers, on its device and with its weights loaded.
        only: names from this list to use; None for all.
        without: names not to use.

    Raises:
        ValueError: `only` or `without` has an unknown name.
    """
    # The loss first: lm_head is a linear layer too, and `linear` leaves alone what the loss has.
    ops = ["attention", "linear_cross_entropy", *modules.REPLACEMENTS, "memory"]
    for argument, names in (("only", only), ("without", without)):
        for name in names or ():
            if name not in ops:
                nearest = difflib.get_close_matches(name, ops, 1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"accelerate: {argument} names {name!r}, not one of {ops}{hint}")
    report = Report()
    for op in ops:
        if (only is not None and op not in only) or op in (without or ()):
            continue
        if op == "attention":
            _accelerate_attention(model, report)
        elif op == "linear_cross_entropy":
            _accelerate_loss(model, report)
        elif op == "memory":
            on_cpu = any(tensor.device.type == "cpu" for tensor in model.parameters())
            report.memory = bool(report.replaced) and on_cpu and memory.keep_freed()
        else:
            _accelerate_modules(modules.REPLACEMENTS[op], model, report)
    if not report.replaced and not report.left_alone:
        report.left_alone[""] = f"nothing in a {type(model).__name__} is known to these ops"
    return report


def _accelerate_attention(model: nn.Module, report: Report) -> None:
    transformers = sys.modules.get("transformers")
    if transformers is None:  # then this is none of its models
        return
    from gradsmith_kernels.transformers import attention  # it imports torch._dynamo

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
        config._attn_implementation = {"": attention.NAME}
        report.replaced[name] = ("attention", backend)
        report._undo.append(
            functools.partial(setattr, config, "_attn_implementation", {"": before})
        )
        if before == "eager":
            report._undo += [
                exchange.exchange(
                    part,
                    exchange.subclass(type(part), attention.with_weights),
                )
                for part in module.modules()
                if isinstance(part, transformers.PreTrainedModel) and part.config is config
            ]


def _unfit_attention(model: Any) -> str | None:
    """Why the layers of a transformers model keep the attention that they have."""
    from gradsmith_kernels.transformers import attention

    implementation = model.config._attn_implementation
    if implementation == attention.NAME:
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
    if model.dtype not in FLOATS:
        return f"it is {model.dtype}, beyond what the kernels take"
    try:
        attention_op.OP.resolve(None, model.device.type, model.dtype)
        attention.register()
    except RuntimeError as error:  # backends.BackendError is one
        return str(error)
    return None


def _accelerate_loss(model: nn.Module, report: Report) -> None:
    for name, module in list(model.named_modules()):
        if not loss.looks_like_one(module):
            continue
        head = f"{name}.lm_head" if name else "lm_head"
        reason = loss.reason_not(module)
        if reason:
            report.left_alone[head] = reason
            continue
        weight: Any = module.lm_head.weight
        backend = linear_cross_entropy_op.OP.resolve(None, weight.device.type, weight.dtype)
        report._undo += loss.replace(module)
        report.replaced[head] = ("linear_cross_entropy", backend)


def _accelerate_modules(replacement: modules.Replacement, model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        if not replacement.mentions(module):
            continue
        reason = replacement.reason_not(module, model)
        if reason:
            report.left_alone[name] = reason
            continue
        report._undo.append(replacement.replace(module))
        report.replaced[name] = (replacement.op.name, replacement.backend(module, model))
