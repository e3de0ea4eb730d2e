"""torch.library: opcheck, driven by the specs; torch.compile, fake tensors, checkpointing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gradsmith_kernels import rms_norm
from gradsmith_kernels.verify.spec import all_specs

CHECKS = [
    pytest.param(check, id=f"{check.overload.name()}-{i}")
    for spec in all_specs()
    for i, check in enumerate(spec.opchecks(torch.device("cpu")))
]


@pytest.mark.parametrize("check", CHECKS)
def test_opcheck(check):
    torch.library.opcheck(check.overload, check.args, check.kwargs)


def block(x, residual, weight):
    y, h = rms_norm(x, weight, residual=residual)
    return rms_norm(torch.sin(y), weight) * h


def gradients(function):
    torch.manual_seed(0)
    x, residual = (torch.randn(6, 40, requires_grad=True) for _ in range(2))
    weight = torch.randn(40, requires_grad=True)
    out = function(x, residual, weight)
    return [out, *torch.autograd.grad(out, (x, residual, weight), torch.randn(6, 40))]


def test_compiles_without_a_graph_break():
    eager = gradients(block)
    compiled = gradients(torch.compile(block, fullgraph=True, backend="aot_eager"))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_activation_checkpointing_gives_the_same_bits():
    plain = gradients(block)
    again = gradients(lambda *inputs: checkpoint(block, *inputs, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_fake_tensors_of_more_than_2_to_the_31_elements():
    with FakeTensorMode():
        x = torch.empty(2**20, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(4096, dtype=torch.float32, requires_grad=True)
        y, h = rms_norm(x, weight, residual=x)
        (y.sum() + h.sum()).backward()
        assert y.shape == h.shape == x.grad.shape == (2**20, 4096)
        assert y.dtype == torch.bfloat16
        assert weight.grad.dtype == torch.float32


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, torch.ones(8)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()
