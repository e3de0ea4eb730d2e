"""How an op's numbers are judged: one rule and one tolerance table for tests, certificate, benches.

The error of a result is ||result - exact|| / ||exact||, with `exact` computed in float64. It must
be at most RATIO times the error of the naive PyTorch computation in the same dtypes; or
RATIO_WITHOUT_FMA times where our kernel has no fused multiply-add and torch's has (the interpreter
of Triton, which shows that a kernel is right but not how it rounds on a GPU, and the portable C++
on x86). Two things are added for what a ratio cannot judge:

- two unlucky roundings say little about two algorithms. Below SMALL elements, 3/sqrt(n) is added
  to the ratio, because the ratio of two errors, each made of n independent roundings, scatters by
  about 1/sqrt(n); and one unit roundoff of the arithmetic to the bound, because a scalar that
  scales a whole row is rounded once and does not average out over few rows;
- results that naive code gets exactly: an error below FLOOR unit roundoffs (less than rounding a
  single time costs; one whole unit below TINY elements) always passes.

How the naive computation sums is the business of the libraries below it, and differs from one CPU
to the next, so one draw of the inputs may pass on one and fail on another. Where a draw passes only
by what is added for few elements, or misses its bound by less than FAR times, DRAWS draws decide,
taken as one tensor: their ratio scatters by as much less.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradsmith_kernels.backends import interpreting, native
from gradsmith_kernels.verify.spec import Inputs, Outputs, Sample, Spec

RATIO = 1.1
RATIO_WITHOUT_FMA = 1.5
SMALL = 4096
TINY = 64
FLOOR = 0.25
DRAWS = 16
FAR = 10
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


@dataclass(frozen=True)
class Verdict:
    """One output or gradient of one sample on one backend."""

    sample: str
    backend: str
    output: str
    dtype: torch.dtype
    error: float
    naive_error: float
    bound: float
    draws: int  # of the inputs
    repeats: bool  # a second run gave the same bits

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and self.repeats

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.output} ({dtype}) of '{self.sample}' on {self.backend}: "
            f"error {self.error:.2e}, naive {self.naive_error:.2e}, bound {self.bound:.2e}, "
            f"{self.draws} {'draw' if self.draws == 1 else 'draws'}, "
            f"{'the same bits again' if self.repeats else 'OTHER BITS WHEN REPEATED'}"
        )


def distance(result: Tensor, exact: Tensor) -> float:
    """||result - exact||; infinite where either is not finite and they differ."""
    if exact.numel() == 0:
        return 0.0
    difference: float = (result.double() - exact.double()).norm().item()
    return difference if math.isfinite(difference) else math.inf


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; infinite where either is not finite and they differ."""
    difference = distance(result, exact)
    if not math.isfinite(difference):
        return math.inf
    scale: float = exact.double().norm().item()
    return difference / scale if scale else difference


def error_bound(
    naive_error: float, dtype: torch.dtype, numel: int, backend: str, draws: int = 1
) -> float:
    """The largest error that passes, of `draws` draws of numel elements each."""
    small = 0 < numel < SMALL
    scatter = 3 / math.sqrt(numel * draws) if small else 0.0
    scalar = UNIT_ROUNDOFF[torch.promote_types(dtype, torch.float32)] if small else 0.0
    floor = UNIT_ROUNDOFF[dtype] * (1.0 if numel < TINY else FLOOR)
    return max((_ratio(backend) + scatter) * naive_error + scalar, floor)


def _ratio(backend: str) -> float:
    return RATIO if _has_fma(backend) else RATIO_WITHOUT_FMA


