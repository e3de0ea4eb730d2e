"""Who may import whom, and what every op folder holds (docs/adding-an-op.md)."""

import ast
import sys
from pathlib import Path

import pytest

import gradsmith_kernels
from gradsmith_kernels.backends import op_names

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "gradsmith_kernels"
TRAINER = ROOT / "trainer" / "gradsmith"
PUBLIC = set(gradsmith_kernels.__all__) | {"certify"}


def modules(folder):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in folder.rglob("*.py")]


def imports(path):
    """(module, name) of every import in a file, also inside functions; name None for `import m`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # else within the package
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", modules(KERNELS))
def test_the_kernels_need_torch_triton_and_numpy_only(path):
    allowed = {"torch", "triton", "numpy", "gradsmith_kernels"} | set(sys.stdlib_module_names)
    assert {module.partition(".")[0] for module, _ in imports(path)} <= allowed


@pytest.mark.parametrize("path", modules(TRAINER))
def test_the_trainer_uses_the_kernels_public_names_only(path):
    for module, name in imports(path):
        top, _, rest = module.partition(".")
        assert top not in ("tests", "benchmarks")
        if top == "gradsmith_kernels":
            used = rest.partition(".")[0] or name
            assert used is None or used in PUBLIC, f"{module} {name}"


# From the ground: a room may import those below it, also inside functions. So there is no circle.
FLOORS = [
    {"errors"}, {"blocks", "reading"}, {"console", "shapes"}, {"files", "hub", "ranks"}, {"gguf"},
    {"recipe"}, {"precision"}, {"run"}, {"checkpoints"}, {"data"}, {"tasks"}, {"models"},
    {"checks"}, {"evaluation"}, {"training"}, {"report"}, {"launch", "quickstart"}, {"doctor"},
    {"cli"}, {"__main__"},
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms_used(path):
    """The rooms of the trainer that a file of it imports by relative imports."""
    package = path.relative_to(TRAINER).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split(".")) if node.module else base
            yield from [target[0]] if target else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", modules(TRAINER))
def test_the_trainers_rooms_import_what_is_below_them(path):
    own = path.relative_to(TRAINER).with_suffix("").parts[0]
    if own == "__init__":
        return
    for room in set(rooms_used(path)) - {own, "__version__"}:
        assert FLOOR[room] < FLOOR[own], f"{own} is on floor {FLOOR[own]}, {room} above it"


@pytest.mark.parametrize("path", [p for p in (ROOT / "csrc").rglob("*") if p.is_file()], ids=str)
def test_csrc_knows_nothing_of_torch(path):
    includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
    assert not any("torch" in line or "ATen" in line or "omp.h" in line for line in includes)


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*/*_avx*.cpp")), ids=str)
def test_files_with_instruction_set_flags_use_no_standard_library(path):
    """Its templates are weak symbols: the linker could keep the copy that needs AVX-512."""
    seen, todo = set(), [path]
    while todo:
        for line in todo.pop().read_text().splitlines():
            if line.startswith('#include "'):
                header = ROOT / "csrc" / line.split('"')[1]
                if header not in seen:
                    seen.add(header)
                    todo.append(header)
            elif line.startswith("#include <"):
                assert line in (
                    "#include <immintrin.h>",
                    "#include <stdint.h>",
                    "#include <string.h>",
                )


@pytest.mark.parametrize("name", op_names())
def test_an_op_folder_has_the_files_of_the_house(name):
    files = {path.name for path in (KERNELS / name).iterdir()}
    assert {"__init__.py", "reference.py", "op.py", "spec.py"} <= files
    assert "triton.py" not in files
    if "triton_kernels.py" in files:
        assert "budgets.json" in files
    if "cpu.py" in files and "_native" in (KERNELS / name / "cpu.py").read_text():
        sources = {path.name for path in (ROOT / "csrc" / name).iterdir()}
        assert {f"{name}.h", f"{name}_cpu.cpp", f"{name}_portable.cpp"} <= sources


@pytest.mark.parametrize("name", op_names())
def test_launch_options_are_fixed(name):
    for path in (KERNELS / name).glob("triton_kernels.py"):
        assert "autotune" not in {name for _, name in imports(path)}
        assert "triton.autotune" not in path.read_text()


def test_an_op_folder_without_a_spec_is_an_error(monkeypatch):
    from gradsmith_kernels import spec

    monkeypatch.setattr(spec, "op_names", lambda: [*op_names(), "nameless"])
    with pytest.raises(RuntimeError, match=r"nameless has no spec\.py"):
        spec.all_specs()
