"""What the tests over all specs do not see of `linear`."""

import pytest
import torch
from torch.nn import functional as F

from gradsmith_kernels import _native, backends, linear
from gradsmith_kernels.ops.linear.op import OP, dweight_backend


def tensors(rows, size, outputs, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, size), (outputs, size), (outputs,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def test_integers_are_exact():
    """Sums of small whole numbers are exact in float32: any element in a wrong place shows."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randint(-2, 3, shape, generator=generator).bfloat16()
        for shape in ((1700, 130), (70, 130), (1700, 70))
    )
    x.requires_grad_(), weight.requires_grad_()
    y = linear(x, weight, backend="cpu")
    y.backward(dy)
    exact = (
        x.double() @ weight.double().t(),
        dy.double() @ weight.double(),
        dy.double().t() @ x.double(),
    )
    for result, wanted in zip((y, x.grad, weight.grad), exact, strict=True):
        assert torch.equal(result, wanted.bfloat16())


def test_the_same_bits_for_any_number_of_threads():
    x, weight, bias = tensors(500, 70, 200)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = linear(a, b, bias, backend="cpu")
            y.backward(torch.ones_like(y) / 3)
            results.append((y, a.grad, b.grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_few_rows_are_torchs():
    x, weight, bias = tensors(3, 40, 50)
    assert torch.equal(linear(x, weight, bias, backend="cpu"), F.linear(x, weight, bias))


@pytest.mark.parametrize("level", _native.isa_levels())
def test_what_is_chosen(level):
    before = _native.isa()
    _native.set_isa(level)
    try:
        slow = not backends.torch_multiplies_bf16()
        assert slow or level in ("avx512bf16", "amx")
        assert OP.resolve(None, "cpu", torch.bfloat16) == ("cpu" if slow else "reference")
        assert OP.resolve(None, "cpu", torch.float16) == ("reference" if level == "amx" else "cpu")
        ours = slow or level == "amx"
        assert dweight_backend("cpu", torch.bfloat16) == ("cpu" if ours else "reference")
        for dtype in (torch.float32, torch.float64):
            assert OP.resolve(None, "cpu", dtype) == dweight_backend("cpu", dtype) == "reference"
    finally:
        _native.set_isa(before)
    assert dweight_backend("cuda", torch.bfloat16) == "reference"
    assert OP.resolve(None, "cuda", torch.bfloat16) == "reference"
    with pytest.raises(backends.BackendError, match=r"not torch\.float(32|64)"):
        OP.resolve("cpu", "cpu", torch.float64)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, backend):
    leaves = dict(zip(("x", "weight", "bias"), tensors(100, 30, 20), strict=True))
    for name, tensor in leaves.items():
        tensor.requires_grad_(name != frozen)
    linear(*leaves.values(), backend=backend).square().sum().backward()
    with_all = [t.detach().clone().requires_grad_() for t in leaves.values()]
    linear(*with_all, backend=backend).square().sum().backward()
    for (name, tensor), other in zip(leaves.items(), with_all, strict=True):
        assert tensor.grad is None if name == frozen else torch.equal(tensor.grad, other.grad)


def test_a_frozen_weight_keeps_no_input():
    x, weight, _ = tensors(100, 30, 20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear(x.requires_grad_(), weight)
    assert kept == [weight.shape]


def test_under_compile():
    x, weight, bias = (t.requires_grad_() for t in tensors(100, 30, 20))

    def function(x, weight, bias):
        return linear(x, weight, bias, backend="cpu").float().square().mean()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(x, weight, bias).backward()
    grads = [t.grad.clone() for t in (x, weight, bias)]
    for t in (x, weight, bias):
        t.grad = None
    function(x, weight, bias).backward()
    assert all(torch.equal(t.grad, g) for t, g in zip((x, weight, bias), grads, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "x is torch.int32"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float16)}, TypeError, "weight is torch.float16"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must be \(N, K\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be \(N, K\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(5,\); it is \(4,\)"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "x is on cpu, bias on meta"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"x": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "bias": torch.zeros(5)}
    with pytest.raises(error, match=message):
        linear(**(arguments | change))


def test_there_is_no_second_derivative():
    x, weight, _ = (t.requires_grad_() for t in tensors(100, 30, 20))
    (dx,) = torch.autograd.grad(linear(x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()
