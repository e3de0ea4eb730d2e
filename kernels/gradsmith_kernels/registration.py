"""How an op's operators are made known to torch: by hand, at half the price of a call that
torch.library.register_autograd has, which small tensors notice (docs/log.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]


def register(name: str, function: Kernel, fake: Kernel, autograd: Kernel | None = None) -> None:
    """Registers what computes gradsmith::`name`, its shapes and, where it has one, its gradient."""
    torch.library.impl(f"gradsmith::{name}", "CompositeExplicitAutograd", function)
    if autograd is not None:
        torch.library.impl(f"gradsmith::{name}", "Autograd", autograd)
    torch.library.register_fake(f"gradsmith::{name}", fake)


def differentiable(*arguments: Any) -> bool:
    """Whether autograd is to record a call with these arguments."""
    return torch.is_grad_enabled() and any(
        isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
    )


def without_second_derivative(operator: Any, refusal: str) -> Kernel:
    """The autograd kernel of a backward operator, whose own gradient is refused.

    Args:
        operator: the overload.
        refusal: how the error begins: "rms_norm has".
    """

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> None:
            raise RuntimeError(f"{refusal} no second derivative (create_graph=True)")

    apply: Any = Backward.apply  # untyped in torch, and it takes no keywords

    def autograd(*arguments: Any) -> Any:
        if differentiable(*arguments):
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return autograd
