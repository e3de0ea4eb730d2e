"""gradsmith::linear_cross_entropy: schemas, checks, fakes, autograd, backends.

hidden, dhidden (..., C); weight, dweight (V, C); bias, dbias (V,); target (...,) int64; loss () or
(...,) float32; lse (...,) float64. A backend sees the N tokens that count, as rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsmith_kernels.backends import Implementation, Op
from gradsmith_kernels.ops.common.registration import FLOATS, differentiable
from gradsmith_kernels.ops.linear_cross_entropy.reference import TILE_ROOM, Options

REDUCTIONS = ("mean", "sum", "none")
OP = Op(
    "linear_cross_entropy",
    {
        "reference": Implementation(f"{__package__}.reference", (*FLOATS, torch.float64)),
        "cpu": Implementation(f"{__package__}.cpu", FLOATS),
        "triton": Implementation(f"{__package__}.triton_kernels", FLOATS),
    },
)

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_FACTORS = "float label_smoothing, float z_loss, float softcap"
_OPTIONS = f"int ignore_index, {_FACTORS}, str reduction, int? chunk"
_NEEDS = "bool need_dhidden, bool need_dweight, bool need_dbias"
_GRADIENTS = "Tensor dhidden, Tensor dweight, Tensor dbias"
# lse has target's shape, float64, and is 0 where the target is ignored.
torch.library.define(
    "gradsmith::linear_cross_entropy",
    f"({_INPUTS}, {_OPTIONS}, str? backend=None) -> (Tensor loss, Tensor lse)",
)
# Of a backend that makes gradients in the forward pass: those of the sum of losses, as it keeps
# them, without the tokens that are ignored; `_scale` makes gradients of them.
torch.library.define(
    "gradsmith::linear_cross_entropy_with_gradients",
    f"({_INPUTS}, {_OPTIONS}, {_NEEDS}, str? backend=None)"
    f" -> (Tensor loss, Tensor lse, {_GRADIENTS})",
)
torch.library.define(
    "gradsmith::linear_cross_entropy_scale",
    "(Tensor dloss, Tensor target, Tensor sum_dhidden, Tensor sum_dweight, Tensor sum_dbias,"
    " SymInt size, ScalarType dtype, int ignore_index, str reduction, str? backend=None)"
    f" -> ({_GRADIENTS})",
)
torch.library.define(
    "gradsmith::linear_cross_entropy_backward",
    f"(Tensor dloss, Tensor lse, {_INPUTS}, {_OPTIONS}, {_NEEDS}, str? backend=None)"
    f" -> ({_GRADIENTS})",
)


class Call(NamedTuple):
    """What every one of these operators is asked for: the schemas' tensors and options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: str
    chunk: int | None

    @property
    def options(self) -> Options:
        return Options(self.label_smoothing, self.z_loss, self.softcap, self.chunk)


ARGUMENTS = len(Call._fields)


def _needs_and_backend(rest: tuple[Any, ...]) -> tuple[tuple[bool, bool, bool], str | None]:
    """What follows a call in the arguments of the operators that make gradients."""
    return rest[:3], rest[3] if len(rest) > 3 else None


def _check(call: Call) -> None:
    """What can be said without reading a tensor's values."""
    hidden, weight, bias, target, *_ = call
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (*FLOATS, torch.float64):
            raise TypeError(
                f"linear_cross_entropy: {name} is {tensor.dtype}; it must be float32, bfloat16, "
                "float16 or float64"
            )
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"linear_cross_entropy: {name} is {tensor.dtype}, hidden is {hidden.dtype}; they "
                "must agree"
            )
    if target.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: target is {target.dtype}; it must be int64")
    if hidden.dim() < 1 or hidden.shape[:-1] != target.shape:
        raise ValueError(
            "linear_cross_entropy: target must have one element a row of hidden: hidden is "
            f"{tuple(hidden.shape)}, target is {tuple(target.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"linear_cross_entropy: weight must be (V, {hidden.shape[-1]}) with V > 0; it is "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias must be ({weight.shape[0]},); it is {tuple(bias.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("target", target)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"linear_cross_entropy: hidden is on {hidden.device}, {name} on {tensor.device}"
            )
    if not 0 <= call.label_smoothing <= 1:
        raise ValueError(
            f"linear_cross_entropy: label_smoothing is {call.label_smoothing}; it must be in [0, 1]"
        )
    for name, value in (("z_loss", call.z_loss), ("softcap", call.softcap)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"linear_cross_entropy: {name} is {value}; it must be >= 0")
    if call.reduction not in REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction is {call.reduction!r}; it must be one of "
            f"{', '.join(REDUCTIONS)}"
        )
    if call.chunk is not None and call.chunk <= 0:
        raise ValueError(f"linear_cross_entropy: chunk is {call.chunk}; it must be > 0, or None")


