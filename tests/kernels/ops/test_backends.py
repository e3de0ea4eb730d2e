import json
import os
import subprocess
import sys

import pytest
import torch

from gradsmith_kernels import backends
from gradsmith_kernels.ops.rms_norm.op import OP

CPU = torch.device("cpu")


def test_importing_is_cheap_and_changes_nothing():
    code = (
        "import json, os, sys, torch\n"
        "before, environment = set(sys.modules), dict(os.environ)\n"
        "import time; start = time.perf_counter()\n"
        "import gradsmith_kernels\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'triton', 'transformers', 'deepspeed', 'peft', 'torch._dynamo', 'pandas'}\n"
        "print(json.dumps({'heavy': sorted(heavy & (set(sys.modules) - before)),\n"
        "  'environment': dict(os.environ) == environment, 'seconds': seconds,\n"
        "  'cuda': torch.cuda.is_initialized()}))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    facts = json.loads(output)
    assert facts["heavy"] == []
    assert facts["environment"]
    assert not facts["cuda"]
    assert facts["seconds"] < 2


def test_availability_names_every_op_and_backend():
    table = backends.availability()
    assert set(table) == {
        "adafactor_step",
        "attention",
        "augment",
        "glu",
        "layer_norm",
        "linear",
        "linear_cross_entropy",
        "newton_schulz",
        "optimizer_step",
        "rms_norm",
        "rope",
    }
    for reasons in table.values():
        assert tuple(reasons) == backends.BACKENDS
        assert reasons["reference"] is None
        assert reasons["cpu"] is None
        assert "no cuda implementation" in reasons["cuda"]


def test_the_device_and_dtype_choose():
    assert OP.resolve(None, "cpu", torch.bfloat16) == "cpu"
    assert OP.resolve(None, "cpu", torch.float64) == "reference"
    with pytest.raises(backends.BackendError, match="no backend is made for device 'mps'"):
        OP.resolve(None, "mps", torch.float32)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "message"),
    [
        ("cpu", "cpu", torch.float64, "it takes .* not torch.float64"),
        ("cpu", "cuda", torch.float32, "the tensors are on cuda"),
        ("cuda", "cpu", torch.float32, "no cuda implementation"),
    ],
)
def test_a_request_that_cannot_be_met_raises(backend, device, dtype, message):
    with pytest.raises(backends.BackendError, match=message):
        OP.resolve(backend, device, dtype)


def test_what_is_missing_raises_and_does_not_fall_back(monkeypatch):
    reasons = {"cpu": "the native module is not built", "triton": "torch finds no GPU"}
    monkeypatch.setattr(backends, "missing", reasons.get)
    with pytest.raises(backends.BackendError, match="native module is not built"):
        OP.resolve(None, "cpu", torch.float32)
    with pytest.raises(backends.BackendError, match="torch finds no GPU"):
        OP.resolve(None, "cuda", torch.float32)
    assert OP.resolve("reference", "cpu", torch.float32) == "reference"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_it_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, gradsmith_kernels as g\n"
        "print(g.rms_norm(torch.ones(2, 4), torch.ones(4)).sum().item())\n"
        "print(g.backends.availability()['rms_norm']['triton'])\n"
        "print(len(__import__('gradsmith_kernels.verify.spec').verify.spec.all_specs()))"
    )
    lines = run(code).splitlines()
    assert float(lines[0]) == pytest.approx(8)
    assert "triton cannot be imported" in lines[1]
    assert lines[2] == str(len(backends.op_names()))


def test_bfloat16_is_refused_in_tritons_interpreter():
    pytest.importorskip("triton")
    code = (
        "import torch, gradsmith_kernels as g\n"
        "x = torch.ones(2, 4)\n"
        "print(g.rms_norm(x, x[0], backend='triton').sum().item())\n"
        "try: g.rms_norm(x.bfloat16(), x[0], backend='triton')\n"
        "except g.backends.BackendError as error: print(error)"
    )
    lines = run(code, TRITON_INTERPRET="1").splitlines()
    assert float(lines[0]) == pytest.approx(8)
    assert "silently wrong on bfloat16" in lines[1]


@pytest.mark.parametrize(("triton", "numpy", "can"), [("3.6.0", "2.4.0", False),
                                                      ("3.6.0", "2.3.5", True),
                                                      ("3.7.1", "2.4.0", True)])  # fmt: skip
def test_an_interpreter_that_cannot_loop_is_refused(triton, numpy, can, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    caches = (backends.missing, backends.triton_before)
    try:
        for cached in caches:
            cached.cache_clear()
        reason = backends.missing("triton")
    finally:
        for cached in caches:
            cached.cache_clear()
    assert (reason is None) == can
    assert can or "numpy<2.4" in reason
