"""How an op's operators are made known to torch, to its transforms and to Python.

`differentiable` makes gradsmith::name an operator with fake tensors, gradients and vmap, and gives
back the function to call it by. That function goes to the implementation without torch's
dispatcher, whose two passes through Python cost small tensors more than the kernels do
(docs/log.md, "The price of a call"), wherever nobody could tell: in eager mode, on plain tensors,
with no transform, mode, tracer or profiler at work, and only for arguments of types that the
dispatcher has accepted once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

Kernel = Callable[..., Any]

# What kernels take; the reference takes float64 besides.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Types of which nothing but the value counts. Not those of subclasses: they may do anything.
_PLAIN = frozenset(
    (Tensor, nn.Parameter, bool, int, float, str, list, tuple, torch.dtype, NoneType)
)


def register(name: str, function: Kernel, fake: Kernel) -> None:
    """Makes gradsmith::`name`, which writes in place and has no gradient, known to torch."""
    torch.library.impl(f"gradsmith::{name}", "CompositeExplicitAutograd", function)
    torch.library.register_fake(f"gradsmith::{name}", fake)


def differentiable(
    name: str,
    function: Kernel,
    fake: Kernel,
    setup_context: Kernel | None = None,
    backward: Kernel | None = None,
    *,
    title: str = "",
    instead: Kernel | None = None,
) -> Kernel:
    """Makes what was defined as gradsmith::`name` known to torch.

    Args:
        function: computes it. Autocast is off while it does: an op has one dtype for its results.
        fake: the same for tensors without values.
        setup_context: (ctx, inputs, outputs), as torch.autograd.Function has it. A gradient that
            does not arrive is None.
        backward: (ctx, saved, *gradients): the gradients of all arguments; `saved` are the tensors
            that setup_context saved. None: the operator, most often itself a gradient, refuses to
            be differentiated.
        title: how messages call the op; the name's beginning if not given.
        instead: called first with the arguments where autograd records a call; the call is done
            if it returns anything but None.

    Returns:
        The function to call the operator by: all its arguments by position, but for the last ones
        where they have defaults. There is no forward-mode derivative: asking for one raises
        NotImplementedError.
    """
    operator = getattr(torch.ops.gradsmith, name).default
    defaults = tuple(argument.default_value for argument in operator._schema.arguments)
    title = title or name.removesuffix("_backward")
    # The dispatcher takes None for a tensor, and hands it on.
    tensors = [
        (place, argument.name)
        for place, argument in enumerate(operator._schema.arguments)
        if isinstance(argument.type, torch.TensorType)
    ]
    known: set[tuple[type, ...]] = set()  # the types of arguments that the dispatcher has accepted

    def compute(*arguments: Any) -> Any:
        if torch._C._is_any_autocast_enabled():
            with torch._C._DisableAutocast():
                return function(*arguments)
        return function(*arguments)

    def over_samples(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """vmap's rule for every op: one call for each sample, with that sample's own results."""
        results = [
            operator(*(_sample(*pair, i) for pair in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        outputs = tuple(torch.stack(output) for output in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    class Recorded(torch.autograd.Function):
        """The operator in the graph of autograd, or in those of torch.func's transforms."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            # Transforms farther out take derivatives of this one, with modes of their own.
            outer = torch._C._are_functorch_transforms_active()
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch.set_grad_enabled(outer),
                forward_ad._set_fwd_grad_enabled(outer),
            ):
                return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            if backward is None:
                which = "derivative" if title == name else "second derivative (create_graph=True)"
                raise RuntimeError(f"{title} has no {which}")
            if all(gradient is None for gradient in gradients):
                return (None,) * len(ctx.needs_input_grad)
            # Beyond the transform that wrapped them, saved tensors have to be unwrapped by hand.
            saved = tuple(
                tensor if tensor is None else _functorch.unwrap_if_dead(tensor)
                for tensor in ctx.saved_tensors
            )
            return backward(ctx, saved, *gradients)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            instead = "" if backward is None else "; torch.func.vjp and jacrev work"
            raise NotImplementedError(
                f"{title} has no forward-mode derivative (torch.func.jvp, jacfwd, "
                f"torch.autograd.forward_ad){instead}"
            )

    class Direct(Recorded):
        """The same, where the dispatcher has nothing to add."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return compute(*arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            if backward is None or gradients[0] is None:
                return Recorded.backward(ctx, *gradients)
            return backward(ctx, ctx.saved_tensors, *gradients)

    for recording in (Recorded, Direct):
        recording.__name__ = recording.__qualname__ = name
    # Function.apply without its own way through transforms, and without reading signatures.
    base: Any = torch.autograd.Function
    apply_recorded: Kernel = super(base, Recorded).apply
    apply_direct: Kernel = super(base, Direct).apply

    def recorded(*arguments: Any) -> Any:
        """What the dispatcher calls first: into the graph of autograd, or past it."""
        if _records(arguments):
            arguments = (*arguments, *defaults[len(arguments) :])
            if torch._C._are_functorch_transforms_active():
                # The dispatcher goes through the transforms one by one. This is one of them.
                with enable_single_level_autograd_function():
                    return apply_recorded(*arguments)
            result = None if instead is None else instead(*arguments)
            return apply_recorded(*arguments) if result is None else result
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def call(*arguments: Any) -> Any:
        """The operator, past the dispatcher where nobody could tell."""
        if torch.compiler.is_compiling():
            return operator(*arguments)
        kinds = tuple(map(type, arguments))
        if kinds not in known:
            for place, argument in tensors:
                if not isinstance(arguments[place], Tensor):
                    found = type(arguments[place]).__name__
                    raise TypeError(f"{title}: {argument} is {found}; it must be a tensor")
        if kinds not in known or _watched() or arguments[0].is_meta:
            result = operator(*arguments)
            if _PLAIN.issuperset(kinds):
                known.add(kinds)
            return result
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            arguments = (*arguments, *defaults[len(arguments) :])
            result = None if instead is None else instead(*arguments)
            return apply_direct(*arguments) if result is None else result
        return compute(*arguments)

    register(name, compute, fake)
    torch.library.impl(f"gradsmith::{name}", "Autograd", recorded)
    torch.library.register_vmap(f"gradsmith::{name}", over_samples)
    return call


def _records(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd is to see a call: for a gradient, or for a tangent, which is refused."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and bool(torch._C._any_requires_grad(*arguments))


def _watched() -> bool:
    """Whether somebody at this moment is to see operators, not what they do."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _sample(argument: Any, dim: Any, index: int) -> Any:
    batched = isinstance(argument, Tensor) and dim is not None
    return argument.select(dim, index) if batched else argument
