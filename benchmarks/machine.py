"""The machine that the numbers belong to: what it is, and what it can do at most."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gradsmith_kernels.backends import native, torch_multiplies_bf16

from . import VARIABLES

HOLDS = ("GRADSMITH_ISA", *VARIABLES)
ROOT = Path(__file__).resolve().parent
LIBRARIES = ("torch", "triton", "numpy", "transformers", "peft", "deepspeed")

# What one contender needs: a call that computes, and a clock that runs it and returns its seconds.
Call = Callable[[], Any]
Clock = Callable[[Call], float]


def cpu_clock(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def gpu_clock() -> Clock:
    """Times by device events. Before each call 256 MiB are written, which empties the L2 cache and
    gives the host time to queue the call, so that its launch is not part of the time."""
    scratch = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def clock(call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return clock


def summary(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def percentile(p: int) -> float:
        return ordered[round(p / 100 * (len(ordered) - 1))]

    return {
        "median": percentile(50),
        "p20": percentile(20),
        "p80": percentile(80),
        "rounds": len(ordered),
    }


def rounds_within(calls: Sequence[Call], clock: Clock, budget: float) -> int:
    """How many turns of all the calls fit in `budget` seconds: 7 to 200. Warms the calls up."""
    for call in calls:
        clock(call)
    turn = sum(clock(call) for call in calls)
    return max(7, min(200, int(budget / turn)))


def measure_rates(device: str, clock: Clock) -> dict[str, float]:
    """The most that this machine does through torch: matrix products of 2048³ (8192³ on a GPU; 512³
    where torch multiplies bfloat16 in a slow loop) on random numbers, and a copy of 256 MiB (1 GiB)
    into a buffer that exists, counting the bytes read and written."""
    numbers = 2**28 if device == "cuda" else 2**26
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        size = 8192 if device == "cuda" else 2048
        if device == "cpu" and name == "bf16" and not torch_multiplies_bf16():
            size = 512
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _median(partial(torch.matmul, a, b, out=out), clock)
        rates[f"matmul_{name}_flops"] = 2 * size**3 / seconds
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    rates["copy_bytes"] = 2 * source.nbytes / _median(lambda: target.copy_(source), clock)
    return rates


def _median(call: Call, clock: Clock) -> float:
    """Of nine calls after two."""
    for _ in range(2):
        clock(call)
    return summary([clock(call) for _ in range(9)])["median"]


def describe(device: str) -> dict[str, Any]:
    """Provenance: hardware, threads, versions, commit, and how busy the machine was.

    isa: the level of our native module; held_down: the variables that hold it, torch's and its
    libraries' down to less than the machine has.
    """
    found = native()
    level = found["isa"] if found else torch.backends.cpu.get_cpu_capability().lower()
    machine: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_model(),
        "isa": level,
        "held_down": {name: os.environ[name] for name in HOLDS if name in os.environ},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        machine["nvidia_smi"] = _nvidia_smi()
    return machine


def kind(machine: dict[str, Any]) -> str:
    """Which floors apply: a GPU's model, or a CPU's instruction set (with BF16 or without)."""
    if machine["device"] == "cuda":
        return slug(machine["gpu"])
    return f"cpu-{slug(machine['isa']).removesuffix('bf16')}"


def results_folder(machine: dict[str, Any]) -> Path:
    return ROOT / "results" / slug(machine["gpu" if machine["device"] == "cuda" else "cpu"])


def write_results(
    machine: dict[str, Any], rates: dict[str, float], rows: list[dict[str, Any]]
) -> Path:
    path = results_folder(machine) / f"{time.strftime('%Y-%m-%d')}-{kind(machine)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():  # of today: rows that were not measured again stay
        keys = {row["key"] for row in rows}
        before = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in before if row["key"] not in keys] + rows
    results = {"machine": machine, "rates": rates, "rows": rows}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {name: installed[name] for name in LIBRARIES if name in installed}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature while the measurement runs."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw",
              "power.limit", "temperature.gpu")  # fmt: skip
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return {"error": str(error)}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=True))
