"""What an op says about itself, and the list of all ops that do.

`<op>/spec.py` holds one `SPEC`, an instance of a subclass of `Spec`. The parity and opcheck tests,
the benchmarks, the compile checks and the certificate all iterate over `all_specs()`. It finds the
ops by their folders, and whatever is above this module, the optimizers' benchmark cases among it,
by name: nothing here imports what it describes.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import Op, op_names

Inputs = dict[str, Any]  # tensors, lists of tensors, numbers, None
Outputs = dict[str, Tensor]  # outputs and gradients by name
_DRAW: ContextVar[int] = ContextVar("draw", default=0)


def seeded(seed: int) -> torch.Generator:
    """Where a sample's random numbers come from; see `Sample.draw`."""
    # On a CPU the lowest 32 bits count.
    return torch.Generator().manual_seed(seed + 1_000_003 * _DRAW.get())


@dataclass(frozen=True)
class Sample:
    """One set of inputs that an op must get right.

    label: what is special about it.
    dtype: decides which backends take it.
    make: the inputs, on a device; the same values at every call. Random ones come from `seeded`.
    interpret: whether Triton's interpreter, which is slow, has to compute it as well.
    """

    label: str
    dtype: torch.dtype
    make: Callable[[torch.device], Inputs]
    interpret: bool = True

    def draw(self, device: torch.device, number: int) -> Inputs:
        """`make` with other random numbers; those of `make` itself are draw 0."""
        token = _DRAW.set(number)
        try:
            return self.make(device)
        finally:
            _DRAW.reset(token)


@dataclass(frozen=True)
class CompileCase:
    """One Triton kernel as a user's call would specialise it, for `compile_checks`.

    name: its name in budgets.json.
    kernel: the @triton.jit function.
    types: argument name -> Triton type ("*bf16", "i32", ...); may name more than the kernel has.
    constants: the constexpr arguments.
    aligned: names of arguments that are multiples of 16; may name more than the kernel has.
    num_warps, num_stages: as in the launch; None is Triton's own number of stages.
    chips: those whose launches look like this (names of `compile_checks.CHIPS`); None is all.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int | None = None
    chips: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BenchCase:
    """One thing to time, and what to time it against. Used as

        inputs = case.make(device)
        case.check(device)                      # raises AssertionError: then no speed is reported
        time(lambda: case.ours(inputs, None))   # backend None: the one for the device
        time(lambda: case.peers["torch"](inputs))

    label: op, pass, shape and dtype.
    make: the inputs, on a device. `ours` and the peers may write to them, so make them for each.
    ours: (inputs, backend) -> anything.
    peers: name -> (inputs) -> anything: what a user would run without gradsmith.
    bytes: memory traffic of one call, each tensor read or written once.
    flops: floating-point operations of one call.
    check: the parity of `ours` on smaller inputs of the same kind.
    """

    label: str
    make: Callable[[torch.device], Inputs]
    ours: Callable[[Inputs, str | None], Any]
    peers: Mapping[str, Callable[[Inputs], Any]]
    bytes: int
    flops: int
    check: Callable[[torch.device], None]


@dataclass(frozen=True)
class OpCheck:
    """One call of torch.library.opcheck: an operator and its arguments."""

    overload: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Spec(ABC):
    """An op's description of itself. `op.name` is also its folder's name."""

    op: Op

    @abstractmethod
    def samples(self) -> list[Sample]:
        """Inputs of every kind: dtypes, odd shapes, strides, empty ones."""

    @abstractmethod
    def run(self, inputs: Inputs, backend: str | None) -> Outputs:
        """Every output and gradient by our op. Leaves the inputs as they are."""

    @abstractmethod
    def naive(self, inputs: Inputs) -> Outputs:
        """The same by plain PyTorch, as one writes it without gradsmith, in the inputs' dtypes."""

    def exact(self, inputs: Inputs) -> Outputs:
        """The same in float64: the truth that errors are measured against."""
        return self.naive(in_float64(inputs))

    @abstractmethod
    def opchecks(self, device: torch.device) -> list[OpCheck]:
        """Calls for torch.library.opcheck."""

    def compile_cases(self) -> list[CompileCase]:
        """The Triton kernels, as the launchers specialise them; none where there are none."""
        return []

    def bench_cases(self) -> list[BenchCase]:
        """What the benchmarks time. The ops of optimizers have none: whole steps are timed, and
        `optim/bench.py` has those."""
        return []


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor in float64."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double()
        return value

    return {name: convert(value) for name, value in inputs.items()}


def all_specs(backend: str | None = None) -> list[Spec]:
    """The spec of every op, or of every op that has `backend`, by name.

    An op's folder without one is an error.
    """
    specs = []
    for name in op_names():
        module = f"gradsmith_kernels.ops.{name}.spec"
        try:
            spec = importlib.import_module(module).SPEC
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            raise RuntimeError(f"the op {name} has no spec.py: see docs/adding-an-op.md") from None
        if backend is None or backend in spec.op.implementations:
            specs.append(spec)
    return specs


def all_bench_cases() -> list[BenchCase]:
    """What the benchmarks time: the cases of every op, and the optimizers' steps."""
    optimizers = importlib.import_module("gradsmith_kernels.optim.bench")
    cases: list[BenchCase] = [case for spec in all_specs() for case in spec.bench_cases()]
    return [*cases, *optimizers.bench_cases()]
