import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsmith_kernels import _native, backends, geglu, swiglu
from gradsmith_kernels.ops.glu.op import ACTIVATIONS
from gradsmith_kernels.ops.glu.spec import SPEC, our_glu, outputs_and_gradients, sample
from gradsmith_kernels.verify import testing

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_native.isa_levels())
def isa(request):
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), max_size=2),
    cols=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    layout=st.sampled_from(["contiguous", "halves", "rows", "columns"]),
)
def test_any_shape(shape, cols, dtype, activation, layout):
    drawn = sample((*shape, cols), dtype, activation, layout)
    testing.check_parity(SPEC, drawn, "cpu", CPU)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_the_activation_of_transformers_times_up(name, backend):
    from transformers.activations import ACT2FN

    activation = name.replace("gelu_pytorch_tanh", "gelu_tanh")
    gate = torch.linspace(-9, 9, 999, requires_grad=True)
    up = torch.linspace(2, -1, 999, requires_grad=True)
    dy = torch.linspace(1, -2, 999)

    def results(y):
        return [y, *torch.autograd.grad(y, (gate, up), dy)]

    ours = results(our_glu(gate, up, activation, backend))
    theirs = results(ACT2FN[name](gate) * up)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_not_small(activation, dtype, backend, isa):
    """Huge, infinite and undefined gates: what the formula gives in float64."""
    values = [0.0, -0.0, 19.0, 88.0, 100.0, 1e4, 6e4, 1e20, 3e38, math.inf]
    gate = torch.tensor([*values, *(-value for value in values), math.nan]).to(dtype)
    up, dy = torch.full_like(gate, 2.0), torch.ones_like(gate)
    inputs = {"gate": gate, "up": up, "dy": dy, "activation": activation}
    ours, exact = SPEC.run(inputs, backend), SPEC.exact(inputs)
    for name, result in ours.items():
        expected = exact[name].to(dtype)
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-30, equal_nan=True)


def exact_activation(x, activation):
    """In float64, without 1 - tanh and 1 - erf: they cancel, which even float64 shows."""
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "gelu":
        return x * torch.erfc(-x * math.sqrt(0.5)) / 2
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_result_is_near_in_float32(activation, isa):
    """Each result by itself, where parity judges them together: also those that are tiny."""
    gate = torch.linspace(-8, 8, 100_000)
    ones = torch.ones_like(gate)
    ours = SPEC.run({"gate": gate, "up": ones, "dy": ones, "activation": activation}, "cpu")
    x = gate.double().requires_grad_()
    y = exact_activation(x, activation)
    (slope,) = torch.autograd.grad(y.sum(), x)
    error = ((ours["y"] - y) / y).abs()
    assert error.max() < 1e-5  # e^-87, as inexact as its exponent
    assert error[gate.abs() < 3].max() < 1e-6
    assert torch.equal(ours["dup"], ours["y"])
    assert (ours["dgate"] - slope).abs().max() < 1e-6


def test_the_bits_do_not_depend_on_the_number_of_threads():
    for layout in ("contiguous", "halves"):
        inputs = sample((33, 10_001), torch.bfloat16, "gelu", layout).make(CPU)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(SPEC.run(inputs, "cpu"))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["halves", "rows", "columns"])
def test_the_bits_do_not_depend_on_strides(activation, layout, isa):
    inputs = sample((9, 77), torch.float32, activation, layout).make(CPU)
    packed = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
    first, second = SPEC.run(inputs, "cpu"), SPEC.run(inputs | packed, "cpu")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_branch_without_gradient_leaves_the_others_bits(activation, backend):
    inputs = sample((7, 65), torch.bfloat16, activation, "halves").make(CPU)
    both = SPEC.run(inputs, backend)
    for name, other in (("gate", "up"), ("up", "gate")):
        leaves = {name: inputs[name].detach().requires_grad_(), other: inputs[other].detach()}
        y = our_glu(leaves["gate"], leaves["up"], activation, backend)
        y.backward(inputs["dy"])
        assert leaves[other].grad is None
        assert torch.equal(leaves[name].grad, both[f"d{name}"])
        gradients = torch.ops.gradsmith.glu_backward(
            inputs["dy"], inputs["gate"], inputs["up"], activation, name == "gate", name == "up"
        )
        assert [d.numel() for d in gradients] == [7 * 65 * (name == n) for n in ("gate", "up")]


