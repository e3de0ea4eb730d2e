"""`gradsmith doctor`: what it finds agrees with the machine, and what is missing is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from gradsmith import doctor
from gradsmith.__main__ import main
from gradsmith_kernels import backends


def test_json_holds_the_machine_the_versions_and_the_table(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["machine"]["threads"] == len(os.sched_getaffinity(0))
    assert 1 <= found["machine"]["cores"] <= found["machine"]["threads"]
    assert 2**28 < found["machine"]["memory"] < 2**50
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["kernels"]["ops"] == backends.availability()
    assert {"optimizer_step", "rms_norm"} <= set(found["kernels"]["ops"])
    assert set(found["kernels"]["ops"]["rms_norm"]) == set(backends.BACKENDS)


def test_the_products_of_this_level_are_timed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    rows = {row["precision"]: row for row in found["products"]}
    assert list(rows) == ["bf16", "fp16", "fp32"]
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert rows[name]["backend"] == backends.chosen("linear", "cpu", dtype)
        for measured in ("forward", "forward+backward"):
            assert 1e7 < rows[name][measured] < 1e14  # between a slow loop and a whole cluster
    bf16 = backends.fast_bf16("cpu")
    if not torch.cuda.is_available() and bf16.ratio is not None:
        assert found["precision"]["auto"] == ("bf16" if bf16.ratio >= 1 else "fp32")
        assert f"about {bf16.ratio} times as fast as in fp32" in found["precision"]["why"]
    assert main(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "Linear layers on this CPU" in out
    assert "GFLOP/s" in out


def test_features_are_those_of_the_processor() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    features = doctor.examine()["machine"]["features"]
    assert all(f" {feature}" in flags for feature in features)
    assert ("avx512f" in features) == (" avx512f" in flags)


def test_the_table_says_yes_no_and_why(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"some_op": {"reference": None, "cpu": None, "triton": "torch finds no GPU"}}
    monkeypatch.setattr(backends, "availability", lambda: table)
    assert main(["doctor"]) == 0
    lines = capfd.readouterr().out.splitlines()
    row = next(line for line in lines if "some_op" in line)
    assert [cell.strip() for cell in row.strip("│┃ ").split("│")] == ["some_op", "yes", "yes", "no"]
    assert "  triton: torch finds no GPU" in lines


def missing(found: dict[str, object]) -> dict[str, str]:
    return {row["what"]: row["how"] for row in doctor._missing(found)}


def test_what_is_missing_comes_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    native = {"isa": "avx2", "isa_levels": [], "threading": "OpenMP"}
    gpu = [{"name": "GPU", "memory": 2**34}]
    whole = {"gpus": gpu, "tools": {"c++": "12", "nvcc": "13"}, "kernels": {"native": native}}
    assert missing(whole) == {}
    assert "CUDA toolkit" in missing({**whole, "tools": {"c++": "12", "nvcc": None}})["nvcc"]
    without_module = {**whole, "kernels": {"native": None}}
    assert missing(without_module) == {"the native module": "pip install gradsmith again"}
    without_compiler = {**without_module, "tools": {"c++": None, "nvcc": None}}
    assert "apt install g++" in missing(without_compiler)["the native module"]
    assert "a GPU" in missing({**whole, "gpus": []})
    monkeypatch.setitem(doctor.EXTRAS, "train", ("json", "no_such_module"))
    assert missing(whole) == {"no_such_module": "pip install 'gradsmith[train]'"}
