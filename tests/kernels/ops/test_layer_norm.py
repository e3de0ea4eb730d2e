"""layer_norm beyond its spec: torch's own as the judge, large means, what is not needed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsmith_kernels import backends, layer_norm
from gradsmith_kernels.ops.layer_norm.spec import SPEC, sample
from gradsmith_kernels.verify import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = (None, *DTYPES)


def gradients(function, leaves, dy):
    y = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def inputs(rows, cols, dtype=torch.float32, mean=0.0):
    torch.manual_seed(rows + cols)
    x = (torch.randn(rows, cols) + mean).to(dtype).requires_grad_()
    weight, bias = (torch.randn(cols).to(dtype).requires_grad_() for _ in range(2))
    return x, weight, bias, torch.randn(rows, cols).to(dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), max_size=2),
    cols=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    parameters=st.tuples(st.sampled_from(OPTIONAL), st.sampled_from(OPTIONAL)),
    residual=st.booleans(),
    layout=st.sampled_from(["contiguous", "rows", "columns"]),
)
def test_any_shape(shape, cols, dtype, parameters, residual, layout):
    drawn = sample((*shape, cols), dtype, parameters, residual, layout)
    testing.check_parity(SPEC, drawn, "cpu", torch.device("cpu"))


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_torchs_layer_norm(has_weight, has_bias, backend):
    x, weight, bias, dy = inputs(70, 96)
    leaves = (x, weight if has_weight else None, bias if has_bias else None)
    ours = gradients(lambda *a: layer_norm(*a, eps=1e-3, backend=backend), leaves, dy)
    torchs = gradients(
        lambda x, w, b: torch.nn.functional.layer_norm(x, (96,), w, b, 1e-3), leaves, dy
    )
    assert len(ours) == 2 + has_weight + has_bias
    for mine, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [1e3, -3e3, 1e4])
@pytest.mark.parametrize(("rows", "cols"), [(64, 384), (5, 9001), (200, 37)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_large_mean_does_not_cancel(mean, rows, cols, backend):
    """Output and every gradient are at least as good as torch's, measured against float64."""
    x, weight, bias, dy = inputs(rows, cols, mean=mean)

    def torchs(x, w, b):
        return torch.nn.functional.layer_norm(x, (cols,), w, b, 1e-5)

    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = gradients(torchs, wide, dy.double())
    naive = gradients(torchs, (x, weight, bias), dy)
    ours = gradients(lambda *a: layer_norm(*a, backend=backend), (x, weight, bias), dy)
    for mine, other, truth in zip(ours, naive, exact, strict=True):
        error = testing.relative_error(mine, truth)
        assert error <= 1.1 * testing.relative_error(other, truth)
        assert error < 1e-6  # as without a mean: nothing is lost to it


def test_rows_without_deviation():
    """var = 0, which rounding must not make negative: the result is the bias."""
    bias = torch.randn(33)
    for value in (0.0, 3.0, 1e4, 0.1):
        y = layer_norm(torch.full((2, 33), value), torch.randn(33), bias, eps=1e-12)
        torch.testing.assert_close(y, bias.expand(2, 33), rtol=0, atol=1e-6)


def test_nan_and_infinity_stay_in_their_row():
    x = torch.randn(4, 50)
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    y, clean = layer_norm(x), layer_norm(x[[0, 3]])
    assert y[1:3].isnan().all()
    assert torch.equal(y[[0, 3]], clean)


