"""Signals, lost launchers, full disks and closed streams, on real processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import start, write_project


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    endless = {"training.steps": 100000, "training.checkpoint.every": 100000}
    write_project(tmp_path, **endless, **{"data.split.test": 0.0})
    return tmp_path


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def trains() -> bool:
    return Path("run/metrics.jsonl").is_file() and Path("run/metrics.jsonl").stat().st_size > 0


def saved() -> list[Path]:
    return [path for path in Path("run/checkpoints").glob("step-*") if path.suffix != ".tmp"]


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes of a launch with two ranks, rank 0 first."""
    found = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(found) == 2
    return sorted(int(pid) for pid in found)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_the_exit_code_names_it(number: int, here: Path) -> None:
    process = start("train", "r.yaml")
    wait_for(trains, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert err.startswith(f"error: stopped by {signal.Signals(number).name} after step ")
    assert err.count("\n") == 1
    assert len(saved()) == 1


@pytest.mark.long
def test_nohup_is_respected(here: Path) -> None:
    process = start(
        "train", "r.yaml", before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )  # fmt: skip
    wait_for(trains, process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143


def test_ctrl_c_ends_prepare_at_once(here: Path) -> None:
    words = [f"{i:x}" * 4 for i in range(30000)]
    for number in range(40):
        Path("texts", f"{number}.txt").write_text(" ".join(words[number::7] * 12))
    process = start("train", "r.yaml", "data.tokenizer.train.vocab_size=30000")
    wait_for(lambda: "training a tokenizer" in (process.stdout or sys.stdin).readline(), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert not Path("run/data/manifest.json").exists()  # else it went on to the end of prepare


def test_a_killed_rank_is_named(here: Path) -> None:
    process = start("launch", "--nproc", "2", "r.yaml", "training.zero.stage=0")
    wait_for(trains, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: rank "), err
    assert "was killed by SIGKILL (most often because the machine ran out of memory)" in err
    assert err.count("\n") == 1


def test_a_signal_to_the_launcher_saves(here: Path) -> None:
    process = start("launch", "--nproc", "2", "r.yaml", "training.zero.stage=0")
    wait_for(trains, process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 129, err
    assert "stopped by SIGHUP after step " in err
    assert len(saved()) == 1


@pytest.mark.long
def test_ranks_save_and_end_when_their_launcher_is_gone(here: Path) -> None:
    process = start("launch", "--nproc", "2", "r.yaml", "training.zero.stage=0")
    wait_for(trains, process)
    process.kill()
    process.wait()
    end = time.monotonic() + 120
    while not saved():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.long
def test_a_restart_goes_on_from_the_last_checkpoint(here: Path) -> None:
    process = start("launch", "--nproc", "2", "r.yaml", "training.checkpoint.every=20",
                    "training.steps=400", "--", "--max-restarts", "1")  # fmt: skip
    wait_for(lambda: bool(saved()), process)
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "going on from run/checkpoints/step-" in out


# ------------------------------------------------------------------------------------- streams


def small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_a_disk_that_is_full_at_a_checkpoint_is_said_in_a_line(here: Path) -> None:
    done = start("train", "r.yaml", "training.checkpoint.every=3", "model.config.hidden_size=64",
                 before=small_files)  # fmt: skip
    _, err = done.communicate(timeout=200)
    assert done.returncode == 1
    assert err.startswith("error: the checkpoint could not be written: "), err
    assert "no checkpoint is saved yet" in err
    assert err.count("\n") == 1
    assert not list(Path("run/checkpoints").glob("*"))


def test_a_disk_that_is_full_for_one_rank_ends_all_in_a_line(here: Path) -> None:
    process = start("launch", "--nproc", "2", "r.yaml", "training.checkpoint.every=20")
    wait_for(lambda: bool(saved()), process)
    # Rank 1 writes its share of the optimizer's states alone: 29,536 x 2 x 4 bytes / 2.
    resource.prlimit(ranks_of(process)[1], resource.RLIMIT_FSIZE, (50_000, 50_000))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: the checkpoint could not be written by rank 1: "), err
    assert "; saved is run/checkpoints/step-" in err
    assert err.count("\n") == 1
    assert saved()
    assert not list(Path("run/checkpoints").glob(".*"))
    assert start("evaluate", "run", "--split", "validation").wait(120) == 0


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("schema > /dev/full", 1, "No space left on device\n"),
        ("schema >&-", 0, ""),
        ("schema 2>&-", 0, ""),
        ("generate nope <&-", 2, "error: the prompt is empty"),
        ("validate nope.yaml >&- 2>/dev/full", 2, ""),
        ("prepare r.yaml output=/proc/run", 2, "/proc/run"),
    ],
)
def test_streams(shell: str, code: int, said: str, here: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m gradsmith {shell}",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
