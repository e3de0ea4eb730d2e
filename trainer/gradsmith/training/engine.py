"""From a recipe to a DeepSpeed engine; the DeepSpeed dict is derived here and nowhere else."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..ranks import device, world
from ..recipe import Recipe
from .deepspeed_internals import (
    clear_gradients_of_skipped_step,
    clip_inside_optimizer,
    publish_weights,
    skip_allreduce_for_one_rank,
)
from .optimizers import build_optimizer, clips_itself, parameter_groups

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for this recipe on `world` ranks."""
    training = recipe.training
    zero: dict[str, Any] = {"stage": training.zero.stage}
    if training.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if training.zero.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.accumulation(world),
        "gradient_clipping": training.clip or 0.0,
        "zero_optimization": zero,
        # The optimizer is ours, tested under every stage; DeepSpeed knows its own only.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if training.precision != "fp32":
        config[training.precision] = {"enabled": True}
        if training.zero.stage > 0:
            # bf16 sums of many micro-batches lose bits; stage 0 has no such switch.
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if clips_itself(recipe):
        config["gradient_clipping"] = 0.0
    return config


def build_engine(recipe: Recipe, model: torch.nn.Module) -> DeepSpeedEngine:
    """The DeepSpeed engine around `model`, with the recipe's optimizer under it."""
    import deepspeed

    optimizer = build_optimizer(recipe, parameter_groups(recipe, model))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # DeepSpeed steps while it is built, on zero gradients. That would decay the weights, count a
    # step too many, and Muon does not know yet what lies where: those steps are skipped.
    optimizer.found_inf = torch.ones(())
    gc.freeze()  # DeepSpeed collects garbage again and again; what is there already is none
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(recipe, world())
    )
    gc.unfreeze()
    # DeepSpeed rounds buffers to 16 bits too. Rotary frequencies must not be: at position 500 the
    # angle would be off by a radian, and the trained model be another than the one that is loaded.
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = engine.module.get_submodule(owner)
        setattr(module, leaf, buffer.to(getattr(module, leaf).device))
    del optimizer.found_inf
    if recipe.training.optimizer.name == "muon" and recipe.training.zero.stage > 0:
        from .muon import partitions

        optimizer.set_partitions(partitions(engine), device=device())
    if world() == 1:
        skip_allreduce_for_one_rank(engine)
    clip_inside_optimizer(engine)
    clear_gradients_of_skipped_step(engine)
    return engine


@contextlib.contextmanager
def averaged_weights(engine: DeepSpeedEngine) -> Iterator[None]:
    """While it lasts, the model holds the weights that are to be judged and kept.

    With a schedule-free optimizer those are its averages; with others nothing changes.
    """
    optimizer = engine.basic_optimizer
    if not hasattr(optimizer, "train"):
        yield
        return
    optimizer.eval()
    publish_weights(engine)
    yield
    optimizer.train()
    publish_weights(engine)


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
