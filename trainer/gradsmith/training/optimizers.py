"""What an optimizer is given: groups of parameters, its class and options."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ranks import device
from ..recipe import Muon, Recipe


def parameter_groups(recipe: Recipe, model: torch.nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups. A group's `lr_ratio` is its rate over the schedule's."""
    settings = recipe.training.optimizer
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2]
    decay = settings.weight_decay
    # Decay pulls matrices towards zero; on gains and biases it only fights the scale.
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    if isinstance(settings, Muon):
        # Rows of embeddings and of the output layer are stepped for one token each: they are not
        # maps between features, whose directions Muon evens out.
        tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        output = model.get_output_embeddings()  # type: ignore[operator]
        outside = {id(p) for p in (*tables, getattr(output, "weight", None))}
        hidden = [p for p in matrices if p.ndim == 2 and id(p) not in outside]
        inside = {id(p) for p in hidden}
        groups[0]["params"] = [p for p in matrices if id(p) not in inside]
        ratio = 1.0 if settings.adamw_lr is None else settings.adamw_lr / settings.lr
        groups = [group | {"use_muon": False, "lr_ratio": ratio} for group in groups]
        groups.append({"params": hidden, "weight_decay": decay, "use_muon": True})
    return [group for group in groups if group["params"]]


def build_optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> Any:
    """The recipe's optimizer from gradsmith_kernels.optim."""
    from gradsmith_kernels import optim

    settings, training = recipe.training.optimizer, recipe.training
    cls = {
        "adamw": optim.AdamW,
        "adam": optim.Adam,
        "adamw8bit": optim.AdamW8bit,
        "lion": optim.Lion,
        "sgd": optim.SGD,
        "adagrad": optim.Adagrad,
        "lamb": optim.LAMB,
        "schedule_free": optim.ScheduleFreeAdamW,
        "adafactor": optim.Adafactor,
        "muon": optim.Muon,
    }[settings.name]
    given, names = dict(settings), ("betas", "eps", "momentum", "nesterov", "adjust_lr_fn")
    options = {name: given[name] for name in names if name in given}
    if settings.name == "muon":  # whose own eps is another
        options |= {f"adamw_{name}": options.pop(name) for name in ("betas", "eps")}
    if settings.name != "lamb":
        options["l1"] = settings.l1
    if given.get("states") == "bf16":
        options["state_dtype"] = torch.bfloat16
    if clips_itself(recipe):
        options["max_grad_norm"] = training.clip or math.inf
    return cls(
        groups,
        lr=0.0,  # the loop sets the rate of every step
        seed=recipe.seed,
        stochastic_rounding=given.get("rounding") != "nearest",
        **options,
    )


def optimizer_ops(recipe: Recipe) -> dict[str, str]:
    """The kernel library's ops that step the weights, and where each of them runs."""
    name, where = recipe.training.optimizer.name, optimizer_device(recipe)
    if name == "adafactor":
        return {"adafactor_step": where}
    if name == "muon":  # matrices are orthogonalised on the ranks' devices, also with offload
        return {"optimizer_step": where, "newton_schulz": device().type}
    return {"optimizer_step": where}


def optimizer_device(recipe: Recipe) -> str:
    """Where the optimizer's arithmetic runs."""
    return "cpu" if recipe.training.zero.offload != "none" else device().type


def clips_itself(recipe: Recipe) -> bool:
    """Whether the optimizer clips: DeepSpeed tells no gradient norm at stage 0 in float32."""
    return recipe.training.zero.stage == 0 and recipe.training.precision == "fp32"
