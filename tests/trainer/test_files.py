"""Files and folders: what a path means, what is ours, and that it is replaced whole."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gradsmith
from gradsmith import files
from gradsmith.errors import UserError


def test_a_path_means_the_same_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DATA", "/data")
    assert files.expand("~/a") == "/home/ann/a"
    assert files.expand("$DATA/a") == files.expand("${DATA}/a") == "/data/a"
    assert files.expand("a/~b/$") == "a/~b/$"


@pytest.mark.parametrize(
    "path", ["", "  ", "$NOT_THERE/a", "${NOT_THERE}", "~nobody-here/a", "a\0"]
)
def test_a_path_that_means_nothing_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"empty|not set|no such user|NUL"):
        files.expand(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with files.replacing(path) as file:
            file.write("half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}
    with files.replacing(path) as one, files.replacing(path) as two:
        two.write("two")
        one.write("one")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "one"}


def test_only_what_is_ours_is_deleted(tmp_path: Path) -> None:
    theirs, ours, link = tmp_path / "data", tmp_path / "run", tmp_path / "link"
    theirs.mkdir()
    (theirs / "precious.txt").touch()
    ours.mkdir()
    files.mark(ours, "data")
    link.symlink_to(ours)
    for path in (theirs, theirs / "precious.txt", link):
        with pytest.raises(UserError, match="gradsmith did not make"):
            files.remove(path)
        with (
            pytest.raises(UserError, match="gradsmith did not make"),
            files.building(path, "data") as scratch,
        ):
            assert scratch.is_dir()
    files.remove(ours)
    link.unlink()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "precious.txt"]


def test_a_marker_of_another_program_marks_nothing(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[]", b'{"gradsmith": 1}', b"\xff", b"[" * 100_000):
        (tmp_path / files.MARKER).write_bytes(content)
        assert not files.is_ours(tmp_path)


def test_a_hash_is_computed_again_when_the_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"one", b"two", b"one", b"six"):  # all within a tick of the clock
        path.write_bytes(content)
        digest = files.sha256(path)
        assert files.sha256(path) == digest
        (tmp_path / "b").write_bytes(content)
        assert files.sha256(tmp_path / "b") == digest


def test_nothing_else_deletes_folders_or_replaces_files() -> None:
    root = Path(gradsmith.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("rmtree", "move", "write_text"):
                found.add(f"{path.relative_to(root)}: {node.attr}")
    # torchrun names the file that a rank's last words go to
    assert found == {"files.py: rmtree", "__main__.py: write_text"}
