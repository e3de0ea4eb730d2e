"""From a recipe to a DeepSpeed engine; the DeepSpeed dict is derived here and nowhere else."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from ..errors import UserError
from ..recipe import Muon, Recipe

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def init_distributed() -> None:
    """Joins the process group: nccl on GPUs, gloo on CPUs, a group of one without a launcher.

    Safe to call more than once.
    """
    if not dist.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if gpu else "gloo"
        if launched():
            store, *_ = next(dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # torchrun keeps one store over its restarts. In it stand the addresses of the
                # ranks that died, and gloo would connect to those. (Several machines need not
                # have counted the same restarts.)
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"attempt-{attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank(), world_size=world())
        else:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed reads them
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed

    if not deepspeed.comm.is_initialized():
        # Its shared-memory collectives serve inference only, and would be compiled here and now.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)


def end_rank(code: int) -> NoReturn:
    """Ends this process of a launch without taking the interpreter down.

    A rank that has done all its work would now and then (1 in 12 with gloo) end in std::terminate
    there, on a thread that DeepSpeed's references to the process group keep alive; the launcher
    would take it for a failed run.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launched() -> bool:
    """Whether a launcher (torchrun, DeepSpeed's, srun around one) started this process."""
    return "MASTER_ADDR" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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


def clips_itself(recipe: Recipe) -> bool:
    """Whether the optimizer clips: DeepSpeed tells no gradient norm at stage 0 in float32."""
    return recipe.training.zero.stage == 0 and recipe.training.precision == "fp32"


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
        _spare_a_lone_rank(engine)
    _clip_in_the_sweep(engine)
    _forget_skipped_gradients(engine)
    return engine


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


def _clip_in_the_sweep(engine: DeepSpeedEngine) -> None:
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


def _spare_a_lone_rank(engine: DeepSpeedEngine) -> None:
    """One rank has nothing to average. Yet DeepSpeed copies all gradients into a bucket, rounds
    those that were summed in float32 to 16 bits on the way, and copies them back.

    Where its optimizer reduces by itself (stages 2 and 3, stage 1 but for bf16), that moves the
    gradients to where the step reads them, and stays.
    """
    itself = hasattr(engine.optimizer, "reduce_gradients")
    if not itself and not engine.zero_optimization_partition_gradients():
        engine.enable_backward_allreduce = False


def _forget_skipped_gradients(engine: DeepSpeedEngine) -> None:
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


def publish_weights(engine: DeepSpeedEngine) -> None:
    """Rounds the float32 weights that the optimizer holds into the model, as a step does."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "update_lp_params"):  # stages 1 and 2
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp16_groups"):  # stage 0 in 16 bits
        for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for weight, master in zip(group, masters, strict=True):
                weight.data.copy_(master.data)


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


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


# ------------------------------------------------------------------------------------ precision


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