def test_only_gate_and_up_are_kept():
    gate, up = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    kept = []

    def keep(x):
        kept.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        swiglu(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_halves_of_a_product_under_compile(activation):
    def mlp(product):
        gate, up = product.chunk(2, -1)
        return our_glu(torch.sin(gate), up, activation) * 2

    def gradients(function):
        torch.manual_seed(0)
        product = torch.randn(5, 66, requires_grad=True)
        out = function(product)
        return out, *torch.autograd.grad(out, product, torch.randn(5, 33))

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(mlp), gradients(compiled), strict=True):
        torch.testing.assert_close(one, other)


def test_an_expanded_gradient():
    gate, up = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    geglu(gate, up).sum().backward()  # the gradient of sum() has stride 0
    inputs = {"gate": gate, "up": up, "dy": torch.ones(4, 32), "activation": "gelu"}
    expected = SPEC.run(inputs, "cpu")
    assert torch.equal(gate.grad, expected["dgate"])
    assert torch.equal(up.grad, expected["dup"])


def test_offsets_beyond_2_to_the_31_elements():
    apart = 2**31 + 64
    memory = torch.empty(apart + 128, dtype=torch.bfloat16)  # 4 GiB of addresses, few touched
    halves = [memory.as_strided((2, 64), (apart, 1), first) for first in (0, 64)]
    for half in halves:
        half.copy_(torch.randn(2, 64))
    dy = torch.randn(2, 64).bfloat16()
    gate, up = halves
    inputs = {"gate": gate, "up": up, "dy": dy, "activation": "silu"}
    assert gate.stride(0) == up.stride(0) == apart
    first = outputs_and_gradients(our_glu, inputs)
    second = outputs_and_gradients(our_glu, inputs | {"gate": gate.clone(), "up": up.clone()})
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_in_float64_passes_gradcheck(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: our_glu(g, u, activation), (gate, up))


def test_a_second_derivative_is_refused():
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    (dgate,) = torch.autograd.grad(swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dgate.sum().backward()


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (swiglu, {"gate": torch.ones(2, 4).int()}, TypeError, "swiglu: gate is torch.int32; it mu"),
        (geglu, {"up": torch.ones(2, 4).half()}, TypeError, "geglu: up is torch.float16, gate is"),
        (swiglu, {"up": torch.ones(4)}, ValueError, r"gate is \(2, 4\), up is \(4,\)"),
        (geglu, {"gate": torch.ones(2, 1)}, ValueError, r"gate is \(2, 1\), up is \(2, 4\)"),
        (swiglu, {"gate": torch.tensor(1.0)}, ValueError, r"gate has no dimension; it must be"),
        (swiglu, {"up": torch.ones(2, 4, device="meta")}, ValueError, "gate is on cpu, up on meta"),
        (geglu, {"approximate": "erf"}, ValueError, "approximate is 'erf'; it must be 'none' or"),
        (swiglu, {"backend": "cudnn"}, ValueError, "'cudnn' is not one of reference, cpu, triton"),
        (geglu, {"backend": "cuda"}, backends.BackendError, "glu has no cuda implementation"),
    ],
)
def test_bad_arguments(function, arguments, error, message):
    good = {"gate": torch.ones(2, 4), "up": torch.ones(2, 4)}
    with pytest.raises(error, match=message):
        function(**(good | arguments))


def test_an_activation_that_is_not_there():
    with pytest.raises(ValueError, match="'relu'; it must be one of silu, gelu, gelu_tanh"):
        torch.ops.gradsmith.glu(torch.ones(2), torch.ones(2), "relu")
