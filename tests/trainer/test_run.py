"""A run's folder: the lock, the metrics file after a crash, provenance."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradsmith.errors import UserError
from gradsmith.recipe import parse_recipe
from gradsmith.run import Run, provenance, read_json, write_json

TREE: dict[str, Any] = {
    "name": "tiny",
    "output": "runs/tiny",
    "data": {
        "sources": [{"kind": "text", "path": "corpus.txt"}],
        "tokenizer": {"train": {"vocab_size": 300}},
    },
    "model": {"architecture": "llama"},
    "training": {"steps": 3, "optimizer": {"lr": 3e-4}},
}


def rows(*steps: int) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": step, "loss": 1.0 / step} for step in steps]


def test_the_recipe_survives_its_folder(tmp_path: Path) -> None:
    recipe = parse_recipe(TREE)
    Run(tmp_path / "run").write_recipe(recipe)
    assert Run.open(tmp_path / "run").recipe() == recipe


def test_a_folder_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there"):
        Run.open(tmp_path)


# ----------------------------------------------------------------------------------- metrics


def test_metrics_come_back_as_they_were_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.read_metrics() == []
    for row in rows(1, 2, 3):
        run.append_metrics(row)
    assert run.read_metrics() == rows(1, 2, 3)


@pytest.mark.parametrize("cut", ['{"kind": "train", "st', '{"kind": "train", "step": 3', "{", '"'])
def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path: Path, cut: str) -> None:
    run = Run(tmp_path)
    for row in rows(1, 2):
        run.append_metrics(row)
    with run.metrics_path.open("a") as file:
        file.write(cut)
    assert run.read_metrics() == rows(1, 2)


def test_a_resumed_run_writes_on_behind_a_line_cut_off(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for row in rows(1, 2):
        run.append_metrics(row)
    with run.metrics_path.open("a") as file:
        file.write('{"kind": "tr')
    run.rewind_metrics(2)
    run.append_metrics(rows(3)[0])
    assert run.read_metrics() == rows(1, 2, 3)


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.metrics_path.write_text('{"kind": "train", "step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not readable as JSON"):
        run.read_metrics()


@pytest.mark.parametrize(("step", "left"), [(0, ()), (2, (1, 2)), (9, (1, 2, 3))])
def test_rewinding_drops_what_came_after(tmp_path: Path, step: int, left: tuple[int, ...]) -> None:
    run = Run(tmp_path)
    for row in rows(1, 2, 3):
        run.append_metrics(row)
    run.rewind_metrics(step)
    assert run.read_metrics() == rows(*left)


# -------------------------------------------------------------------------------------- lock


def hold(folder: Path, ready: Any) -> None:
    with Run(folder).lock():
        ready.set()
        signal.pause()


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    with (
        pytest.raises(UserError, match=f"in use by process {holder.pid}; .* output="),
        Run(tmp_path).lock(),
    ):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)  # no cleaning up: the kernel lets go
    holder.join()
    with Run(tmp_path).lock():
        assert (tmp_path / "lock").read_text() == str(os.getpid())


# -------------------------------------------------------------------------------------- JSON


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}


def test_a_broken_json_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not readable as JSON"):
        read_json(path)


def test_provenance_is_plain_data_about_this_process() -> None:
    found = json.loads(json.dumps(provenance()))
    assert found["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert found["versions"]["torch"]
    assert found["cores"] >= 1


def test_provenance_names_the_commit_of_a_checkout() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    git = provenance()["git"]
    assert git["commit"] == done.stdout.strip()
    assert isinstance(git["dirty"], bool)
