"""Every op on every backend of this machine, driven by the specs."""

import itertools

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gradsmith_kernels.certify import interpreted_rows
from gradsmith_kernels.verify import testing
from gradsmith_kernels.verify.spec import all_specs
from gradsmith_kernels.verify.testing import bits

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
    run, device = spec.run, torch.device("cpu")

    def slightly_wrong(inputs, backend):
        return {
            name: tensor * (1 + 4 * testing.UNIT_ROUNDOFF[tensor.dtype])
            for name, tensor in run(inputs, backend).items()
        }

    monkeypatch.setattr(spec, "run", slightly_wrong)
    outputs, caught = set(), set()
    for sample in spec.samples():
        if sample.dtype == torch.float32 and set(spec.naive(sample.make(device))) - caught:
            verdicts = testing.parity(spec, sample, "reference", device)
            outputs |= {verdict.output for verdict in verdicts}
            caught |= {verdict.output for verdict in verdicts if not verdict.passed}
    assert caught == outputs != set()


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.op.name)
def test_the_draws_of_a_sample_differ(spec):
    def draw(sample, number):
        leaves = tree_leaves(sample.draw(torch.device("cpu"), number))
        return [bits(x) for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]

    for sample in spec.samples():
        first, again, other = (draw(sample, number) for number in (0, 0, 1))
        assert all(map(torch.equal, first, again))
        same = all(map(torch.equal, first, other))
        assert same == (not any(map(len, first))), sample.label


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
