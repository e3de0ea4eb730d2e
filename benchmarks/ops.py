"""Each op against its peers, as its spec lists them; shared by the CPU suite and `make gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradsmith_kernels.spec import BenchCase, all_specs

from .machine import Call, summary

BACKENDS = {"cpu": "cpu", "cuda": "triton"}
BUDGET = 2.0  # seconds for one case


def cases(device: str) -> Iterator[tuple[str, BenchCase]]:
    for spec in all_specs():
        for case in spec.bench_cases(device):
            yield f"{spec.name} {case.label}", case


def contenders(case: BenchCase, device: str) -> dict[str, Call]:
    """Ours first. The parity check comes before: a case that fails it raises, and is not timed."""
    backend = BACKENDS[device]
    case.check(backend, device)
    calls = {"gradsmith": case.ours(backend, device)}
    return calls | {name: make(device) for name, make in case.peers.items()}


def row(key: str, case: BenchCase, seconds: dict[str, list[float]]) -> dict[str, Any]:
    times = {name: summary(values) for name, values in seconds.items()}
    ours = times["gradsmith"]["median"]
    return {
        "key": key,
        "times": times,
        "ratios": {p: t["median"] / ours for p, t in times.items() if p != "gradsmith"},
        "bytes": case.bytes,
        "flops": case.flops,
    }
