"""`training.precision: auto`: what it takes on which machine, where it is kept and said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from gradsmith import checks, doctor, precision
from gradsmith.__main__ import main
from gradsmith.errors import UserError
from gradsmith.recipe import Recipe
from gradsmith.report.build import build_report
from gradsmith.run import Run, read_json
from gradsmith.training import loop
from gradsmith_kernels import backends

Tiny = Callable[..., Recipe]
AUTO = {"training.precision": "auto"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """machine("avx2") has that instruction set; in machine("amx", "AVX2") oneDNN keeps to AVX2."""
    monkeypatch.setattr(precision, "device", lambda: torch.device("cpu"))

    def be(level: str | None, onednn: str = "") -> None:
        native = None if level is None else {"isa": level, "isa_levels": [], "threading": ""}
        monkeypatch.setattr(backends, "native", lambda: native)
        monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", onednn)
        backends._held_down.cache_clear()

    yield be
    monkeypatch.undo()
    backends._held_down.cache_clear()


@pytest.mark.parametrize("onednn", ["", "DEFAULT", "ALL", "AVX512_CORE_AMX"])
@pytest.mark.parametrize("level", list(backends._BF16_OVER_FP32))
def test_the_level_decides(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, level: str, onednn: str
) -> None:
    machine(level, onednn)
    for x86, kernels in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(backends, "X86", x86)
        found = backends.fast_bf16("cpu", kernels)
        assert found.device == f"this CPU ({level})"
        assert found.fast == (found.ratio >= 1)
        fast = ["avx512bf16", "amx"] + (["avx2", "avx512"] if x86 and kernels else [])
        assert found.fast == (level in fast)


@pytest.mark.parametrize(
    ("level", "onednn", "lower"),
    [
        ("amx", "AVX2", "avx2"),
        ("amx", "avx512_core", "avx512"),
        ("amx", "AVX512_CORE_BF16", "avx512bf16"),
        ("avx2", "AVX512_CORE_BF16", "avx2"),
        ("avx512bf16", "SSE41", "portable"),
    ],
)
def test_the_lower_of_our_level_and_onednns(
    machine: Callable[..., None], level: str, onednn: str, lower: str
) -> None:
    machine(level, onednn)
    assert backends.fast_bf16("cpu").device == f"this CPU ({lower})"
    assert backends.torch_multiplies_bf16() == (lower == "avx512bf16")


def test_without_the_native_module_it_is_fp32(machine: Callable[..., None], tiny: Tiny) -> None:
    machine(None)
    assert not backends.fast_bf16("cpu").fast
    recipe = tiny("run", **{"training.precision": "bf16"})
    assert precision.precision_price(recipe) == (
        "bf16 on this CPU (instruction set unknown without the native module) is slower than fp32"
    )


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_has_it_or_not(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert backends.fast_bf16("cuda") == (has, "Tesla V100", None)


def test_validate_and_doctor_say_it(
    machine: Callable[..., None], tiny: Tiny, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny("run", **AUTO).dump()))
    machine("portable")
    assert main(["validate", str(file)]) == 0
    assert "dtype   fp32 (auto)\n" in capfd.readouterr().out
    assert main(["validate", str(file), "training.precision=bf16"]) == 0
    slow = "bf16 on this CPU (portable): about "
    assert f"dtype   bf16\nwarning: {slow}" in capfd.readouterr().out
    assert main(["validate", str(file), "training.precision=bf16", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["precision_price"].startswith(slow)
    assert doctor._precision() == {
        "auto": "fp32",
        "why": "a step in bf16 is about 0.9 times as fast as in fp32 on this CPU (portable)",
    }  # fmt: skip
    machine("amx")
    assert main(["validate", str(file)]) == 0
    assert "dtype   bf16 (auto)\n" in capfd.readouterr().out
    assert main(["validate", str(file), "training.precision=fp32"]) == 0
    assert "warning: fp32 on this CPU (amx): about 2" in capfd.readouterr().out
    assert doctor._precision()["auto"] == "bf16"


def test_a_run_keeps_what_it_began_with(
    machine: Callable[..., None], tiny: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny("run", **AUTO, **{"training.steps": 2})
    run = Run(recipe.output)
    machine("portable")
    loop.train(recipe)
    assert run.recipe().training.precision == "fp32"
    assert "fp32 (auto), ZeRO-1" in capfd.readouterr().out

    machine("amx")  # the run moves to a machine that would have taken bf16
    longer = tiny("run", **AUTO, **{"training.steps": 3})
    assert checks.check_recipe(longer).precision == "fp32"
    loop.train(longer)
    said = capfd.readouterr().out
    assert "going on from" in said
    assert "warning: fp32 on this CPU (amx): about 2" in said
    assert run.recipe().training.precision == "fp32"
    provenance = read_json(run.provenance_path)["precision"]
    assert provenance["asked"] == "auto"
    assert provenance["price"] in build_report([run], run.report_path).read_text()
    assert "fp32 (auto), ZeRO" in run.report_path.read_text()

    other = tiny("run", **{"training.precision": "bf16", "training.steps": 3})
    with pytest.raises(UserError, match=r"training\.precision: fp32 before, bf16 now"):
        loop.train(other)
    loop.train(longer, fresh=True)
    assert run.recipe().training.precision == "bf16"
