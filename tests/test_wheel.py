"""The wheel: everything is in it, and it works where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from gradsmith_kernels import _native

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"kernels": "gradsmith_kernels", "trainer": "gradsmith"}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC", "CXX")}


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(
    scope="module", params=["built already", pytest.param("from nothing", marks=pytest.mark.long)]
)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; by default around the native module that it has already."""
    pytest.importorskip("auditwheel", reason="it is in the extra dev")
    tree = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("kernels", "trainer", "recipes", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=leave)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, tree)
    if request.param == "from nothing":
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", "raw")
        run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=tree)
    else:
        run(sys.executable, "setup.py", "-q", "build_py", cwd=tree)
        (library,) = tree.glob("build/lib*")
        shutil.copy(_native.__file__, library / "gradsmith_kernels")
        run(sys.executable, "setup.py", "-q", "bdist_wheel", "--skip-build", "-d", "raw", cwd=tree)
    (raw,) = tree.glob("raw/*.whl")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(sys.executable, "-m", "auditwheel", "repair", "-w", tree / "dist", raw, PATH=path)
    (made,) = tree.glob("dist/*.whl")
    return made


def test_everything_is_in_it(wheel: Path) -> None:
    assert "-manylinux_" in wheel.name
    files = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    wanted = {
        str(path.relative_to(ROOT / folder))
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    wanted |= {
        f"gradsmith/recipes/quickstart/{path.name}"
        for path in (ROOT / "recipes" / "quickstart").iterdir()
    }
    wanted.add(f"gradsmith_kernels/{Path(_native.__file__).name}")
    assert {name for name in files if ".dist-info/" not in name} == wanted
    assert any(name.endswith("budgets.json") for name in wanted)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that holds the wheel alone, and sees this one's packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    install = ("install", "--no-deps", "--no-index", "--quiet", wheel)
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install)
    return folder / "bin"


def test_it_works_without_a_compiler(bare: Path, tmp_path: Path) -> None:
    alone = {"PATH": str(bare)}  # no compiler, no tools
    assert not any(shutil.which(name, path=str(bare)) for name in ("cc", "c++", "gcc", "g++", "ld"))
    where = (
        "import gradsmith, gradsmith_kernels._native as n; print(gradsmith.__file__, n.__file__)"
    )
    places = run(bare / "python", "-c", where, cwd=tmp_path, **alone).split()
    assert all(Path(place).is_relative_to(bare.parent) for place in places)

    certificate = run(
        bare / "python", "-m", "gradsmith_kernels.certify", "linear", cwd=tmp_path, **alone
    )
    assert certificate.endswith("PASSED\n")
    assert " cpu " in certificate
    levels = "from gradsmith_kernels import _native as n; print(*n.isa_levels())"
    told = run(bare / "python", "-c", levels, cwd=tmp_path, **alone).split()
    assert told == _native.isa_levels()  # all that this machine has, the portable one first

    took = []
    for _ in range(3):
        before = os.times()
        assert "quickstart" in run(bare / "gradsmith", "--help", cwd=tmp_path, **alone)
        after = os.times()
        used = after.children_user + after.children_system
        took.append(used - before.children_user - before.children_system)
    assert min(took) < 0.5  # of CPU time, which a busy machine does not stretch
    recipe = "from gradsmith.quickstart import recipes_folder as f; print(*f().iterdir())"
    recipes = run(bare / "python", "-c", recipe, cwd=tmp_path, **alone)
    assert recipes.count(".yaml") == len(list((ROOT / "recipes" / "quickstart").iterdir()))
