"""The op that docs/adding-an-op.md writes out: its two folders are all that it takes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "adding-an-op.md"

# The native module of this process has the new op alone; the rest of the package is this one.
SCRIPT = """
import sys, torch
import gradsmith_kernels, gradsmith_kernels.ops
gradsmith_kernels.__path__.insert(0, sys.argv[1])
gradsmith_kernels.ops.__path__.append(sys.argv[2])
from gradsmith_kernels import _native, backends, certify
from gradsmith_kernels.verify import testing
from gradsmith_kernels.verify.spec import all_specs

assert "relu_squared" in backends.op_names() and "rms_norm" in backends.op_names()
(spec,) = (spec for spec in all_specs() if spec.op.name == "relu_squared")
for check in spec.opchecks(torch.device("cpu")):
    torch.library.opcheck(check.overload, check.args, check.kwargs)
for level in _native.isa_levels():
    _native.set_isa(level)
    for sample in spec.samples():
        for backend in testing.backends_of(spec, sample):
            testing.check_parity(spec, sample, backend, torch.device("cpu"))
assert backends.chosen("relu_squared", "cpu") == "cpu"
sys.exit(certify.main(["relu_squared"]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree that holds the files of the page, and builds them."""
    tree = tmp_path_factory.mktemp("tree")
    files = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    for name, text in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    folders = {str(Path(name).parent) for name, _ in files}
    assert folders == {"kernels/gradsmith_kernels/ops/relu_squared", "csrc/relu_squared"}
    for name in ("setup.py", "csrc/bindings.cpp", "csrc/common"):
        whole = (ROOT / name).is_dir()
        (shutil.copytree if whole else shutil.copy)(ROOT / name, tree / name)
    (tree / "csrc" / "common" / "tensor_lists_bindings.cpp").unlink()  # the optimizers'
    for folder in ("kernels", "trainer", "recipes/quickstart"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "lib"]
    environment = os.environ | {"CXXFLAGS": "-O0"}
    done = subprocess.run(build, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return tree


def test_an_op_is_its_two_folders(tree):
    own = tree / "lib" / "gradsmith_kernels", tree / "kernels" / "gradsmith_kernels" / "ops"
    command = [sys.executable, "-c", SCRIPT, *map(str, own)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("PASSED\n")
    assert {line.split()[1] for line in done.stdout.splitlines() if "relu_squared " in line} == {
        "reference",
        "cpu",
    }
