"""Which precision a run computes in, and what a slower one costs on this machine."""

from __future__ import annotations

import torch

from .errors import UserError
from .ranks import device
from .recipe import Recipe


def settle_precision(recipe: Recipe, going_on: Recipe | None = None) -> Recipe:
    """The recipe with `precision: auto` replaced by what it stands for.

    Args:
        recipe: what to train.
        going_on: the recipe of the run that goes on, whose precision stays, whatever the machine.
    """
    from gradsmith_kernels.backends import fast_bf16

    training = recipe.training
    if training.precision != "auto":
        return recipe
    if going_on is not None and going_on.training.precision != "auto":
        precision = going_on.training.precision
    else:
        precision = "bf16" if fast_bf16(device(), recipe.model.kernels).fast else "fp32"
    training = training.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"training": training})


def precision_price(recipe: Recipe) -> str | None:
    """What a precision costs here that is not the device's fastest; None where it costs nothing."""
    from gradsmith_kernels.backends import fast_bf16

    precision = recipe.training.precision
    bf16 = fast_bf16(device(), recipe.model.kernels)
    if precision == "fp32" and bf16.fast and bf16.ratio is not None:
        return f"fp32 on {bf16.device}: about {bf16.ratio:.2g} times slower than bf16"
    if precision == "bf16" and not bf16.fast:
        if bf16.ratio is None:
            return f"bf16 on {bf16.device} is slower than fp32"
        return f"bf16 on {bf16.device}: about {1 / bf16.ratio:.2g} times slower than fp32"
    return None


def check_precision(recipe: Recipe) -> None:
    """
    Raises:
        UserError: this machine cannot compute in the recipe's precision.
    """
    if recipe.training.precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "training.precision: found fp16, which needs a GPU; on a CPU allowed are "
            "auto, bf16, fp32"
        )
