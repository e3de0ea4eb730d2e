"""The benchmarks on a GPU: `python -m benchmarks.gpu`, the last step of `make gpu`.

Needs torch, triton, numpy, pytest and what builds the extension, nothing else. `--check` only says
whether this machine can run it: exit code 2 with the reason if not.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

NEEDED = ("torch", "triton", "numpy", "pytest", "setuptools", "pybind11")


def missing() -> str | None:
    """Why the GPU benchmarks cannot run here; None if they can."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"it installs nothing, and {sys.executable} has no {', '.join(absent)}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU; make bench runs the CPU's benchmarks"
    return None


def main() -> int:
    reason = missing()
    if reason:
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    if "--check" in sys.argv[1:]:
        return 0

    import torch

    from . import ops
    from .machine import ROOT, describe, gpu_clock, measure_rates, rounds_within, write_results
    from .table import show

    clock = gpu_clock()
    rows: list[dict[str, Any]] = []
    failed = []
    for label, case in ops.cases().items():
        try:
            calls = ops.contenders(case, torch.device("cuda"))
        except AssertionError as error:
            failed.append(f"{label}: {error}")
            continue
        rounds = rounds_within([*calls.values()], clock, ops.BUDGET)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(clock(call))
        rows.append(ops.row(case, seconds))
    machine, rates = describe("cuda"), measure_rates("cuda", clock)
    if rows:
        print(show(machine, rates, rows))
        path = write_results(machine, rates, rows)
        print(f"written to {path.relative_to(ROOT.parent)}")
    for line in failed:
        print(f"not timed, its parity check fails: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
