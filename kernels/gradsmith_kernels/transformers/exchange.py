"""Another forward for a module that stays what it was: it is given a subclass of its own class.

Parameters, state-dict names, hooks, `isinstance`, copying, pickling and saving do not see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]
ForwardMaker = Callable[[Forward], Forward]  # a class's own forward -> the one in its place


class Accelerated:
    """Marks the classes that are made here."""


_made: dict[tuple[type, ForwardMaker], type[Any]] = {}


def subclass(cls: type[Any], make: ForwardMaker) -> type[Any]:
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


def _new(cls: Any, *makers: ForwardMaker) -> Any:
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
