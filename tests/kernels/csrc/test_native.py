"""The native module: instruction sets, rounding, threads."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsmith_kernels import _native, rms_norm
from gradsmith_kernels.verify import testing
from gradsmith_kernels.verify.spec import all_specs


@pytest.fixture(params=_native.isa_levels())
def isa(request):
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.mark.skipif(len(_native.isa_levels()) == 1, reason="one level, which test_parity.py checks")
@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.op.name)
def test_parity_on_every_lower_instruction_set(spec):
    """Of the level that is in use, test_parity.py."""
    current, checked = _native.isa(), 0
    for sample in spec.samples():
        if "cpu" not in testing.backends_of(spec, sample) or "100 steps" in sample.label:
            continue
        known = {}
        for level in _native.isa_levels():
            if level != current:
                _native.set_isa(level)
                try:
                    testing.check_parity(spec, sample, "cpu", torch.device("cpu"), known)
                except AssertionError as error:
                    error.add_note(f"on {level}")
                    raise
                finally:
                    _native.set_isa(current)
                checked += 1
    assert checked


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no instruction set level 'mmx'"):
        _native.set_isa("mmx")


def with_held_isa(level, code):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | {"GRADSMITH_ISA": level}, capture_output=True, text=True
    )


@pytest.mark.parametrize("level", _native.isa_levels())
def test_the_environment_holds_the_level_down(level):
    code = "from gradsmith_kernels import _native as n; print(n.isa(), *n.isa_levels())"
    levels = _native.isa_levels()
    expected = [level, *levels[: levels.index(level) + 1]]
    assert with_held_isa(level, code).stdout.split() == expected


def test_an_unknown_level_in_the_environment_is_refused():
    code = "from gradsmith_kernels import backends; print(backends.missing('cpu'))"
    done = with_held_isa("avx3", code)
    levels = "portable, avx2, avx512, avx512bf16, amx"
    assert done.stdout.strip() == f"GRADSMITH_ISA is 'avx3'; it may be one of {levels}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even_and_keeps_nan_infinities_and_subnormals(dtype, isa):
    """h = x + residual is one float32 sum, rounded: torch's bits, for every value of x."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    order = torch.tensor(random.Random(0).sample(range(2**16), 2**16))
    for residual in (every[order], every.flip(0), torch.zeros_like(every)):
        x, residual = every.reshape(-1, 64), residual.reshape(-1, 64)
        _, h = rms_norm(x, torch.ones(64), residual=residual)
        expected = x + residual
        same = h.view(torch.int16) == expected.view(torch.int16)
        assert (same | (h.isnan() & expected.isnan())).all()


def test_the_threads_are_torchs():
    assert _native.parallel_runtime() == "shared OpenMP"
    rms_norm(torch.randn(4096, 512), torch.ones(512))
    maps = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in maps.splitlines() if "omp" in line and ".so" in line}
    library = Path(_native.__file__).read_bytes()
    assert b"libgomp" not in library
    assert any("torch" in path for path in runtimes)
