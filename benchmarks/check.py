"""Compares the latest results of this kind of machine with floors.toml: `make bench-check`.

A ratio is a peer's median time over ours in the same run: above 1, ours is faster. Exit code 1 if
one fell below its floor or was no longer measured. `--propose` prints floors from the latest
results instead, each three tenths below what was measured, to be looked at and put into
floors.toml.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch

from .machine import ROOT, describe, kind, results_folder

FLOORS = ROOT / "floors.toml"
MARGIN = 0.7  # virtual machines were seen to vary by a fifth from run to run


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """{"row / peer": ratio} of a results file."""
    return {
        f"{row['key']} / {peer}": ratio
        for row in results["rows"]
        for peer, ratio in row["ratios"].items()
    }


def fallen(measured: dict[str, float], floors: dict[str, float]) -> list[str]:
    """What is below its floor or missing, a line each."""
    lines = []
    for key, floor in floors.items():
        if key not in measured:
            lines.append(f"{key}: not measured; its floor is {floor:.2f}")
        elif measured[key] < floor:
            lines.append(f"{key}: {measured[key]:.2f}, below its floor of {floor:.2f}")
    return lines


def propose(measured: dict[str, float], machine_kind: str) -> str:
    """A table for floors.toml."""
    lines = [f"{json.dumps(key)} = {value * MARGIN:.2f}" for key, value in measured.items()]
    return "\n".join([f"[{machine_kind}]", *lines])


def latest(folder: Path, machine_kind: str) -> Path | None:
    return max(folder.glob(f"*-{machine_kind}.json"), default=None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("--propose", action="store_true", help="print floors from the results")
    arguments = parser.parse_args()

    machine = describe("cuda" if torch.cuda.is_available() else "cpu")
    path = latest(results_folder(machine), kind(machine))
    if path is None:
        bench = "make gpu" if machine["device"] == "cuda" else "make bench"
        print(f"{results_folder(machine)}: no results there; run {bench} first", file=sys.stderr)
        return 2
    measured = ratios(json.loads(path.read_text(encoding="utf-8")))
    if arguments.propose:
        print(propose(measured, kind(machine)))
        return 0

    floors = tomllib.loads(FLOORS.read_text(encoding="utf-8")).get(kind(machine), {})
    if not floors:
        print(f"{FLOORS.name} has no floors for {kind(machine)}; nothing was compared")
        return 0
    lines = fallen(measured, floors)
    held = len(floors) - len(lines)
    print(f"{path.relative_to(ROOT.parent)}: {held} of {len(floors)} floors hold")
    for line in lines:
        print(f"  {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
