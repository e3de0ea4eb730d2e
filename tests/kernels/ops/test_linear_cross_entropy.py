import importlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradsmith_kernels import backends, linear_cross_entropy
from gradsmith_kernels.ops.linear_cross_entropy.spec import SPEC, sample
from gradsmith_kernels.verify import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
BACKENDS = ("reference", "cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    # Of fewer numbers an error is a matter of luck; the spec has them.
    shape=st.tuples(st.integers(16, 50)) | st.tuples(st.integers(2, 4), st.integers(8, 20)),
    size=st.integers(16, 150),
    vocabulary=st.integers(2, 700),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5]),
    layout=st.sampled_from(["contiguous", "rows", "columns"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    softcap=st.sampled_from([0.0, 20.0]),
    chunk=st.sampled_from([None, 1, 16, 100]),
)
def test_any_shape(shape, size, vocabulary, dtype, bias, ignored, layout, **options):
    drawn = sample(
        shape, size, vocabulary, dtype, bias=bias, ignored=ignored, layout=layout, **options
    )
    testing.check_parity(SPEC, drawn, "cpu", CPU)


def tensors(tokens=50, size=24, vocabulary=301, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_torchs_cross_entropy(reduction, smoothing):
    """The oracle that our own spec does not use: torch's reductions, in float64."""
    *leaves, target = tensors()
    target[::3] = 7  # here: the index to ignore
    ours = linear_cross_entropy(
        leaves[0], leaves[1], target, bias=leaves[2], ignore_index=7, label_smoothing=smoothing,
        reduction=reduction, chunk=11,
    )  # fmt: skip
    theirs = F.cross_entropy(
        F.linear(*leaves), target, ignore_index=7, label_smoothing=smoothing, reduction=reduction
    )
    torch.testing.assert_close(ours, theirs)
    upstream = torch.rand_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_reference_passes_gradcheck():
    *leaves, target = tensors(4, 3, 5)
    target[1] = -100
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, r=reduction: linear_cross_entropy(
                h, w, target, bias=b, label_smoothing=0.2, z_loss=0.1, softcap=2.0, reduction=r
            ),
            leaves,
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_bits_do_not_depend_on_the_number_of_threads(reduction):
    drawn = sample((500,), 70, 1500, torch.bfloat16, bias=True, chunk=200, reduction=reduction)
    inputs = drawn.make(CPU)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(SPEC.run(inputs, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_the_chunk_changes_rounding_only():
    *leaves, target = tensors(dtype=torch.float32)
    results = []
    for chunk in (1, 7, 49, 50, 1000, None):
        loss = linear_cross_entropy(leaves[0], leaves[1], target, bias=leaves[2], chunk=chunk)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_number_of_micro_batches_is_the_global_batch(backend):
    """Sums of parts, over a count of their own, are the mean of the whole."""
    hidden, weight, _, target = tensors(dtype=torch.float32)
    target[5:20] = -100
    whole = linear_cross_entropy(hidden, weight, target, backend=backend)
    expected = torch.autograd.grad(whole, (hidden, weight))
    count = int((target != -100).sum())
    parts = [
        linear_cross_entropy(h, weight, t, reduction="sum", backend=backend) / count
        for h, t in zip(hidden.split(16), target.split(16), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), (hidden, weight)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_learn_is_a_loss_of_zero(backend):
    hidden, weight, bias, target = tensors(dtype=torch.float32)
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(
            hidden, weight, torch.full_like(target, -100), bias=bias, z_loss=0.1,
            reduction=reduction, backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        assert loss.abs().sum() == 0
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sure_model_keeps_a_gradient(dtype):
    """1 - p of 1e-6 does not cancel, and logits of thousands do not overflow."""
    weight = torch.eye(4, dtype=dtype).requires_grad_()
    hidden = torch.tensor([[14.0, 0, 0, 0], [3000.0, 2990, 0, 0]], dtype=dtype)
    target = torch.tensor([0, 1])
    loss = linear_cross_entropy(hidden, weight, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    exact = weight.detach().double().requires_grad_()
    true = F.cross_entropy(F.linear(hidden.double(), exact), target, reduction="none")
    (expected,) = torch.autograd.grad(true.sum(), exact)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient[:, 0].double(), expected[:, 0], rtol=2e-2, atol=0)
    assert gradient.isfinite().all()


def test_a_vocabulary_with_logits_of_minus_infinity():
    hidden, weight, bias, target = tensors(dtype=torch.float32)
    masked = bias.detach().clone()
    masked[300] = -torch.inf
    target = target.clamp(max=299)
    ours = linear_cross_entropy(hidden, weight, target, bias=masked)
    theirs = F.cross_entropy(F.linear(hidden, weight, masked), target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, weight)[0], torch.autograd.grad(theirs, weight)[0]
    )


def test_a_logit_that_is_not_a_number_shows():
    hidden, weight, _, target = tensors(dtype=torch.float32)
    broken = hidden.detach().clone()
    broken[3, 2] = torch.nan
    assert linear_cross_entropy(broken, weight, target).isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_asked_for_is_computed_and_it_is_the_same(reduction):
    *leaves, target = tensors(dtype=torch.bfloat16)

    def gradients(*wanted):
        given = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        loss = linear_cross_entropy(given[0], given[1], target, bias=given[2], reduction=reduction)
        loss.backward(torch.linspace(0.1, 1, len(target)) if reduction == "none" else None)
        return [leaf.grad for leaf in given]

    everything = gradients(0, 1, 2)
    for wanted in ((0,), (1,), (2,), (0, 2)):
        for i, gradient in enumerate(gradients(*wanted)):
            if i in wanted:
                assert torch.equal(gradient, everything[i])
            else:
                assert gradient is None


def test_without_gradients_none_are_computed(monkeypatch):
    *leaves, target = tensors(dtype=torch.float32)
    loss = linear_cross_entropy(leaves[0], leaves[1], target)
    module = importlib.import_module("gradsmith_kernels.ops.linear_cross_entropy.cpu")
    monkeypatch.setattr(module, "forward_with_gradients", None)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(leaves[0], leaves[1], target), loss)
    detached = linear_cross_entropy(leaves[0].detach(), leaves[1].detach(), target)
    assert torch.equal(detached, loss)
    assert not detached.requires_grad


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    *leaves, target = tensors(dtype=torch.bfloat16)
    loss = linear_cross_entropy(leaves[0], leaves[1], target)
    first = torch.autograd.grad(loss, leaves[:2], torch.tensor(0.3), retain_graph=True)
    first[1].mul_(7)  # what the user does with them is no matter
    again = torch.autograd.grad(loss, leaves[:2], torch.tensor(0.3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1] * 7)


def loss_of(hidden, weight, bias, target):
    return linear_cross_entropy(torch.sin(hidden), weight, target, bias=bias, chunk=20)


def test_it_compiles_and_checkpoints():
    *leaves, target = tensors(dtype=torch.float32)
    expected = torch.autograd.grad(loss_of(*leaves, target), leaves)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves, target), leaves), expected)
    again = checkpoint(loss_of, *leaves, target, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(again, leaves), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_derivative_is_refused(reduction):
    *leaves, target = tensors(dtype=torch.float32)
    loss = linear_cross_entropy(leaves[0], leaves[1], target, reduction=reduction)
    for leaf in leaves[:2]:
        (slope,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
            slope.sum().backward()


def test_the_logits_are_never_there():
    """8192 tokens of 32768 entries: the logits alone would be 1 GiB in float32."""
    code = (
        "import resource, torch\n"
        "from gradsmith_kernels import linear_cross_entropy\n"
        "hidden = torch.randn(8192, 32).bfloat16().requires_grad_()\n"
        "weight = torch.randn(32768, 32).bfloat16().requires_grad_()\n"
        "target = torch.randint(32768, (8192,))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "linear_cross_entropy(hidden, weight, target).backward()\n"
        "print((peak() - before) // 1024)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert int(output.stdout) < 160  # MiB: a chunk's logits, 64, and weight's gradients


def test_a_large_workspace_is_given_back():
    """96 tokens of a million entries: 366 MiB of logits, which no later call of this kind needs."""
    code = (
        "import re, torch\n"
        "from pathlib import Path\n"
        "from gradsmith_kernels import linear_cross_entropy\n"
        "hidden = torch.randn(96, 8).bfloat16().requires_grad_()\n"
        "weight = torch.randn(1_000_000, 8).bfloat16()\n"
        "target = torch.randint(1_000_000, (96,))\n"
        "now, peak = (rf'Vm{key}:\\s+(\\d+) kB' for key in ('RSS', 'HWM'))\n"
        "read = lambda what: int(re.search(what, Path('/proc/self/status').read_text())[1])\n"
        "before = read(now)\n"
        "linear_cross_entropy(hidden, weight, target).backward()\n"
        "print((read(peak) - before) // 1024, (read(now) - before) // 1024)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    peak, after = map(int, output.stdout.split())
    assert peak > 360
    assert after < 60


GOOD = {
    "hidden": torch.ones(2, 3, 4),
    "weight": torch.ones(5, 4),
    "target": torch.tensor([[0, 1, 2], [3, 4, -100]]),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.ones(2, 4)}, ValueError, r"hidden is \(2, 4\), target is \(2, 3\)"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight must be \(V, 4\).* it is \(5, 3\)"),
        ({"weight": torch.ones(0, 4)}, ValueError, r"it is \(0, 4\)"),
        ({"weight": torch.ones(4)}, ValueError, r"it is \(4,\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \(5,\); it is \(4,\)"),
        ({"bias": torch.ones(5).half()}, TypeError, "bias is torch.float16, hidden is torch.fl"),
        ({"weight": torch.ones(5, 4).half()}, TypeError, "weight is torch.float16, hidden is"),
        ({"hidden": torch.ones(2, 3, 4).int()}, TypeError, "hidden is torch.int32"),
        ({"target": GOOD["target"].int()}, TypeError, "target is torch.int32; it must be int64"),
        ({"target": GOOD["target"].to("meta")}, ValueError, "hidden is on cpu, target on meta"),
        ({"weight": torch.ones(5, 4, device="meta")}, ValueError, "weight on meta"),
        ({"label_smoothing": 1.1}, ValueError, r"label_smoothing is 1.1; it must be in \[0, 1\]"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0; it must be >= 0"),
        ({"softcap": float("nan")}, ValueError, "softcap is nan; it must be >= 0"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; it must be one of mean, sum, none"),
        ({"chunk": 0}, ValueError, "chunk is 0; it must be > 0"),
        ({"backend": "cuda"}, backends.BackendError, "has no cuda implementation"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(GOOD | arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [5, -1, -99, 2**40])
def test_a_target_outside_the_vocabulary_is_named(backend, value):
    target = GOOD["target"].clone()
    target[0, 1], target[1, 0] = -100, value
    with pytest.raises(IndexError, match=rf"target\[1, 0\] is {value}; it must be in \[0, 5\)"):
        linear_cross_entropy(GOOD["hidden"], GOOD["weight"], target, backend=backend)
