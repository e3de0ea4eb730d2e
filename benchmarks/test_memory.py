"""The memory that a loss takes, forward and backward: the peak of a process of its own for each
contender, above what the inputs take. And a norm's backward pass in memory that is used again."""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median
from typing import Any

import pytest

from .machine import summary

CONTENDERS = {
    "gradsmith": "linear_cross_entropy(hidden, weight, target)",
    "torch": "F.cross_entropy(F.linear(hidden, weight), target)",
    "transformers eager": "F.cross_entropy(F.linear(hidden, weight).float(), target)",
}
PROGRAM = """
import json, re
from pathlib import Path
import torch
import torch.nn.functional as F
from gradsmith_kernels import linear_cross_entropy

def memory(what):  # of /proc, as getrusage counts the parent's too
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{{what}}:\\s+([0-9]+) kB", status)[1])

def inputs(tokens, size, vocabulary):
    # Made in bfloat16, for a passing float32 copy would be the peak.
    hidden = torch.randn(tokens, size, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, size, dtype=torch.bfloat16).mul_(size**-0.5).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,))

def loss(hidden, weight, target):
    return {expression}

loss(*inputs(64, 32, 100)).backward()  # the libraries' own memory
given = inputs({tokens}, {size}, {vocabulary})
before = memory("VmRSS")
value = loss(*given)
value.backward()
print(json.dumps({{"loss": value.item(), "bytes": memory("VmHWM") - before}}))
"""


@pytest.mark.parametrize(("tokens", "size", "vocabulary"), [(8192, 768, 131072)])
def test_loss(
    tokens: int, size: int, vocabulary: int, rows: list[dict[str, Any]], quick: bool
) -> None:
    tokens = tokens // 8 if quick else tokens
    peaks, losses = {}, []
    for name, expression in CONTENDERS.items():
        program = PROGRAM.format(
            expression=expression, tokens=tokens, size=size, vocabulary=vocabulary
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)
        peaks[name] = result["bytes"]
        losses.append(result["loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.05)  # of other random numbers
    ours = peaks["gradsmith"]
    rows.append(
        {
            "key": f"loss, peak memory {tokens}x{size}x{vocabulary} bfloat16",
            "peak_bytes": peaks,
            "ratios": {name: peak / ours for name, peak in peaks.items() if name != "gradsmith"},
        }
    )


# Within 32 MB a tensor, so that glibc keeps it, and in turns, as test_ops.py has it.
REUSED = """
import json
import torch
import torch.nn.functional as F
from benchmarks.machine import cpu_clock
from gradsmith_kernels import rms_norm
from gradsmith_kernels.transformers.memory import keep_freed

assert keep_freed()
x = torch.randn({rows}, {cols}).bfloat16().requires_grad_()
weight = torch.randn({cols}).bfloat16().requires_grad_()
dy = torch.randn({rows}, {cols}).bfloat16()
results = {{
    "gradsmith": rms_norm(x, weight, eps=1e-6),
    "torch": F.rms_norm(x, weight.shape, weight, 1e-6),
}}
seconds, first = {{name: [] for name in results}}, {{}}
for _ in range({rounds}):
    for name, y in results.items():
        step = lambda: torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
        seconds[name].append(cpu_clock(step))
        first.setdefault(name, step())
for ours, theirs in zip(first["gradsmith"], first["torch"]):
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02 * {rows}**0.5)
print(json.dumps(seconds))
"""


@pytest.mark.parametrize(("tokens", "size"), [(4096, 2048), (8192, 768)])
def test_rms_norm_backward(tokens: int, size: int, rows: list[dict[str, Any]], quick: bool) -> None:
    program = REUSED.format(rows=tokens, cols=size, rounds=7 if quick else 30)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = {name: values[2:] for name, values in json.loads(done.stdout).items()}
    rows.append(
        {
            "key": f"rms_norm backward, reused memory {tokens}x{size} bfloat16",
            "times": {name: summary(values) for name, values in seconds.items()},
            "ratios": {"torch": median(seconds["torch"]) / median(seconds["gradsmith"])},
            "bytes": 3 * 2 * tokens * size,
            "flops": 13 * tokens * size,
        }
    )
