import json

import pytest
import torch

from gradsmith_kernels import certify
from gradsmith_kernels.ops.rms_norm import reference
from gradsmith_kernels.verify import compile_checks


@pytest.fixture
def parity_only(monkeypatch):
    """The compilers and the interpreter have tests of their own."""
    monkeypatch.setattr(certify, "interpreted_rows", lambda op: [])
    monkeypatch.setattr(compile_checks, "measure_all", lambda specs: {})


def test_the_certificate(parity_only, tmp_path, capsys):
    file = tmp_path / "certificate.json"
    assert certify.main(["rms_norm", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.endswith("PASSED\n")
    certificate = json.loads(file.read_text())
    assert certificate["passed"]
    assert certificate["machine"]["torch"] == torch.__version__
    outputs = {
        (row["backend"], row["dtype"], row["output"])
        for row in certificate["parity"]
        if row["repeats"] and row["error"] <= row["bound"]
    }
    for backend in ("reference", "cpu"):
        for output in ("y", "h", "dx", "dweight", "dresidual"):
            assert (backend, "bfloat16", output) in outputs


def test_a_wrong_kernel_fails_it(parity_only, capsys, monkeypatch):
    forward = reference.forward

    def wrong(x, residual, weight, eps, offset):
        y, h, rstd = forward(x, residual, weight, eps, offset)
        return y * 1.001, h, rstd

    monkeypatch.setattr(reference, "forward", wrong)
    assert certify.main(["rms_norm"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "FAILED"
    assert any("reference  float32   y " in line and "FAILED: " in line for line in lines)


def test_a_kernel_over_its_budget_fails_it(parity_only, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(compile_checks, "check", lambda spec, measured: ["k on sm_90: registers"])
    assert certify.main(["optimizer_step"]) == 1
    assert "over budget: k on sm_90: registers" in capsys.readouterr().out


def test_an_unknown_op_exits_with_2(capsys):
    assert certify.main(["rmsnorm"]) == 2
    assert "did you mean rms_norm?" in capsys.readouterr().err
