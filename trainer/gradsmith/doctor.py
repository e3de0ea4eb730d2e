"""`gradsmith doctor`: this machine, what is installed, what runs where, what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .launch import physical_cores
from .run import cpu_model, versions

if TYPE_CHECKING:
    import torch

# The instruction sets that decide how fast a CPU trains, in the names of /proc/cpuinfo.
CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip

EXTRAS = {
    "train": ("deepspeed", "transformers", "peft", "datasets", "tokenizers", "safetensors",
              "pyarrow", "pydantic", "yaml", "typer", "rich"),
}  # fmt: skip


def examine() -> dict[str, Any]:
    """Everything that `gradsmith doctor` shows, as plain data.

    Returns:
        machine: cpu, cores, features, memory in bytes, platform.
        gpus: name and memory in bytes of each; nothing is allocated on them.
        tools: the version line of each compiler, or None.
        versions: of Python and the libraries.
        precision: what `training.precision: auto` takes here, and the device that decides it.
        kernels: isa and threading of the native module (None where it is not built), and
            ops: op -> backend -> None, or why it cannot run here.
        products: of a linear layer on this CPU, a row for each precision: the backend that is
            chosen at this instruction set, and what it does, in flop/s, measured now.
        missing: what is not there, what it is for and how to get it.
    """
    found = {
        "machine": _machine(),
        "gpus": _gpus(),
        "tools": {name: _version_line(name) for name in ("c++", "nvcc")},
        "versions": {"python": platform.python_version(), **versions()},
        "precision": _precision(),
        "kernels": _kernels(),
        "products": _products(),
    }
    return {**found, "missing": _missing(found)}


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": physical_cores(),
        "threads": len(os.sched_getaffinity(0)),
        "features": _cpu_features(),
        "memory": _memory(),
        "platform": platform.platform(),
    }


def _cpu_features() -> list[str]:
    path = Path("/proc/cpuinfo")
    words = set()
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                words = set(line.partition(":")[2].split())
                break
    return [feature for feature in CPU_FEATURES if feature in words]


def _memory() -> int:
    """What this process may use: the machine's, or the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _gpus() -> list[dict[str, Any]]:
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory": p.total_memory} for p in properties]


def _precision() -> dict[str, str]:
    from gradsmith_kernels.backends import fast_bf16

    from .ranks import device

    bf16 = fast_bf16(device())
    if bf16.ratio is None:
        why = f"bf16 is {'fast' if bf16.fast else 'slower than fp32'} on {bf16.device}"
    else:
        why = f"a step in bf16 is about {bf16.ratio} times as fast as in fp32 on {bf16.device}"
    return {"auto": "bf16" if bf16.fast else "fp32", "why": why}


def _version_line(program: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]
    return (release or lines or [path])[0].strip()


def _kernels() -> dict[str, Any]:
    from gradsmith_kernels import backends

    return {"native": backends.native(), "ops": backends.availability()}


def _products() -> list[dict[str, Any]]:
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return [{"precision": name, **_product(dtype)} for name, dtype in dtypes.items()]


def _product(dtype: torch.dtype) -> dict[str, Any]:
    import torch

    from gradsmith_kernels import backends, linear

    size = 512
    x, weight, dy = (torch.randn(size, size).to(dtype) for _ in range(3))
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    forward = _seconds(lambda: linear(x, weight))
    both = _seconds(lambda: torch.autograd.grad(linear(*leaves), leaves, dy))
    return {
        "backend": backends.chosen("linear", "cpu", dtype),
        "forward": 2 * size**3 / forward,
        "forward+backward": 6 * size**3 / both,
    }


def _seconds(call: Callable[[], object]) -> float:
    """The fastest of a few calls after one; of two where a call takes a tenth of a second."""
    call()
    times: list[float] = []
    while len(times) < 5 and sum(times) < 0.1:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def _missing(found: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of what is missing, what it is for, and how to get it."""
    rows = []
    compiler = "a C++ compiler: apt install g++ (Debian, Ubuntu), then pip install gradsmith again"
    if found["kernels"]["native"] is None:
        how = "pip install gradsmith again" if found["tools"]["c++"] else compiler
        rows.append(("the native module", "the kernels on the CPU", how))
    for extra, modules in EXTRAS.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if absent:
            how = f"pip install 'gradsmith[{extra}]'"
            rows.append((", ".join(absent), f"the extra [{extra}]", how))
    if found["gpus"]:
        if found["tools"]["nvcc"] is None:
            rows.append(
                ("nvcc", "kernels in CUDA C++", "install the CUDA toolkit, then pip install again")
            )
    else:
        import torch

        built_for = torch.version.cuda or torch.version.hip
        how = (
            f"this torch is built for {built_for}: check the driver with nvidia-smi or rocm-smi"
            if built_for
            else "where there is one, install a torch built for it (pytorch.org/get-started)"
        )
        rows.append(("a GPU", "the Triton and CUDA kernels", how))
    return [dict(zip(("what", "for", "how"), row, strict=True)) for row in rows]


def show(found: dict[str, Any]) -> None:
    """Prints what `examine` found."""
    from rich.table import Table
    from rich.text import Text

    from .console import show

    machine, tools, precision = found["machine"], found["tools"], found["precision"]
    gpus = [f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB" for gpu in found["gpus"]]
    native = found["kernels"]["native"]
    facts = {
        "CPU": f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
        "features": " ".join(machine["features"]) or "none that matter here",
        "memory": f"{machine['memory'] / 2**30:.1f} GiB",
        "GPU": "\n".join(gpus) or "none",
        "system": machine["platform"],
        "compilers": "\n".join(f"{name}: {line or 'not found'}" for name, line in tools.items()),
        "native module": f"built; uses {native['isa']} of {', '.join(native['isa_levels'])}; "
        f"threads by {native['threading']}" if native else "not built",
        "precision": f"auto takes {precision['auto']}: {precision['why']}",
        "versions": ", ".join(f"{name} {v}" for name, v in found["versions"].items()),
    }  # fmt: skip
    show(_grid("Machine", facts))

    backends = list(next(iter(found["kernels"]["ops"].values()), {}))
    table = Table(title="Kernels", title_justify="left", title_style="bold")
    for column in ("op", *backends):
        table.add_column(column)
    reasons: dict[str, None] = {}
    for op, row in found["kernels"]["ops"].items():
        cells = (Text("no", "dim") if row[b] else Text("yes", "green") for b in backends)
        table.add_row(op, *cells)
        reasons |= {f"{b}: {row[b]}": None for b in backends if row[b]}
    show(table)
    for reason in reasons:
        show(Text(f"  {reason}", "dim"))

    level = native["isa"] if native else "no native module"
    table = Table(
        title=f"Linear layers on this CPU ({level}), timed now",
        title_justify="left",
        title_style="bold",
    )
    for column in ("precision", "backend", "forward", "forward + backward"):
        table.add_column(column)
    for row in found["products"]:
        rates = (f"{row[name] / 1e9:,.0f} GFLOP/s" for name in ("forward", "forward+backward"))
        whose = "torch's" if row["backend"] == "reference" else "ours"
        table.add_row(row["precision"], whose, *rates)
    show(table)

    if found["missing"]:
        show(_grid("Missing", {f"{m['what']} ({m['for']})": m["how"] for m in found["missing"]}))


def _grid(title: str, facts: dict[str, str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(name, "cyan"), Text(value))
    return grid
