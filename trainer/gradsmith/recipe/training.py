"""`training`: how long, in which steps, with which optimizer and schedule, on which layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, SerializeAsAny, model_validator

from ..errors import UserError
from .node import Fraction, Node, NotNegative, PositiveFloat, PositiveInt, Variant

Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Eps = Annotated[float, Field(ge=1e-30, allow_inf_nan=False)]


def _states() -> Any:
    return Field("fp32", description="what the states are kept in; bf16 is rounded randomly")


class Optimizer(Variant):
    """One of gradsmith_kernels.optim: what all of them have."""

    lr: PositiveFloat
    weight_decay: NotNegative = 0.0
    l1: NotNegative = Field(0.0, description="proximal L1 penalty, multiplied by lr")

    @classmethod
    def variants(cls) -> Mapping[str, type[Self]]:
        return cast("Mapping[str, type[Self]]", OPTIMIZERS)


class _Momentum(Optimizer):
    momentum: Fraction = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _something_to_look_ahead_with(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(Optimizer):
    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 3e-4
    weight_decay: NotNegative = 0.1
    betas: Betas = Field([0.9, 0.95])
    eps: Eps = 1e-8
    states: Literal["fp32", "bf16"] = _states()


class Adam(Optimizer):
    name: Literal["adam"] = "adam"
    lr: PositiveFloat = 3e-4
    betas: Betas = Field([0.9, 0.95])
    eps: Eps = 1e-8
    states: Literal["fp32", "bf16"] = _states()


class AdamW8bit(Optimizer):
    name: Literal["adamw8bit"] = "adamw8bit"
    lr: PositiveFloat = 3e-4
    weight_decay: NotNegative = 0.1
    betas: Betas = Field([0.9, 0.95])
    eps: Eps = 1e-8
    rounding: Literal["stochastic", "nearest"] = Field("stochastic", description="of the states")


class Lion(Optimizer):
    name: Literal["lion"] = "lion"
    lr: PositiveFloat = 1e-4
    weight_decay: NotNegative = 0.3
    betas: Betas = Field([0.9, 0.99])
    states: Literal["fp32", "bf16"] = _states()


class SGD(_Momentum):
    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1
    states: Literal["fp32", "bf16"] = _states()


class Adagrad(Optimizer):
    name: Literal["adagrad"] = "adagrad"
    lr: PositiveFloat = 1e-2
    eps: Eps = 1e-10
    states: Literal["fp32", "bf16"] = _states()


class LAMB(Optimizer):
    name: Literal["lamb"] = "lamb"
    lr: PositiveFloat = 2e-3
    weight_decay: NotNegative = 0.1
    betas: Betas = Field([0.9, 0.95])
    eps: Eps = 1e-6

    @model_validator(mode="after")
    def _no_l1(self) -> LAMB:
        if self.l1:
            raise ValueError("l1 does not go with lamb, whose steps are scaled by whole tensors")
        return self


class ScheduleFree(Optimizer):
    name: Literal["schedule_free"] = "schedule_free"
    lr: PositiveFloat = 1e-3
    weight_decay: NotNegative = 0.1
    betas: Betas = Field([0.9, 0.95])
    eps: Eps = 1e-8


class Adafactor(Optimizer):
    name: Literal["adafactor"] = "adafactor"
    lr: PositiveFloat = 1e-2


class Muon(_Momentum):
    """betas and eps are those of what AdamW steps."""

    name: Literal["muon"] = "muon"
    lr: PositiveFloat = 3e-4
    weight_decay: NotNegative = 0.1
    momentum: Fraction = 0.95
    nesterov: bool = True
    betas: Betas = Field([0.9, 0.95])
    eps: Eps = 1e-8
    adamw_lr: PositiveFloat | None = Field(
        None, description="peak rate of what AdamW steps; default lr"
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        "match_rms_adamw", description="how a matrix's rate follows its shape"
    )
    states: Literal["fp32", "bf16"] = _states()


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "adamw8bit": AdamW8bit,
    "lion": Lion,
    "sgd": SGD,
    "adagrad": Adagrad,
    "lamb": LAMB,
    "schedule_free": ScheduleFree,
    "adafactor": Adafactor,
    "muon": Muon,
}
# What is of whole tensors, which ZeRO cuts up: optimizers that need stage 0.
OF_WHOLE_TENSORS = {"lamb": "trust ratios", "adafactor": "row and column means"}


class Schedule(Node):
    name: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Fraction = Field(0.02, description="share of the run over which the rate rises")
    final: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="last rate over peak")


class Zero(Node):
    stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"

    @model_validator(mode="after")
    def _possible(self) -> Zero:
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload: optimizer needs stage 1, 2 or 3; stage is 0")
        if self.offload == "all" and self.stage != 3:
            raise ValueError(f"offload: all needs stage 3; stage is {self.stage}")
        return self


class Validate(Node):
    every: PositiveInt = 50
    sequences: PositiveInt = Field(64, description="how many held-out sequences, at most")
    monitor: str | None = Field(
        None, description="the metric whose best checkpoint is kept; default: the task's first"
    )


class Checkpoint(Node):
    every: PositiveInt = 100
    keep: PositiveInt = 2


class EarlyStopping(Node):
    """Ends the run once the monitored metric has not improved for a while."""

    patience: PositiveInt = Field(5, description="validations in a row without an improvement")
    min_delta: NotNegative = Field(0.0, description="an improvement is larger than this")


class Log(Node):
    every: PositiveInt = 1


LENGTHS = ("steps", "tokens", "epochs", "minutes")


class Training(Node):
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    minutes: PositiveFloat | None = None
    global_batch: PositiveInt = Field(16, description="sequences in an optimizer step")
    micro_batch: PositiveInt = Field(4, description="sequences in one forward pass on one rank")
    optimizer: SerializeAsAny[Optimizer] = AdamW()
    schedule: Schedule = Schedule()
    clip: PositiveFloat | None = Field(1.0, description="largest global gradient norm, or null")
    precision: Literal["auto", "bf16", "fp32", "fp16"] = Field(
        "auto", description="auto: bf16 where the device is fast in it, else fp32"
    )
    zero: Zero = Zero()
    activation_checkpointing: bool = False
    log: Log = Log()
    validate_: Validate = Field(Validate(), alias="validate")
    checkpoint: Checkpoint = Checkpoint()
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        lengths = {name: getattr(self, name) for name in LENGTHS if getattr(self, name) is not None}
        if len(lengths) != 1:
            raise ValueError(
                "give exactly one of steps, tokens, epochs and minutes; found "
                + (", ".join(f"{k}: {v}" for k, v in lengths.items()) or "none")
            )
        whole = OF_WHOLE_TENSORS.get(self.optimizer.name)
        if whole and self.zero.stage > 0:
            raise ValueError(
                f"optimizer {self.optimizer.name} needs zero.stage 0: its {whole} are of whole "
                f"tensors, and stage {self.zero.stage} steps flat stretches of many tensors"
            )
        if self.optimizer.name == "schedule_free":
            if self.schedule.name != "constant":
                raise ValueError(
                    "optimizer schedule_free averages the weights instead of lowering the rate: "
                    f"schedule.name must be constant; it is {self.schedule.name}"
                )
            if self.zero.stage == 3:
                raise ValueError(
                    "optimizer schedule_free needs zero.stage 0, 1 or 2: at stage 3 the weights "
                    "cannot be exchanged for their averages"
                )
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of micro_batch {self.micro_batch}"
            )
        return self

    def accumulation(self, world: int) -> int:
        """Micro-batches that each of `world` ranks runs for one optimizer step."""
        accumulation, left = divmod(self.global_batch, self.micro_batch * world)
        if left:
            raise UserError(
                f"training.global_batch: {self.global_batch} sequences do not divide over {world} "
                f"ranks with training.micro_batch {self.micro_batch}; allowed are multiples of "
                f"{self.micro_batch * world}"
            )
        return accumulation
