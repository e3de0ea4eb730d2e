"""Each op and optimizer against its peers, as spec.py, optim/bench.py and peers.py list them; for
the CPU suite and the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from gradsmith_kernels.verify.spec import BenchCase, all_bench_cases

from . import peers
from .machine import Call, summary

BUDGET = 2.0  # seconds for one case
OURS = "gradsmith"


def cases() -> dict[str, BenchCase]:
    found = all_bench_cases()
    labelled = {case.label: case for case in found}
    assert len(labelled) == len(found), "two benchmark cases have the same label"
    assert peers.known() <= labelled.keys(), "a peer of a benchmark case that does not exist"
    return labelled


def contenders(case: BenchCase, device: torch.device) -> dict[str, Call]:
    """What is timed: ours and each peer, on inputs of its own with the same values.

    Raises:
        AssertionError: the parity check fails, and what is not right is not timed.
    """
    case.check(device)
    calls: dict[str, Call] = {OURS: partial(case.ours, case.make(device), None)}
    others = {**case.peers, **peers.of(case.label)}
    return calls | {name: partial(peer, case.make(device)) for name, peer in others.items()}


def row(case: BenchCase, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The case in the results file; a ratio is a peer's median time over ours."""
    times = {name: summary(values) for name, values in seconds.items()}
    ours = times[OURS]["median"]
    return {
        "key": case.label,
        "times": times,
        "ratios": {name: t["median"] / ours for name, t in times.items() if name != OURS},
        "bytes": case.bytes,
        "flops": case.flops,
    }
