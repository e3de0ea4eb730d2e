"""Every op on every backend of this machine, driven by the specs."""

import itertools

import pytest
import torch

from gradsmith_kernels import testing
from gradsmith_kernels.certify import interpreted_rows, parity_rows
from gradsmith_kernels.spec import all_specs

CASES = [
    pytest.param(spec, sample, backend, id=f"{spec.op.name}-{sample.label}-{backend}")
    for spec in all_specs()
    for sample in spec.samples()
    for backend in testing.backends_of(spec, sample)
]


@pytest.mark.parametrize(("spec", "sample", "backend"), CASES)
def test_parity(spec, sample, backend):
    testing.check_parity(spec, sample, backend, testing.device_of(backend))


def test_every_backend_of_this_machine_is_covered():
    covered = {(case.values[0].op.name, case.values[2]) for case in CASES}
    for spec in all_specs():
        for backend in spec.op.implementations:
            if spec.op.missing(backend) is None:
                assert (spec.op.name, backend) in covered


@pytest.mark.parametrize("spec", all_specs("triton"), ids=lambda spec: spec.op.name)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the triton backend itself")
def test_triton_parity_in_the_interpreter(spec):
    pytest.importorskip("triton")
    rows = interpreted_rows(spec.op.name)
    assert rows
    assert [row for row in rows if not row["passed"]] == []


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.op.name)
def test_the_rule_catches_a_wrong_result(spec, monkeypatch):
    """A result off by four roundings of its dtype must fail, for every output of every op."""
    run = spec.run

    def slightly_wrong(inputs, backend):
        return {
            name: tensor * (1 + 4 * testing.UNIT_ROUNDOFF[tensor.dtype])
            for name, tensor in run(inputs, backend).items()
        }

    monkeypatch.setattr(spec, "run", slightly_wrong)
    rows = parity_rows(spec.op.name, ("reference",))
    assert not any(row["passed"] for row in rows if row["dtype"] == "float32")


def test_poisoned_memory_shows_what_was_not_written():
    with testing.poisoned_memory():
        assert torch.empty(10).isnan().all()
        assert torch.zeros(3).new_empty(4, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("result", "exact"), list(itertools.permutations([float("nan"), 1.0, float("inf")], 2))
)
def test_a_result_that_is_not_finite_has_infinite_error(result, exact):
    assert testing.relative_error(torch.tensor([result]), torch.tensor([exact])) == float("inf")
