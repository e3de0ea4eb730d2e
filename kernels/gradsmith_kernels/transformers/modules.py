"""The norms, gated MLPs, rotary embeddings and linear layers of transformers' models, by our ops.

A module is given a subclass of its own class with another `forward`, which calls the module's
children as before and takes the op for what lies between them. So parameters, state-dict names,
hooks, `isinstance` and saving stay as they were, an adapter may sit on any child, and ZeRO-3, which
gathers a module's own weights while that module runs, finds each module running.

Where the op would not give the module's own result (other dtypes, an activation it has not, shapes
of another rotary embedding), the forward does what the module did.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsmith_kernels.backends import BackendError, Op
from gradsmith_kernels.ops.common.registration import FLOATS
from gradsmith_kernels.ops.glu import geglu, swiglu
from gradsmith_kernels.ops.glu import op as glu_op
from gradsmith_kernels.ops.layer_norm import layer_norm
from gradsmith_kernels.ops.layer_norm import op as layer_norm_op
from gradsmith_kernels.ops.linear import linear
from gradsmith_kernels.ops.linear import op as linear_op
from gradsmith_kernels.ops.rms_norm import op as rms_norm_op
from gradsmith_kernels.ops.rms_norm import rms_norm
from gradsmith_kernels.ops.rope import op as rope_op
from gradsmith_kernels.transformers import rotary
from gradsmith_kernels.transformers.exchange import (
    Accelerated,
    Forward,
    ForwardMaker,
    exchange,
    subclass,
    watched,
)

# --------------------------------------------------------------------------------------- norms


def _rms_norm(original: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        # Where the dtypes differ, the module's own result has the wider one.
        if torch.promote_types(hidden_states.dtype, self.weight.dtype) != hidden_states.dtype:
            return original(self, hidden_states)  # type: ignore[no-any-return]
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

    return forward


def _gemma_rms_norm(original: Forward) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, offset=1.0)

    return forward


def _layer_norm(original: Forward) -> Forward:
    def forward(self: Any, input: Tensor) -> Tensor:
        weight, autocast = self.weight, torch.is_autocast_enabled(input.device.type)
        # Autocast has rules of its own for the result's dtype, and torch for weights of another.
        if (autocast and input.dtype != torch.float32) or (
            weight is not None and weight.dtype != input.dtype
        ):
            return original(self, input)  # type: ignore[no-any-return]
        return layer_norm(input, weight, self.bias, eps=self.eps)

    return forward


def _conv_next_layer_norm(original: Forward) -> Forward:
    rows = _layer_norm(nn.LayerNorm.forward)

    def forward(self: Any, features: Tensor) -> Any:
        if self.data_format != "channels_first":
            return rows(self, features)
        return rows(self, features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return forward


# ------------------------------------------------------------------------------- linear layers


def _linear(original: Forward) -> Forward:
    def forward(self: Any, input: Tensor) -> Any:
        if input.dtype != self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return original(self, input)
        return linear(input, self.weight, self.bias)

    return forward


# ----------------------------------------------------------------------------------- gated MLPs

# By the name of the activation's class in torch and transformers.
ACTIVATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SiLU": swiglu,
    "SiLUActivation": swiglu,
    "GELUActivation": geglu,
    "GELUTanh": functools.partial(geglu, approximate="tanh"),
}


def _is_known(activation: nn.Module) -> bool:
    cls = type(activation)
    return cls.__name__ in ACTIVATIONS and cls.__module__.startswith(("torch.nn.", "transformers."))


def _fuses(activation: nn.Module) -> bool:
    """Whether an activation may be computed without calling it: it is known, and nobody watches it.

    ZeRO-3 puts hooks on every module to gather its weights. An activation has no weights, so it may
    be skipped.
    """
    return _is_known(activation) and not watched(activation)


def _glu(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype != up.dtype:
        return activation(gate) * up  # type: ignore[no-any-return]
    return ACTIVATIONS[type(activation).__name__](gate, up)


def _gate_and_up(original: Forward) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        if not _fuses(self.act_fn):
            return original(self, x)
        return self.down_proj(_glu(self.act_fn, self.gate_proj(x), self.up_proj(x)))

    return forward


def _phi3_mlp(original: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not _fuses(self.activation_fn):
            return original(self, hidden_states)
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(_glu(self.activation_fn, gate, up))

    return forward


def _modernbert_mlp(original: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not _fuses(self.act):
            return original(self, hidden_states)
        gate, up = self.Wi(hidden_states).chunk(2, dim=-1)
        return self.Wo(self.drop(_glu(self.act, gate, up)))

    return forward


# --------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Replacement:
    """The modules that one op goes under.

    op, dtypes: the op, and what its kernels take.
    makers: the class's name in transformers -> what makes its forward. Only classes whose formula
        is known: others called RMSNorm gate their input, and other rotations are multimodal.
    looks_like: whether a module looks like one of them, so that a report has to speak of it.
    misfit: why a module of such a class is not one after all.
    """

    op: Op
    dtypes: tuple[torch.dtype, ...]
    makers: Mapping[str, ForwardMaker]
    looks_like: Callable[[nn.Module], bool]
    misfit: Callable[[Any], str | None]

    def mentions(self, module: nn.Module) -> bool:
        """Whether a report of this op has to speak of `module`."""
        return self._maker(module) is not None or self.looks_like(module)

    def reason_not(self, module: nn.Module, model: nn.Module) -> str | None:
        """Why a module of `model` keeps its own forward."""
        if isinstance(module, Accelerated):
            return "already accelerated"
        if self._maker(module) is None:
            return f"{type(module).__name__} is not a class whose formula is known"
        if "forward" in vars(module):
            return "somebody has given it a forward of its own"
        reason = self.misfit(module)
        if reason:
            return reason
        tensor = _tensor(module, model)
        if tensor is None:
            return "no weight says in which dtype it computes"
        if tensor.device.type == "meta":
            return "it is on the meta device: accelerate the model after loading it"
        if tensor.dtype not in self.dtypes:
            return f"its weight is {tensor.dtype} (quantised, or beyond what the kernels take)"
        try:
            self.backend(module, model)
        except BackendError as error:
            return str(error)
        return None

    def replace(self, module: nn.Module) -> Callable[[], None]:
        """Gives a fit module the op; returns what undoes it."""
        make = self._maker(module)
        assert make is not None
        return exchange(module, subclass(type(module), make))

    def backend(self, module: nn.Module, model: nn.Module) -> str:
        """The backend that a fit module computes with."""
        tensor = _tensor(module, model)
        assert tensor is not None
        return self.op.resolve(None, tensor.device.type, tensor.dtype)

    def _maker(self, module: nn.Module) -> ForwardMaker | None:
        cls = type(module)
        known = cls.__module__.startswith(("transformers.models.", "torch.nn.modules."))
        return self.makers.get(cls.__name__) if known else None


def _tensor(module: nn.Module, model: nn.Module) -> Tensor | None:
    """A tensor with the device and dtype in which a module computes."""
    own = next(module.parameters(recurse=False), None)
    if own is not None:
        return own
    # Of a quantised module's children some have weights of integers.
    around = itertools.chain(module.parameters(), model.parameters())
    return next((tensor for tensor in around if tensor.is_floating_point()), None)


class _LinearReplacement(Replacement):
    """Where the op has nothing of ours to give, which is most machines, there is nothing to say."""

    def mentions(self, module: nn.Module) -> bool:
        if self._maker(module) is None or isinstance(module, Accelerated):
            return False
        weight: Any = module.weight
        return linear_op.dweight_backend(weight.device.type, weight.dtype) != "reference"

    def backend(self, module: nn.Module, model: nn.Module) -> str:
        weight: Any = module.weight
        return linear_op.dweight_backend(weight.device.type, weight.dtype)


def _of(families: str, suffix: str, maker: ForwardMaker) -> dict[str, ForwardMaker]:
    return {f"{family}{suffix}": maker for family in families.split()}


def _unfit_rms_norm(module: Any) -> str | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or not isinstance(getattr(module, "weight", None), Tensor):
        return "it has no weight and epsilon"
    return None if eps > 0 else f"its epsilon is {eps}"


def _unfit_layer_norm(module: Any) -> str | None:
    if len(module.normalized_shape) != 1:
        return f"it is over {len(module.normalized_shape)} dimensions"
    return None if module.eps > 0 else f"its epsilon is {module.eps}"


def _unfit_glu(module: Any) -> str | None:
    children = dict(module.named_children())
    needed = (
        {"gate_proj", "up_proj", "down_proj", "act_fn"},
        {"gate_up_proj", "down_proj", "activation_fn"},
        {"Wi", "Wo", "act", "drop"},
    )
    names = next((names for names in needed if names <= children.keys()), None)
    if names is None:
        return "its projections have other names than those known"
    (activation,) = names & {"act_fn", "activation_fn", "act"}
    kind = type(children[activation]).__name__
    return None if _is_known(children[activation]) else f"its activation is {kind}"


def _has_gate(module: nn.Module) -> bool:
    names = module._modules.keys() | module._parameters.keys()  # those of experts are parameters
    return not names.isdisjoint(("gate_proj", "gate_up_proj"))


REPLACEMENTS = {
    "glu": Replacement(
        glu_op.OP,
        FLOATS,
        _of("Llama Mistral Qwen2 Qwen3 SmolLM3 Gemma2 Gemma3", "MLP", _gate_and_up)
        | {"Dinov2SwiGLUFFN": _gate_and_up, "Phi3MLP": _phi3_mlp, "ModernBertMLP": _modernbert_mlp},
        _has_gate,
        _unfit_glu,
    ),
    "layer_norm": Replacement(
        layer_norm_op.OP,
        FLOATS,
        {"LayerNorm": _layer_norm, "ConvNextLayerNorm": _conv_next_layer_norm},
        lambda module: type(module).__name__.endswith("LayerNorm"),
        _unfit_layer_norm,
    ),
    "linear": _LinearReplacement(
        linear_op.OP,
        (*FLOATS, torch.float64),
        {"Linear": _linear},
        lambda module: False,
        lambda module: None,
    ),
    "rms_norm": Replacement(
        rms_norm_op.OP,
        FLOATS,
        _of("Llama Mistral Qwen2 Qwen3 Phi3 SmolLM3", "RMSNorm", _rms_norm)
        | _of("Gemma2 Gemma3", "RMSNorm", _gemma_rms_norm),
        lambda module: type(module).__name__.endswith("RMSNorm"),
        _unfit_rms_norm,
    ),
    "rope": Replacement(
        rope_op.OP,
        FLOATS,
        _of("Llama Mistral Qwen2 Qwen3 Phi3 SmolLM3 Gemma2 Gemma3", "Attention", rotary.attention)
        | {"ModernBertAttention": rotary.modernbert_attention},
        rotary.looks_like_one,
        rotary.misfit,
    ),
}
