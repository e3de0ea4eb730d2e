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
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from gradsmith_kernels.backends import BackendError, Op
from gradsmith_kernels.glu import geglu, swiglu
from gradsmith_kernels.glu import op as glu_op
from gradsmith_kernels.layer_norm import layer_norm
from gradsmith_kernels.layer_norm import op as layer_norm_op
from gradsmith_kernels.linear import linear
from gradsmith_kernels.linear import op as linear_op
from gradsmith_kernels.rms_norm import op as rms_norm_op
from gradsmith_kernels.rms_norm import rms_norm
from gradsmith_kernels.rope import op as rope_op
from gradsmith_kernels.rope import rope

Forward = Callable[..., Any]
Maker = Callable[[Forward], Forward]  # a class's own forward -> the one in its place

# ------------------------------------------------------------------------- exchanging a forward


class Accelerated:
    """Marks the classes that are made here."""


_made: dict[tuple[type, Maker], type[Any]] = {}


def subclass(cls: type[Any], make: Maker) -> type[Any]:
    """`cls` with the forward that `make` makes of its own.

    It has the name of `cls`: transformers and FSDP look classes up by name, and save_pretrained
    writes it.
    """
    if (cls, make) not in _made:
        forward = make(cls.forward)
        functools.update_wrapper(forward, cls.forward)  # the HF Trainer reads its signature
        _made[cls, make] = type(
            cls.__name__,
            (cls,) if issubclass(cls, Accelerated) else (Accelerated, cls),
            {
                "forward": forward,
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__reduce_ex__": _reduce,
                "_made_of": (*getattr(cls, "_made_of", (cls,)), make),
            },
        )
    return _made[cls, make]


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """For copy and pickle: under the name of the class they would find the class it was made of."""
    reduced: Any = object.__reduce_ex__(self, 2)
    return (_new, self._made_of, *reduced[2:])


def _new(cls: Any, *makers: Maker) -> Any:
    for make in makers:
        cls = subclass(cls, make)
    return cls.__new__(cls)


def exchange(module: nn.Module, cls: type[nn.Module]) -> Callable[[], None]:
    """Gives a module another class; returns what undoes it."""
    before = type(module)
    module.__class__ = cls

    def undo() -> None:
        if type(module) is not cls:
            raise RuntimeError(
                f"a {before.__name__} has since been given the class {type(module).__qualname__}; "
                "undo that first"
            )
        module.__class__ = before

    return undo


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


