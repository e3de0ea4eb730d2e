"""All that touches DeepSpeed's own names. Written for DeepSpeed 0.19."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


STATE_BLOCK = (
    256  # elements of an 8-bit state that share a scale; as gradsmith_kernels.optim has it
)


@dataclass(frozen=True)
class Shard:
    """A stretch of a parameter whose float32 weights and states this rank holds.

    `owner` is the tensor that the optimizer steps (DeepSpeed flattens parameters into a few);
    the stretch is `owner[offset : offset + length]`, and `name[start : start + length]`.
    """

    name: str
    start: int
    length: int
    owner: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This stretch of the owner, or of a state of the owner's shape."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]

    def blocks(self, scales: torch.Tensor) -> torch.Tensor:
        """The scales of the blocks of an 8-bit state that this stretch lies in."""
        return scales[self.offset // STATE_BLOCK : -(-(self.offset + self.length) // STATE_BLOCK)]


def shards(engine: DeepSpeedEngine) -> Iterator[Shard]:
    """The shards of this rank, under any ZeRO stage (DeepSpeed 0.19)."""
    wrapper = engine.optimizer
    stage = engine.zero_optimization_stage()
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 0:
        groups = getattr(wrapper, "fp16_groups", None)
        if groups is None:  # float32: the parameters themselves are stepped
            owners = {id(p): p for _, p in named}
        else:
            pairs = zip(groups, wrapper.fp32_groups, strict=True)
            owners = {id(a): b for g16, g32 in pairs for a, b in zip(g16, g32, strict=True)}
        for name, parameter in named:
            yield Shard(name, 0, parameter.numel(), owners[id(parameter)], 0)
    elif stage in (1, 2):
        flats = flat_partitions(engine)
        for name, parameter in named:
            mapping = parameter._hp_mapping
            if mapping is not None:
                yield Shard(
                    name,
                    mapping.lp_fragment_address.start,
                    mapping.lp_fragment_address.numel,
                    flats[mapping.param_group_index],
                    mapping.hp_fragment_address.start,
                )
    else:
        flats = flat_partitions(engine)
        for name, parameter in named:
            group, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = size * dist.get_rank()
            length = min(size, parameter.ds_numel - start)
            if length > 0:
                yield Shard(name, start, length, flats[group], offset)


def flat_partitions(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The flat float32 tensors that this rank's optimizer steps, under ZeRO 1 to 3."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return wrapper.fp32_partitioned_groups_flat
    flats = getattr(wrapper, "single_partition_of_fp32_groups", None)
    if flats is None:  # bf16 weights with float32 gradients at stage 1
        flats = wrapper.fp32_groups_flat_partition
    return flats


def clip_inside_optimizer(engine: DeepSpeedEngine) -> None:
    """Lets the optimizer scale the gradients as it reads them: DeepSpeed would go over all of them
    once more, and in float32 would step on a gradient that is not finite.

    At stage 0, and at stage 1 in bf16, other classes of DeepSpeed clip, each in its own way.
    """
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if engine.zero_optimization_stage() == 0 or not hasattr(wrapper, "unscale_and_clip_grads"):
        return

    def set_scale(_: Any, scaled_norm: torch.Tensor | float) -> None:
        norm = float(scaled_norm) / wrapper.loss_scale
        clipped = max(1.0, (norm + 1e-6) / wrapper.clip_grad) if wrapper.clip_grad else 1.0
        optimizer.grad_scale = clipped * wrapper.loss_scale
        optimizer.found_inf = not 0 <= norm < math.inf  # DeepSpeed says -1 for one with NaN in it

    wrapper.unscale_and_clip_grads = set_scale


def skip_allreduce_for_one_rank(engine: DeepSpeedEngine) -> None:
    """One rank has nothing to average. Yet DeepSpeed copies all gradients into a bucket, rounds
    those that were summed in float32 to 16 bits on the way, and copies them back.

    Where its optimizer reduces by itself (stages 2 and 3, stage 1 but for bf16), that moves the
    gradients to where the step reads them, and stays.
    """
    itself = hasattr(engine.optimizer, "reduce_gradients")
    if not itself and not engine.zero_optimization_partition_gradients():
        engine.enable_backward_allreduce = False


def clear_gradients_of_skipped_step(engine: DeepSpeedEngine) -> None:
    """DeepSpeed 0.19 with offload keeps the gradients of a step that it skipped and adds the next
    ones to them: after one that is not finite no step would ever be made again."""
    wrapper = engine.optimizer
    if not getattr(wrapper, "cpu_offload", False) or not hasattr(wrapper, "reset_cpu_buffers"):
        return
    reset = wrapper.reset_cpu_buffers

    def reset_and_forget() -> None:
        reset()
        wrapper.averaged_gradients = dict.fromkeys(wrapper.averaged_gradients)

    wrapper.reset_cpu_buffers = reset_and_forget


def publish_weights(engine: DeepSpeedEngine) -> None:
    """Rounds the float32 weights that the optimizer holds into the model, as a step does."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "update_lp_params"):  # stages 1 and 2
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp16_groups"):  # stage 0 in 16 bits
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for weight, master in zip(group, masters, strict=True):
                weight.data.copy_(master.data)
