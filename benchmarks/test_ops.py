"""Each op against its peers on the CPU. pytest-benchmark times ours, and before every round of it
each peer has its turn; so all contenders see the same machine and the same caches."""

from __future__ import annotations

from typing import Any

import pytest

from gradsmith_kernels.spec import BenchCase

from . import ops
from .machine import cpu_clock, rounds_within

CASES = dict(ops.cases("cpu"))
WARMUP = 2


@pytest.mark.parametrize("key", CASES)
def test_op(key: str, benchmark: Any, rows: list[dict[str, Any]], quick: bool) -> None:
    case: BenchCase = CASES[key]
    calls = ops.contenders(case, "cpu")
    rounds = 7 if quick else rounds_within([*calls.values()], cpu_clock, ops.BUDGET)
    ours = calls.pop("gradsmith")
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def turn_of_the_peers() -> None:
        for name, call in calls.items():
            seconds[name].append(cpu_clock(call))

    benchmark.group = key
    benchmark.pedantic(ours, setup=turn_of_the_peers, rounds=rounds, warmup_rounds=WARMUP)
    times = {"gradsmith": list(benchmark.stats.stats.data)}
    times |= {name: values[WARMUP:] for name, values in seconds.items()}
    rows.append(ops.row(key, case, times))
