"""What the project promises about itself: sizes, pins, and a README that tells the truth."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
README = re.sub(
    r"<!--.*?-->", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

FOLDERS = ("csrc", "kernels", "trainer", "tests", "benchmarks", "recipes", "scripts", "docs")
SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".sh", ".toml", ".yaml"}
MAX_COLUMNS = 100
MAX_LINES = 600  # a file that outgrows this has more than one job


def written_files() -> Iterator[Path]:
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            yield path
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file())


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_lines_fit_a_screen() -> None:
    long = []
    for path in written_files():
        if path.suffix not in SOURCES and path.name not in ("Makefile", "README.md"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            whole = line.startswith("|") or path.name == "floors.toml"  # a table's row, a key
            if len(line) > MAX_COLUMNS and not whole:
                long.append(f"{path.relative_to(ROOT)}:{number}: {len(line)} columns")
    assert not long, "\n".join(long)


def test_files_stay_small() -> None:
    big = []
    for path in written_files():
        if path.suffix in SOURCES:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                big.append(f"{path.relative_to(ROOT)}: {lines} lines")
    assert not big, "\n".join(big)


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    declared = [*PYPROJECT["build-system"]["requires"], *project["dependencies"]]
    declared += [line for extra in project["optional-dependencies"].values() for line in extra]
    return [Requirement(line) for line in declared]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_constraints_pin_what_is_declared(requirement: Requirement) -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("==")
        if equals and not line.startswith("#"):
            pins[canonicalize_name(name)] = version
    name = canonicalize_name(requirement.name)
    assert name in pins, f"constraints.txt does not pin {name}"
    assert requirement.specifier.contains(pins[name]), f"{pins[name]} is outside {requirement}"


def tree_paths() -> list[Path]:
    """The paths in the README's tree: names first on their lines, nested by indentation."""
    (tree,) = (block for block in blocks("text") if block.startswith("gradsmith/\n"))
    paths, parents = [], [ROOT]
    for line in tree.splitlines()[1:]:
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], parents[depth - 1] / name]
        paths.append(parents[-1])
    return paths


def test_the_tree_in_the_readme_is_the_tree() -> None:
    paths = tree_paths()
    assert [str(path.relative_to(ROOT)) for path in paths if not path.exists()] == []
    assert {path.name for path in paths if path.parent == ROOT} >= set(FOLDERS)


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_page_of_benchmarks_is_that_of_the_results() -> None:
    from benchmarks.table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks.table"


def test_commands_in_the_readme_exist() -> None:
    from gradsmith.cli import app

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    used = "\n".join(blocks("sh") + re.findall(r"`([^`\n]+)`", README))

    made = set(re.findall(r"^make ([a-z-]+)", used, re.MULTILINE))
    assert made, "the README names no make target"
    assert made <= targets
    called = set(re.findall(r"^gradsmith ([a-z]+)", used, re.MULTILINE))
    assert called, "the README names no command"
    assert called <= commands
    modules = set(re.findall(r"python -m ([a-z_.]+)", used))
    assert "gradsmith_kernels.certify" in modules
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_files_in_the_readme_exist() -> None:
    linked = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    named = re.findall(r"\b(?:recipes|docs|benchmarks)/[\w./-]+\.\w+", "\n".join(blocks("sh")))
    assert linked
    assert [path for path in linked + named if not (ROOT / path).exists()] == []


def test_the_recipe_in_the_readme_is_valid() -> None:
    from gradsmith.recipe import parse_recipe

    (block,) = blocks("yaml")
    assert parse_recipe(yaml.safe_load(block)).name


@pytest.mark.parametrize(
    "page", ["README.md", "docs/accelerate.md", "docs/augmentation.md", "docs/optimizers.md"]
)
def test_the_python_in_the_documents_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("python", (ROOT / page).read_text(encoding="utf-8")):
        exec(compile(block, page, "exec"), {})
