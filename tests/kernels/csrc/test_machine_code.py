"""The native module's code under watch: AMX in an emulator of its instructions, every level with
its inputs at the edge of mapped memory, and every level under AddressSanitizer."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import amx
import pytest

from gradsmith_kernels import _native

ROOT = Path(__file__).parents[3]

AMX = """
import sys, pathlib, amx
emulator = amx.install_emulator(pathlib.Path(sys.argv[1]))
import torch
from gradsmith_kernels import _native
from gradsmith_kernels.verify import testing
from gradsmith_kernels.verify.spec import all_specs
_native.set_isa("amx", emulated=True)
checked = 0
for spec in all_specs():
    for sample in spec.samples():
        if sample.dtype == torch.bfloat16 and "cpu" in testing.backends_of(spec, sample):
            testing.check_parity(spec, sample, "cpu", torch.device("cpu"))
            checked += 1
assert checked
print(emulator.amx_emulator_count())
"""


@pytest.mark.skipif("avx512bf16" not in _native.isa_levels(), reason="no AVX-512 with bfloat16")
@pytest.mark.skipif(bool(amx.why_not()), reason=amx.why_not() or "can be built")
def test_amx_is_right(tmp_path):
    library = amx.build_emulator(tmp_path)
    environment = os.environ | {"PYTHONPATH": amx.PYTHONPATH}
    result = subprocess.run(
        [sys.executable, "-c", AMX, str(library)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if "amx" not in _native.isa_levels():
        assert int(result.stdout) > 10_000  # the tiles did the products


GUARDED = """
import ctypes, mmap, sys, torch
from gradsmith_kernels import _native
from gradsmith_kernels.verify import testing
from gradsmith_kernels.verify.spec import all_specs

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE

def at_an_edge(x, last):
    # The same tensor in memory that ends (or begins) at a page which must not be touched.
    size = x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())))
    pages = -(-size // PAGE) + 2
    memory = mmap.mmap(-1, pages * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (base, base + (pages - 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    offset = (pages - 1) * PAGE - size if last else PAGE
    flat = torch.frombuffer(memory, dtype=x.dtype, offset=offset, count=size // x.element_size())
    edge = flat.as_strided(x.shape, x.stride())
    edge.copy_(x)
    return edge

def guarded(value, last):
    if isinstance(value, list):
        return [guarded(item, last) for item in value]
    if isinstance(value, torch.Tensor) and value.numel():
        return at_an_edge(value, last)
    return value

torch.set_num_threads(2)
for level in _native.isa_levels():
    _native.set_isa(level)
    for spec in all_specs():
        for sample in spec.samples():
            if "cpu" in testing.backends_of(spec, sample) and "steps" not in sample.label:
                for last in (True, False):
                    inputs = sample.make(torch.device("cpu"))
                    print(level, spec.op.name, sample.label, file=sys.stderr)
                    spec.run({k: guarded(v, last) for k, v in inputs.items()}, "cpu")
print("clean")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages")
def test_no_read_beyond_an_input():
    """What AddressSanitizer does not see: reads by masked vector instructions."""
    command = [sys.executable, "-c", GUARDED]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-300:]
    assert result.stdout.strip() == "clean"


SANITIZED = """
import sys, torch
import gradsmith_kernels
gradsmith_kernels.__path__.insert(0, sys.argv[1])
from gradsmith_kernels import _native
from gradsmith_kernels.verify import testing
assert _native.__file__.startswith(sys.argv[1]), _native.__file__
from gradsmith_kernels.verify.spec import all_specs
torch.set_num_threads(2)
for level in _native.isa_levels():
    _native.set_isa(level)
    for spec in all_specs():
        for sample in spec.samples():
            if "cpu" in testing.backends_of(spec, sample) and "steps" not in sample.label:
                spec.run(sample.make(torch.device("cpu")), "cpu")
print("clean")
"""


def sanitizer():
    """The runtime to preload, if the compiler is GCC and has it."""
    compiler = amx.find_compiler()
    if not compiler:
        return None
    command = [*compiler, "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer")
def test_no_access_out_of_bounds(tmp_path):
    """Every sample of every op on every level; torch's allocations are watched as well."""
    runtime = sanitizer()
    if runtime is None:
        pytest.skip("the compiler has no libasan")
    environment = os.environ | {
        "CXXFLAGS": "-O1 -fsanitize=address -fno-omit-frame-pointer",
        "LDFLAGS": "-fsanitize=address",
    }
    build = [sys.executable, "setup.py", "-q", "build_ext"]
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    subprocess.run([*build, *folders], cwd=ROOT, env=environment, check=True, capture_output=True)
    package = tmp_path / "lib" / "gradsmith_kernels"
    assert (package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    result = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(package)],
        env=os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "clean"
