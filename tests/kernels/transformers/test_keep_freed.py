"""Freed memory that stays with the process."""

import os
import subprocess
import sys

import pytest

# Prints what keep_freed (or accelerate) said, and the pages that ten rounds cost, in shares of a
# round's tensors.
SCRIPT = """
import resource, sys, torch
from torch import nn
from gradsmith_kernels import accelerate
from gradsmith_kernels.transformers.memory import keep_freed

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

choice = sys.argv[1]
if choice == "keep":
    print(keep_freed())
elif choice == "accelerate":
    print(accelerate(nn.Sequential(nn.LayerNorm(8)).train()).memory)
elif choice == "without":
    print(accelerate(nn.Sequential(nn.LayerNorm(8)), without=["memory"]).memory)
else:
    print(accelerate(nn.Linear(8, 8)).memory)
before = pages()
for _ in range(10):
    tensors = [torch.ones(20 << 18) for _ in range(4)]
    del tensors
print((pages() - before) * 4096 / (80 << 20))
"""


def run(choice, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, choice],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, rounds = done.stdout.split()
    return said == "True", float(rounds)


@pytest.mark.parametrize("choice", ["keep", "accelerate"])
def test_tensors_take_the_pages_of_those_before(choice):
    said, rounds = run(choice)
    assert said
    assert rounds < 4


@pytest.mark.parametrize("choice", ["without", "nothing to replace"])
def test_it_is_a_choice(choice):
    said, _ = run(choice)
    assert not said


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=0:glibc.malloc.mmap_threshold=65536"},
    ],
)
def test_the_environment_wins(environment):
    said, rounds = run("keep", **environment)
    assert not said
    assert rounds > 8
