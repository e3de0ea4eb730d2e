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


# The rooms of the kernels, from the ground up: room -> the rooms that its files import.
ROOMS = {
    "_native": set(),  # the C++, whose types _native.pyi has
    "backends": {"_native"},
    "verify": {"backends"},
    "ops/common": {"_native", "backends"},
    "ops": {"_native", "backends", "verify", "ops/common"},  # each op; not one another
    "augment": {"_native", "backends", "ops/common"},
    "optim": {"_native", "verify", "ops"},
    "transformers": {"backends", "ops/common", "ops"},
    "certify": {"backends", "verify"},
    "__init__": {"augment", "backends", "ops", "optim", "transformers"},
}


def room(module):
    """The room of a module of gradsmith_kernels, and the op's name where it is one's."""
    first, *rest = module.split(".")[1:] or ["__init__"]
    if first != "ops" or not rest:
        return first, None
    return ("ops/common", None) if rest[0] == "common" else ("ops", rest[0])


def test_the_rooms_have_no_circle():
    built = set()
    for name, below in ROOMS.items():
        assert below <= built, f"{name} imports what stands above it: {below - built}"
        built.add(name)


@pytest.mark.parametrize("path", modules(KERNELS))
def test_a_room_imports_those_below_it_only(path):
    module = ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts)
    ours = room(module.removesuffix(".__init__"))
    for source, name in imports(path):
        if source.partition(".")[0] != "gradsmith_kernels":
            continue
        within = f"{source}.{name}" if source == "gradsmith_kernels" and name else source
        theirs = room(within)
        if theirs == ours:
            continue
        assert theirs[0] in ROOMS[ours[0]], f"{source} {name}"


@pytest.mark.parametrize("path", modules(KERNELS))
def test_one_file_goes_below_autograd(path):
    """torch's private door: `registration` alone has it."""
    private = "_AutoDispatchBelowAutograd" in path.read_text()
    assert private == (path == KERNELS / "ops" / "common" / "registration.py")


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
    {"checks"}, {"evaluation"}, {"training"}, {"report"}, {"launch", "profile", "quickstart"},
    {"doctor"}, {"cli"}, {"__main__"},
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


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*/*_kernels.cpp")), ids=str)
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
    files = {path.name for path in (KERNELS / "ops" / name).iterdir()}
    assert {"__init__.py", "reference.py", "op.py", "spec.py"} <= files
    assert "triton.py" not in files
    if "triton_kernels.py" in files:
        assert "budgets.json" in files
    if "cpu.py" in files and "_native" in (KERNELS / "ops" / name / "cpu.py").read_text():
        sources = {path.name for path in (ROOT / "csrc" / name).iterdir()}
        parts = {f"{name}_{part}.cpp" for part in ("kernels", "cpu", "bindings")}
        assert {f"{name}.h"} | parts <= sources
        kernels = (ROOT / "csrc" / name / f"{name}_kernels.cpp").read_text()
        assert kernels.startswith("// levels: portable avx2 avx512")


@pytest.mark.parametrize("path", modules(KERNELS / "ops"))
def test_long_functions_of_ops_say_what_they_give(path):
    """spec.py's methods are described where Spec has them."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    long = [n for n in functions if n.end_lineno - n.lineno + 1 > 14 and n.name != "__init__"]
    silent = [n.name for n in long if not ast.get_docstring(n)]
    assert path.name == "spec.py" or not silent


@pytest.mark.parametrize("name", op_names())
def test_launch_options_are_fixed(name):
    for path in (KERNELS / "ops" / name).glob("triton_kernels.py"):
        assert "autotune" not in {name for _, name in imports(path)}
        assert "triton.autotune" not in path.read_text()


def test_an_op_folder_without_a_spec_is_an_error(monkeypatch):
    from gradsmith_kernels.verify import spec

    monkeypatch.setattr(spec, "op_names", lambda: [*op_names(), "nameless"])
    with pytest.raises(RuntimeError, match=r"nameless has no spec\.py"):
        spec.all_specs()