def watched(module: nn.Module) -> bool:
    """Whether somebody's hooks see what a module is given and gives, or change it.

    Those of DeepSpeed are not counted: under ZeRO-3 every module has them, to gather its weights.
    """
    hooks = (
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *module._backward_hooks.values(),
    )
    return any(
        not (getattr(hook, "__module__", None) or "").startswith("deepspeed.") for hook in hooks
    )


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

    (What DeepSpeed's hooks gather are weights; here are none.)
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


# ------------------------------------------------------------------------------ rotary attention

ROTARY = "apply_rotary_pos_emb"


def _rotary_attention(original: Any, keeps_dtype: bool = False) -> Forward:
    """The class's own forward in a copy of its module's namespace, where one name is ours.

    The module's namespace itself stays as it is. The copy has no __name__, by which torch.compile
    would look the name up in the module.
    """
    inner = _decorated(original)
    if inner is None:
        namespace = {k: value for k, value in original.__globals__.items() if k != "__name__"}
        namespace[ROTARY] = _rotary(original.__globals__[ROTARY], keeps_dtype)
        return _copied(original, namespace, original.__closure__ or ())
    ours = _rotary_attention(inner, keeps_dtype)
    cells = original.__closure__ or ()
    cells = tuple(CellType(ours) if cell.cell_contents is inner else cell for cell in cells)
    return _copied(original, original.__globals__, cells)


def _decorated(function: Any) -> Any:
    """What a decorator's function calls (as one that takes an argument by its old name too), where
    a copy of it could call another."""
    inner = getattr(function, "__wrapped__", None)
    cells = getattr(function, "__closure__", None) or ()
    return inner if any(cell.cell_contents is inner for cell in cells) else None


def _copied(original: Any, namespace: dict[str, Any], cells: tuple[CellType, ...]) -> Forward:
    """The function with other globals, and with other values for the names around it."""
    copy = FunctionType(
        original.__code__, namespace, original.__name__, original.__defaults__, cells
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


def _modernbert_attention(original: Any) -> Forward:
    return _rotary_attention(original, keeps_dtype=True)


def _rotary(original: Forward, keeps_dtype: bool) -> Forward:
    """apply_rotary_pos_emb by `rope`. keeps_dtype: the result has q's dtype, whatever cos has."""

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> Any:
        batch, _, length, size = q.shape
        dtype = q.dtype if keeps_dtype else torch.promote_types(q.dtype, cos.dtype)
        fits = (
            unsqueeze_dim == 1
            and q.dtype == k.dtype
            and q.shape[2] == k.shape[2]
            and cos.dim() == 3
            and cos.shape == sin.shape
            and cos.shape[0] in (1, batch)
            and cos.shape[1] == length
            and cos.shape[2] <= size
            and cos.dtype == sin.dtype
            and cos.dtype in (dtype, torch.float32)
            and not (cos.requires_grad or sin.requires_grad)
        )
        if not fits:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        q, k = rope(q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotary_pos_emb


# --------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Kind:
    """The modules that one op goes under.

    op, dtypes: the op, and what its kernels take.
    makers: the class's name in transformers -> what makes its forward. Only classes whose formula
        is known: others called RMSNorm gate their input, and other rotations are multimodal.
    resembles: whether a module looks like one of them, so that a report has to speak of it.
    misfit: why a module of such a class is not one after all.
    """

    op: Op
    dtypes: tuple[torch.dtype, ...]
    makers: Mapping[str, Maker]
    resembles: Callable[[nn.Module], bool]
    misfit: Callable[[Any], str | None]

    def concerns(self, module: nn.Module) -> bool:
        """Whether a report of this op has to speak of `module`."""
        return self._maker(module) is not None or self.resembles(module)

    def unfit(self, module: nn.Module, model: nn.Module) -> str | None:
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

    def _maker(self, module: nn.Module) -> Maker | None:
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


class _LinearKind(Kind):
    """Where the op has nothing of ours to give, which is most machines, there is nothing to say."""

    def concerns(self, module: nn.Module) -> bool:
        if self._maker(module) is None or isinstance(module, Accelerated):
            return False
        weight: Any = module.weight
        return linear_op.dweight_backend(weight.device.type, weight.dtype) != "reference"

    def backend(self, module: nn.Module, model: nn.Module) -> str:
        weight: Any = module.weight
        return linear_op.dweight_backend(weight.device.type, weight.dtype)


def _of(families: str, suffix: str, maker: Maker) -> dict[str, Maker]:
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


def _unfit_rope(module: Any) -> str | None:
    forward = type(module).forward
    while inner := _decorated(forward):
        forward = inner
    apply = getattr(forward, "__globals__", {}).get(ROTARY)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return f"its forward is not one that calls {ROTARY}"
    if getattr(apply, "__module__", None) != forward.__module__:
        return f"somebody has exchanged its {ROTARY}"
    if not getattr(module, "use_rope", True):
        return "it is a layer without rotary positions"
    return None


def _rotates(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = code.co_names if code else ()
    return any(name.startswith("apply_") and "rot" in name for name in names)


KINDS = {
    "glu": Kind(
        glu_op.OP,
        glu_op.FLOATS,
        _of("Llama Mistral Qwen2 Qwen3 SmolLM3 Gemma2 Gemma3", "MLP", _gate_and_up)
        | {"Dinov2SwiGLUFFN": _gate_and_up, "Phi3MLP": _phi3_mlp, "ModernBertMLP": _modernbert_mlp},
        _has_gate,
        _unfit_glu,
    ),
    "layer_norm": Kind(
        layer_norm_op.OP,
        rms_norm_op.FLOATS,
        {"LayerNorm": _layer_norm, "ConvNextLayerNorm": _conv_next_layer_norm},
        lambda module: type(module).__name__.endswith("LayerNorm"),
        _unfit_layer_norm,
    ),
    "linear": _LinearKind(
        linear_op.OP,
        linear_op.FLOATS,
        {"Linear": _linear},
        lambda module: False,
        lambda module: None,
    ),
    "rms_norm": Kind(
        rms_norm_op.OP,
        rms_norm_op.FLOATS,
        _of("Llama Mistral Qwen2 Qwen3 Phi3 SmolLM3", "RMSNorm", _rms_norm)
        | _of("Gemma2 Gemma3", "RMSNorm", _gemma_rms_norm),
        lambda module: type(module).__name__.endswith("RMSNorm"),
        _unfit_rms_norm,
    ),
    "rope": Kind(
        rope_op.OP,
        rope_op.FLOATS,
        _of("Llama Mistral Qwen2 Qwen3 Phi3 SmolLM3 Gemma2 Gemma3", "Attention", _rotary_attention)
        | {"ModernBertAttention": _modernbert_attention},
        _rotates,
        _unfit_rope,
    ),
}