def _has_fma(backend: str) -> bool:
    if backend == "cpu":
        found = native()
        return found is not None and found["isa"] != "portable"
    return not (backend == "triton" and interpreting())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every new uninitialised tensor with NaN, so that reading one before writing shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, in which NaN equals NaN and 0 differs from -0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class Errors:
    """Of one output: ||result - exact|| of ours and of the naive computation, and ||exact||.

    numel: of one draw.
    """

    ours: float
    naive: float
    exact: float
    dtype: torch.dtype
    numel: int
    draws: int = 1

    @classmethod
    def of(cls, ours: Tensor, naive: Tensor, exact: Tensor) -> Errors:
        assert ours.shape == naive.shape == exact.shape
        norms = (distance(ours, exact), distance(naive, exact), exact.double().norm().item())
        return cls(*norms, ours.dtype, ours.numel())

    @property
    def relative(self) -> tuple[float, float]:
        """Ours and the naive one's, as `relative_error`."""
        scale = self.exact or 1.0
        return self.ours / scale, self.naive / scale

    def bound(self, backend: str) -> float:
        return error_bound(self.relative[1], self.dtype, self.numel, backend, self.draws)

    def settled(self, backend: str) -> bool:
        """Whether this one draw is enough."""
        ours, naive = self.relative
        certain = max(_ratio(backend) * naive, FLOOR * UNIT_ROUNDOFF[self.dtype])
        return ours <= certain or not ours <= FAR * self.bound(backend)


def over_draws(
    draw: Callable[[int], dict[str, Errors]], backend: str, draws: int = DRAWS
) -> dict[str, Errors]:
    """Each output's errors in draw 0 where that settles it, else in all draws, taken as one tensor.

    draw: the errors by output in the draw of this number; called as often as needed.
    """
    found = draw(0)
    doubtful = [name for name, errors in found.items() if not errors.settled(backend)]
    if doubtful and draws > 1:
        every = [found, *(draw(number) for number in range(1, draws))]
        for name in doubtful:
            ours, naive, exact = (
                math.hypot(*(getattr(errors[name], whose) for errors in every))
                for whose in ("ours", "naive", "exact")
            )
            found[name] = replace(found[name], ours=ours, naive=naive, exact=exact, draws=draws)
    return found


# The naive and the exact results of each draw of one sample, for all that are judged against them.
Known = dict[int, tuple[Outputs, Outputs]]


def parity(
    spec: Spec,
    sample: Sample,
    backend: str,
    device: torch.device,
    draws: int = DRAWS,
    known: Known | None = None,
) -> list[Verdict]:
    """Judges every output and gradient of one sample on one backend.

    known: empty for a sample's first call on a device; what it found is not computed again.
    """
    repeats: dict[str, bool] = {}
    known = {} if known is None else known

    def draw(number: int) -> dict[str, Errors]:
        inputs: Inputs = sample.draw(device, number)
        with poisoned_memory():
            ours = spec.run(inputs, backend)
            # The interpreter is slow, and has one order in which it can compute.
            twice = number == 0 and not (backend == "triton" and interpreting())
            again = spec.run(inputs, backend) if twice else ours
        repeats.update({name: torch.equal(bits(ours[name]), bits(again[name])) for name in again})
        if number not in known:
            known[number] = (spec.naive(inputs), spec.exact(inputs))
        naive, exact = known[number]
        assert ours.keys() == naive.keys() == exact.keys()
        return {name: Errors.of(ours[name], naive[name], exact[name]) for name in ours}

    return [
        Verdict(
            sample.label,
            backend,
            name,
            errors.dtype,
            *errors.relative,
            errors.bound(backend),
            errors.draws,
            repeats[name],
        )
        for name, errors in over_draws(draw, backend, draws).items()
    ]


def check_parity(
    spec: Spec,
    sample: Sample,
    backend: str | None,
    device: torch.device,
    known: Known | None = None,
) -> None:
    """Raises AssertionError with every verdict that failed. `backend` None: the device's own."""
    backend = backend or spec.op.resolve(None, device.type, sample.dtype)
    verdicts = parity(spec, sample, backend, device, known=known)
    failed = [verdict for verdict in verdicts if not verdict.passed]
    assert not failed, f"{spec.op.name}:\n" + "\n".join(str(verdict) for verdict in failed)


def device_of(backend: str) -> torch.device:
    """Where a backend's tensors are on this machine."""
    gpu = torch.cuda.is_available() and backend in ("triton", "cuda")
    return torch.device("cuda" if gpu else "cpu")


def backends_of(spec: Spec, sample: Sample) -> list[str]:
    """The backends that this machine has and that take the sample's dtypes."""
    inputs = sample.make(torch.device("cpu")).values()
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} | {sample.dtype}
    return [
        backend
        for backend in spec.op.implementations
        if (sample.interpret or backend != "triton" or not interpreting())
        and all(spec.op.fits(backend, device_of(backend), dtype) for dtype in dtypes)
    ]