@pytest.mark.parametrize("rows", [31, 33, 1000])
def test_the_bits_do_not_depend_on_the_number_of_threads(rows):
    parameters = (torch.float32, torch.bfloat16)
    drawn = sample((rows, 200), torch.bfloat16, parameters, residual=True)
    made = drawn.make(torch.device("cpu"))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(SPEC.run(made, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_with_a_residual_it_is_the_sum_normalised():
    x, weight, bias, residual = inputs(5, 64)
    y, h = layer_norm(x, weight, bias, residual=residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, layer_norm(h, weight, bias))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, backend, residual):
    x, weight, bias, dy = inputs(70, 64)
    added = torch.randn(70, 64) if residual else None

    def function(*leaves):
        y = layer_norm(*leaves, residual=added, backend=backend)
        return y[0] if residual else y

    every = gradients(function, (x, weight, bias), dy)
    leaves = [t.detach() if i in frozen else t for i, t in enumerate((x, weight, bias))]
    rest = gradients(function, leaves, dy)
    kept = [every[0], *(g for i, g in enumerate(every[1:]) if i not in frozen)]
    assert all(torch.equal(one, other) for one, other in zip(rest, kept, strict=True))


def test_what_is_not_needed_is_not_computed():
    x, weight, bias, dy = (t.detach() for t in inputs(6, 16))
    statistics = torch.rand(6, 3)
    for needed in ([True, False, False], [False, True, False], [False, False, True]):
        outputs = torch.ops.gradsmith.layer_norm_backward.default(
            dy, None, x, weight, bias, statistics, needed
        )
        assert [output.numel() > 0 for output in outputs] == needed


def test_an_expanded_gradient():
    x, weight, bias, _ = inputs(4, 32)
    layer_norm(x, weight, bias).sum().backward()  # the gradient of sum() has stride 0
    expected = gradients(
        lambda *a: layer_norm(*a, backend="reference"), (x, weight, bias), torch.ones(4, 32)
    )
    for leaf, other in zip((x, weight, bias), expected[1:], strict=True):
        torch.testing.assert_close(leaf.grad, other)


def test_compiles_without_a_graph_break():
    def block(x, residual, weight, bias):
        y, h = layer_norm(x, weight, bias, residual=residual)
        return layer_norm(torch.sin(y)) * h

    x, weight, bias, dy = inputs(6, 40)
    leaves = (x, torch.randn(6, 40, requires_grad=True), weight, bias)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        gradients(block, leaves, dy), gradients(compiled, leaves, dy), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_offsets_beyond_2_to_the_31_elements():
    apart = 2**31 + 64
    memory = torch.empty(apart + 64, dtype=torch.bfloat16)  # 4 GiB of addresses, two pages touched
    x = memory.as_strided((2, 64), (apart, 1))
    x.copy_(torch.randn(2, 64))
    leaf, small = x.detach().requires_grad_(), x.clone().requires_grad_()
    dy = torch.randn(2, 64).bfloat16()
    assert leaf.stride(0) == apart
    for one, other in zip(
        gradients(layer_norm, (leaf,), dy), gradients(layer_norm, (small,), dy), strict=True
    ):
        assert torch.equal(one, other)


def test_the_reference_in_float64_passes_gradcheck():
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, r, w, b: layer_norm(x, w, b, residual=r), (x, residual, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda x, b: layer_norm(x, bias=b), (x, bias))


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(layer_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(2, 3)}, ValueError, r"x is \(2, 3\), weight is \(4,\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x is \(\)"),
        ({"x": torch.tensor(1.0), "weight": None, "bias": None}, ValueError, "last dimension"),
        ({"weight": torch.ones(1, 4)}, ValueError, r"weight is \(1, 4\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias is \(5,\)"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, "x is on cpu, bias on meta"),
        ({"x": torch.ones(2, 4).int()}, TypeError, "x is torch.int32; it must be float32"),
        ({"bias": torch.ones(4).long()}, TypeError, "bias is torch.int64; it must be float32"),
        ({"x": torch.ones(2, 4).double()}, TypeError, "float64 does not mix: .* weight"),
        ({"bias": torch.ones(4).double()}, TypeError, "float64 does not mix: .* bias"),
        ({"residual": torch.ones(3, 4)}, ValueError, r"residual must be like x.*\(3, 4\)"),
        ({"residual": torch.ones(2, 4).half()}, TypeError, "residual is torch.float16"),
        ({"eps": 0.0}, ValueError, "eps is 0.0; it must be > 0"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"backend": "cudnn"}, ValueError, "'cudnn' is not one of reference, cpu, triton, cuda"),
        ({"backend": "cuda"}, backends.BackendError, "layer_norm has no cuda implementation"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": torch.ones(4)}
    with pytest.raises(error, match=message):
        layer_norm(**(good | arguments))