class _Tokens:
    """The tokens that count, as rows; and the way back to target's shape."""

    def __init__(self, target: Tensor, ignore_index: int) -> None:
        self.shape, flat = target.shape, target.reshape(-1).contiguous()
        counts = flat != ignore_index
        self.index = None if bool(counts.all()) else counts.nonzero().squeeze(1)
        self.target = self.take(flat)

    def take(self, rows: Tensor) -> Tensor:
        return rows if self.index is None else rows.index_select(0, self.index)

    def put(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.index is None:
            return rows.reshape(shape)
        every = rows.new_zeros((self.shape.numel(), *rows.shape[1:]))
        return every.index_copy_(0, self.index, rows).reshape(shape)

    def check(self, vocabulary: int) -> None:
        """Raises IndexError for the first target outside the vocabulary."""
        wrong = (self.target < 0) | (self.target >= vocabulary)
        if not bool(wrong.any()):
            return
        first = wrong.nonzero()[0]
        value = self.target[first].item()
        at = int(first.item() if self.index is None else self.index[first].item())
        place: list[str] = []
        for size in reversed(self.shape):
            at, rest = divmod(at, size)
            place.insert(0, str(rest))
        raise IndexError(
            f"linear_cross_entropy: target[{', '.join(place)}] is {value}; it must be in "
            f"[0, {vocabulary}), or ignore_index"
        )


def _reduce(loss: Tensor, tokens: _Tokens, reduction: str, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    if reduction == "none":
        return tokens.put(loss, tokens.shape).to(wide)
    total = loss.sum(dtype=torch.float64)
    return (total / max(1, len(loss)) if reduction == "mean" else total).to(wide)


def _loss_and_lse(
    call: Call, sums: tuple[Tensor | None, ...] | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and lse (target's shape, float64); with `sums`, memory for gradients, the
    backend writes those of the losses' sum there as well."""
    _check(call)
    hidden, weight, bias, target, *_ = call
    tokens = _Tokens(target, call.ignore_index)
    tokens.check(len(weight))
    module = OP.choose(backend, hidden.device, hidden.dtype)
    rows = tokens.take(hidden.reshape(target.numel(), hidden.shape[-1]))
    arguments = (rows, weight, bias, tokens.target, call.options)
    if sums is None:
        loss, lse = module.forward(*arguments)
    else:
        loss, lse = module.forward_with_gradients(*arguments, sums)
    return _reduce(loss, tokens, call.reduction, hidden.dtype), tokens.put(lse, tokens.shape)


def _linear_cross_entropy(*arguments: Any) -> tuple[Tensor, Tensor]:
    backend = arguments[ARGUMENTS] if len(arguments) > ARGUMENTS else None
    return _loss_and_lse(Call(*arguments[:ARGUMENTS]), None, backend)


def _linear_cross_entropy_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments[:ARGUMENTS])
    _check(call)
    wide = torch.promote_types(call.hidden.dtype, torch.float32)
    loss = call.hidden.new_empty(call.target.shape if call.reduction == "none" else (), dtype=wide)
    return loss, call.hidden.new_empty(call.target.shape, dtype=torch.float64)


def _memory_of_sums(call: Call, needs: tuple[bool, ...], backend: str | None) -> list[Tensor]:
    """For the gradients of the losses' sum, float32, of the shapes that the backend keeps."""
    hidden = call.hidden
    module = OP.choose(backend, hidden.device, hidden.dtype)
    sizes = (call.target.numel(), call.weight.shape[0], hidden.shape[-1])
    shapes = module.gradient_shapes(*sizes, needs)
    return [hidden.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _with_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments[:ARGUMENTS])
    needs, backend = _needs_and_backend(arguments[ARGUMENTS:])
    sums = _memory_of_sums(call, needs, backend)
    wanted = tuple(buffer if need else None for buffer, need in zip(sums, needs, strict=True))
    return *_loss_and_lse(call, wanted, backend), *sums


def _with_gradients_fake(*arguments: Any) -> tuple[Tensor, ...]:
    outputs = _linear_cross_entropy_fake(*arguments[:ARGUMENTS])
    needs, backend = _needs_and_backend(arguments[ARGUMENTS:])
    return *outputs, *_memory_of_sums(Call(*arguments[:ARGUMENTS]), needs, backend)


def _scale(
    dloss: Tensor,
    target: Tensor,
    sum_dhidden: Tensor,
    sum_dweight: Tensor,
    sum_dbias: Tensor,
    size: int,
    dtype: torch.dtype,
    ignore_index: int,
    reduction: str,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from those of the losses' sum, as `with_gradients` keeps them: times dloss, over
    the tokens that count where the loss is a mean, at their places in hidden (..., size)."""
    module = OP.choose(backend, dloss.device, dtype)
    tokens = _Tokens(target, ignore_index)
    factor = dloss.item()
    if reduction == "mean":
        factor /= max(1, len(tokens.target))
    dhidden = sum_dhidden.new_empty(0, dtype=dtype)
    if len(sum_dhidden):
        rows = module.scale(sum_dhidden, len(tokens.target), size, factor, dtype)
        dhidden = tokens.put(rows, (*target.shape, size))
    dweight = module.scale(sum_dweight, max(0, len(sum_dweight) - TILE_ROOM), size, factor, dtype)
    return dhidden, dweight, (sum_dbias * factor).to(dtype)


def _scale_fake(
    dloss: Tensor,
    target: Tensor,
    sum_dhidden: Tensor,
    sum_dweight: Tensor,
    sum_dbias: Tensor,
    size: int,
    dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for tensors without values."""
    dhidden = (*target.shape, size) if sum_dhidden.shape[0] else (0,)
    dweight = (sum_dweight.shape[0] - TILE_ROOM, size) if sum_dweight.shape[0] else (0,)
    shapes = (dhidden, dweight, sum_dbias.shape)
    one, two, three = (dloss.new_empty(shape, dtype=dtype) for shape in shapes)
    return one, two, three


def _backward(dloss: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias from the loss's gradient and lse; one not needed is empty."""
    call = Call(*arguments[:ARGUMENTS])
    needs, backend = _needs_and_backend(arguments[ARGUMENTS:])
    hidden, weight, bias, target, *_ = call
    tokens = _Tokens(target, call.ignore_index)
    count = len(tokens.target)
    if call.reduction == "none":
        upstream = tokens.take(dloss.reshape(-1))
    else:
        upstream = (dloss / max(1, count) if call.reduction == "mean" else dloss).expand(count)
    dhidden, dweight, dbias = OP.choose(backend, hidden.device, hidden.dtype).backward(
        upstream,
        tokens.take(lse.reshape(-1)),
        tokens.take(hidden.reshape(target.numel(), hidden.shape[-1])),
        weight,
        bias,
        tokens.target,
        call.options,
        needs,
    )
    return tokens.put(dhidden, hidden.shape) if needs[0] else dhidden, dweight, dbias


def _backward_fake(dloss: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight = arguments[:2]
    needs, _ = _needs_and_backend(arguments[ARGUMENTS:])
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    tensors, ctx.options = tensors[:4], tensors[4:]
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _of_linear_cross_entropy(
    ctx: Any, saved: tuple[Any, ...], dloss: Tensor, _: None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    gradients = BACKWARD(dloss, *saved, *ctx.options, *needs, ctx.backend)
    return *_needed(gradients, needs), *(None,) * (2 + len(ctx.options))


def _setup_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, _, _, target, ctx.ignore_index, *_, reduction, _, n1, n2, n3, ctx.backend = inputs
    ctx.needs, ctx.reduction = (n1, n2, n3), reduction
    ctx.size, ctx.dtype = hidden.shape[-1], hidden.dtype
    _, lse, *sums = output
    # The sums are all that the backward pass needs. So weight is not saved: under ZeRO-3 its memory
    # is taken back after the forward pass, and what was saved would be empty. The sums count as
    # differentiable, so that a second derivative is refused instead of being 0.
    ctx.save_for_backward(target, *sums)
    ctx.mark_non_differentiable(lse)


def _of_sums(
    ctx: Any, saved: tuple[Tensor, ...], dloss: Tensor, *_: None
) -> tuple[Tensor | None, ...]:
    gradients = SCALE(
        dloss, *saved, ctx.size, ctx.dtype, ctx.ignore_index, ctx.reduction, ctx.backend
    )
    return *_needed(gradients, ctx.needs), *(None,) * 11


def _needed(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(d if need else None for d, need in zip(gradients, needs, strict=True))


def _with_gradients_instead(*args: Any) -> tuple[Tensor, Tensor] | None:
    """The loss by a backend that makes its gradients in the forward pass; None with another."""
    hidden, weight, bias, *_, reduction, _, backend = args
    module = OP.choose(backend, hidden.device, hidden.dtype)
    if reduction == "none" or not module.GRADIENTS_IN_FORWARD:
        return None
    needs = (x is not None and x.requires_grad for x in (hidden, weight, bias))
    loss, lse, *_ = WITH_GRADIENTS(*args[:-1], *needs, backend)
    return loss, lse


TITLE = "linear_cross_entropy"
LINEAR_CROSS_ENTROPY = differentiable(
    "linear_cross_entropy",
    _linear_cross_entropy,
    _linear_cross_entropy_fake,
    _setup,
    _of_linear_cross_entropy,
    instead=_with_gradients_instead,
)
WITH_GRADIENTS = differentiable(
    "linear_cross_entropy_with_gradients",
    _with_gradients,
    _with_gradients_fake,
    _setup_sums,
    _of_sums,
    title=TITLE,
)
SCALE = differentiable("linear_cross_entropy_scale", _scale, _scale_fake, title=TITLE)
BACKWARD = differentiable("linear_cross_entropy_backward", _backward, _backward_fake)
