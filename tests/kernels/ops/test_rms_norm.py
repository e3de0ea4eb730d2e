import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsmith_kernels import backends, rms_norm
from gradsmith_kernels.ops.rms_norm.spec import SPEC, sample
from gradsmith_kernels.verify import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), max_size=2),
    cols=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    layout=st.sampled_from(["contiguous", "rows", "columns"]),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_any_shape(shape, cols, dtype, weight_dtype, residual, layout, offset):
    drawn = sample((*shape, cols), dtype, weight_dtype, residual, layout, offset)
    testing.check_parity(SPEC, drawn, "cpu", torch.device("cpu"))


@pytest.mark.parametrize("rows", [31, 33, 1000])
def test_the_bits_do_not_depend_on_the_number_of_threads(rows):
    inputs = sample((rows, 200), torch.bfloat16, torch.float32, residual=True).make(
        torch.device("cpu")
    )
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


def test_with_a_residual_it_is_the_sum_normalised():
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    y, h = rms_norm(x, weight, residual=residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, weight))


@pytest.mark.parametrize(
    ("family", "offset"), [("llama.Llama", 0.0), ("gemma2.Gemma2", 1.0), ("gemma3.Gemma3", 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_offset_is_that_of_the_model_family(family, offset, dtype):
    """Gemma's modules scale by 1 + weight, Llama's by weight: the modules themselves judge."""
    module, _, name = family.partition(".")
    models = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    norm = getattr(models, f"{name}RMSNorm")(96, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    norm.to(dtype)
    x = torch.randn(50, 96, dtype=dtype, requires_grad=True)
    dy = torch.randn(50, 96, dtype=dtype)

    def results(function, *leaves):
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    theirs = results(lambda x, _: norm(x), x, norm.weight)
    ours = results(lambda x, w: rms_norm(x, w, eps=1e-5, offset=offset), x, norm.weight)
    exact = results(
        lambda x, w: rms_norm(x, w, eps=1e-5, offset=offset, backend="reference"),
        x.detach().double().requires_grad_(),
        norm.weight.detach().double().requires_grad_(),
    )
    # The same function to rounding (a forgotten offset is an error of about 1), and no less exact.
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert testing.relative_error(other, truth) < 4 * testing.UNIT_ROUNDOFF[dtype]
        error = testing.relative_error(mine, truth)
        bound = testing.error_bound(
            testing.relative_error(other, truth), dtype, mine.numel(), "cpu"
        )
        assert error <= bound


def test_offset_and_weight_are_added_in_float32():
    """1 + a small bfloat16 weight is not a bfloat16: added in that type it would be lost."""
    x = torch.randn(4, 64)
    weight = torch.full((64,), 2.0**-12, dtype=torch.bfloat16)
    scaled = rms_norm(x, weight, offset=1.0)
    assert torch.equal(scaled, rms_norm(x, weight.float() + 1.0))
    assert not torch.equal(scaled, rms_norm(x, torch.ones(64)))


def test_a_frozen_weight_gets_no_gradient_and_the_rest_the_same():
    x = torch.randn(70, 64, requires_grad=True)
    weight = torch.randn(64, requires_grad=True)
    dy = torch.randn(70, 64)
    dx, _ = torch.autograd.grad(rms_norm(x, weight), (x, weight), dy)
    (frozen_dx,) = torch.autograd.grad(rms_norm(x, weight.detach()), (x,), dy)
    assert torch.equal(dx, frozen_dx)


def test_an_expanded_gradient():
    x = torch.randn(4, 32, requires_grad=True)
    rms_norm(x, torch.ones(32)).sum().backward()  # the gradient of sum() has stride 0
    (expected,) = torch.autograd.grad(
        rms_norm(x, torch.ones(32), backend="reference"), x, torch.ones(4, 32)
    )
    torch.testing.assert_close(x.grad, expected)


def test_offsets_beyond_2_to_the_31_elements():
    apart = 2**31 + 64
    memory = torch.empty(apart + 64, dtype=torch.bfloat16)  # 4 GiB of addresses, two pages touched
    x = memory.as_strided((2, 64), (apart, 1))
    x.copy_(torch.randn(2, 64))
    weight = torch.randn(64)
    leaf, small = x.detach().requires_grad_(), x.clone().requires_grad_()
    dy = torch.randn(2, 64).bfloat16()
    y, same = rms_norm(leaf, weight), rms_norm(small, weight)
    assert leaf.stride(0) == apart
    assert torch.equal(y, same)
    assert torch.equal(*(torch.autograd.grad(o, i, dy)[0] for o, i in ((y, leaf), (same, small))))


def test_the_reference_in_float64_passes_gradcheck():
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for offset in (0.0, 1.0):
        assert torch.autograd.gradcheck(
            lambda x, r, w, at=offset: rms_norm(x, w, offset=at, residual=r), (x, residual, weight)
        )
        assert torch.autograd.gradcheck(
            lambda x, w, at=offset: rms_norm(x, w, offset=at), (x, weight)
        )


def test_the_gil_is_released():
    """Another Python thread gets on while a kernel runs."""
    import threading

    x, weight = torch.randn(4096, 4096), torch.ones(4096)
    rms_norm(x, weight)
    done, ticks = threading.Event(), []

    def tick():
        while not done.is_set():
            ticks.append(1)
            done.wait(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    before = len(ticks)
    for _ in range(20):
        rms_norm(x, weight)
    during = len(ticks) - before
    done.set()
    thread.join()
    assert during >= 20


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(2, 3)}, ValueError, r"x is \(2, 3\), weight is \(4,\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x is \(\)"),
        ({"weight": torch.ones(1, 4)}, ValueError, r"weight is \(1, 4\)"),
        ({"weight": torch.ones(4, device="meta")}, ValueError, "x is on cpu, weight on meta"),
        ({"x": torch.ones(2, 4).int()}, TypeError, "x is torch.int32; it must be float32"),
        ({"x": torch.ones(2, 4).double()}, TypeError, "float64 does not mix"),
        ({"residual": torch.ones(3, 4)}, ValueError, r"residual must be like x.*\(3, 4\)"),
        ({"residual": torch.ones(2, 4).half()}, TypeError, "residual is torch.float16"),
        ({"eps": 0.0}, ValueError, "eps is 0.0; it must be > 0"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"offset": float("inf")}, ValueError, "offset is inf; it must be finite"),
        ({"backend": "cudnn"}, ValueError, "'cudnn' is not one of reference, cpu, triton, cuda"),
        ({"backend": "cuda"}, backends.BackendError, "rms_norm has no cuda implementation"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"x": torch.ones(2, 4), "weight": torch.ones(4)}
    with pytest.raises(error, match=message):
        rms_norm(**(good | arguments))
