"""Each op against its peers on the CPU. pytest-benchmark times ours, and before every round of it
each peer has its turn; so all contenders see the same machine and the same caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import ops
from .machine import cpu_clock, rounds_within

CASES = ops.cases()
WARMUP = 2


@pytest.mark.parametrize("label", CASES)
def test_op(label: str, benchmark: Any, rows: list[dict[str, Any]], quick: bool) -> None:
    peers = ops.contenders(CASES[label], torch.device("cpu"))
    rounds = 7 if quick else rounds_within([*peers.values()], cpu_clock, ops.BUDGET)
    ours = peers.pop(ops.OURS)
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def turn_of_the_peers() -> None:
        for name, call in peers.items():
            seconds[name].append(cpu_clock(call))

    benchmark.pedantic(ours, setup=turn_of_the_peers, rounds=rounds, warmup_rounds=WARMUP)
    times = {name: values[WARMUP:] for name, values in seconds.items()}
    rows.append(ops.row(CASES[label], {ops.OURS: benchmark.stats.stats.data, **times}))
