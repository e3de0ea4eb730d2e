"""attention and attention_varlen: drawn shapes, masked rows, determinism, dropout, bad input."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsmith_kernels import attention, attention_varlen, backends
from gradsmith_kernels.ops.attention.reference import kept, philox
from gradsmith_kernels.ops.attention.spec import PACKED, SPEC, Case, make_inputs, sample
from gradsmith_kernels.verify import testing

CPU = torch.device("cpu")
# Under TRITON_INTERPRET=1 the Triton kernels alone, in less and smaller cases: see the test of it.
INTERPRETED = backends.interpreting()
HERE = ["triton"] if INTERPRETED else ["reference", "cpu"]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)


@st.composite
def cases(draw):
    """Features and their combinations: shapes, windows, documents, strides, sinks, dropout."""
    key_heads = draw(st.sampled_from([1, 2, 3]))
    unlimited = st.sampled_from([-1, -1, 0, 1, 5, 63, 64, 65, 200])
    length = st.integers(5, 60) if INTERPRETED else st.integers(0, 150)
    case = Case(
        batch=draw(st.integers(1, 3)),
        rows=draw(length),
        cols=draw(length),
        heads=key_heads * draw(st.integers(1, 2 if INTERPRETED else 3)),
        key_heads=key_heads,
        size=draw(st.sampled_from([1, 8, 15, 16, 31, 33, 64, 80, 96, 128, 256])),
        causal=draw(st.booleans()),
        window=(draw(unlimited), draw(unlimited)),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        sink=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.25])),
        layout=draw(st.sampled_from(["contiguous", "heads", "fused", "elements"])),
        scale=draw(st.sampled_from([None, None, 0.3, -0.2, 0.0])),
        lse_gradient=draw(st.booleans()),
    )
    if draw(st.booleans()):
        pairs = draw(st.lists(st.tuples(length, length), max_size=4))
        same = draw(st.booleans())
        lengths = tuple((n, n) if same else (n, m) for n, m in pairs)
        case = replace(case, lengths=lengths, padding=draw(st.integers(0, 20)))
    return case


def worst_share(case, dtype, backend):
    """The largest error as a share of what passes.

    Drawn cases may be of a few numbers, or of gradients that cancel (one key: dq is 0), so the
    bound is doubled and has a floor. A wrong mask misses it by far, in float32 a thousand times.
    """
    verdicts = testing.parity(SPEC, sample(case, dtype), backend, CPU, draws=1)
    assert all(verdict.repeats for verdict in verdicts)
    floor = 1e-5 if dtype == torch.float32 else 16 * testing.UNIT_ROUNDOFF[dtype]
    # Where the naive computation is exact: of what is 0 the error is absolute; and one key's
    # probability is 1 there, which here is rounded, its sum not.
    nought = max(1e-3, testing.UNIT_ROUNDOFF[dtype])
    return max(v.error / max(2 * v.bound, floor if v.naive_error else nought) for v in verdicts)


def assert_right(backend, case, dtype):
    share = worst_share(case, dtype, backend)
    assert share <= 1, f"{case}: {share:.2f} of the bound"


EVERY = {"case": cases(), "dtype": st.sampled_from(DTYPES)}
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=12 if INTERPRETED else 60, derandomize=True, **SETTINGS)
@given(**EVERY)
def test_drawn_cases_are_right(backend, case, dtype):
    assert_right(backend, case, dtype)


@pytest.mark.long
@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=200 if INTERPRETED else 2000, **SETTINGS)
@given(**EVERY)
def test_many_drawn_cases_are_right(backend, case, dtype):
    assert_right(backend, case, dtype)


def run_interpreted(test, marked):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-m", marked, f"{__file__}::{test}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the triton backend itself")
def test_drawn_cases_are_right_in_tritons_interpreter():
    run_interpreted("test_drawn_cases_are_right", "not long")


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the triton backend itself")
def test_many_drawn_cases_are_right_in_tritons_interpreter():
    run_interpreted("test_many_drawn_cases_are_right", "long")


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("causal", [False, True])
def test_torch_agrees(backend, causal):
    """An oracle that is not ours, with grouped heads."""
    q = torch.randn(2, 6, 77, 48, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 77, 48, dtype=torch.float64).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    views = (x.float().transpose(1, 2) for x in (q, k, v))
    out = attention(*views, causal=causal, backend=backend)
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("sink", [False, True])
def test_rows_that_see_nothing_are_zero(backend, sink):
    """Queries before the keys begin (bottom-right), and rows of no sequence."""
    inputs = make_inputs(Case(rows=70, cols=5, causal=True, sink=sink), torch.float32, CPU)
    q, k, v = (inputs[name].requires_grad_() for name in ("q", "k", "v"))
    out, lse = attention(
        q, k, v, causal=True, sink=inputs["sink"], return_lse=True, backend=backend
    )
    assert (out[:, :65] == 0).all()
    assert (out[:, 65:] != 0).all()
    expected = inputs["sink"][:, None].expand(-1, 65) if sink else torch.full((2, 65), -math.inf)
    torch.testing.assert_close(lse[0, :, :65], expected)
    gradients = torch.autograd.grad(out, (q, k, v), inputs["dout"])
    assert (gradients[0][:, :65] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)

    inputs = make_inputs(Case(lengths=((4, 4),), padding=3, sink=sink), torch.float32, CPU)
    ends = inputs["cu_seqlens_q"]
    out, lse = attention_varlen(
        *(inputs[name] for name in ("q", "k", "v")),
        ends,
        ends,
        4,
        4,
        sink=inputs["sink"],
        return_lse=True,
        backend=backend,
    )
    assert (out[4:] == 0).all()
    assert (lse[:, 4:] == -math.inf).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_do_not_leak(backend, dtype):
    """Other documents do not change a document's bits, forward or backward, nor their absence."""
    torch.manual_seed(0)
    lengths = [33, 100, 64]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v, dout = (torch.randn(197, 2, 64).to(dtype) for _ in range(4))

    def middle(q, k, v, ends, longest, rows):
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        out = attention_varlen(q, k, v, ends, ends, longest, longest, causal=True, backend=backend)
        gradients = torch.autograd.grad(out, (q, k, v), dout[: len(q)] * rows)
        return [x[rows[:, 0, 0].bool()] for x in (out.detach(), *gradients)]

    rows = torch.zeros(197, 1, 1).to(dtype)
    rows[33:133] = 1
    packed = middle(q, k, v, ends, 100, rows)
    others = [torch.where(rows.bool(), x, torch.nan) for x in (q, k, v)]
    assert all(map(torch.equal, packed, middle(*others, ends, 100, rows)))

    alone = [x[33:133].clone().requires_grad_() for x in (q, k, v)]
    out = attention(*(x[None] for x in alone), causal=True, backend=backend)[0]
    gradients = torch.autograd.grad(out, alone, dout[33:133])
    assert all(map(torch.equal, packed, (out, *gradients)))


def test_the_bits_do_not_depend_on_the_threads():
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for case in (
            Case(rows=1200, cols=1200, heads=1, key_heads=1, causal=True),
            Case(lengths=PACKED, heads=4, causal=True),
        ):
            results.append(SPEC.run(make_inputs(case, torch.bfloat16, CPU), "cpu"))
    torch.set_num_threads(before)
    for i, other in enumerate(results):
        for name, value in other.items():
            assert torch.equal(value, results[i % 2][name]), name


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_the_error_does_not_grow_with_the_sequence(length):
    case = Case(rows=length, cols=length, heads=1, key_heads=1, size=64, causal=True)
    verdicts = testing.parity(SPEC, sample(case, torch.bfloat16), "cpu", CPU)
    for verdict in verdicts:
        assert verdict.error <= 1.1 * verdict.naive_error, verdict
        assert verdict.error < (5e-3 if verdict.output != "lse" else 1e-6), verdict


def test_philox_is_the_published_one():
    """The known answers of Random123 (Salmon et al. 2011), 7 and 10 rounds."""

    def words(counter, key, rounds):
        tensors = [torch.tensor([word]) for word in counter]
        return [int(word) for word in philox(tensors, key, rounds)]

    zeros = words([0] * 4, [0, 0], 7)
    assert zeros == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words([0] * 4, [0, 0], 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = words([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, 10)
    assert ones == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_dropout_keeps_what_it_says():
    keep = kept(torch.tensor(3), 0.3, 0, 4, 200, 200)
    assert abs(keep.double().mean() - 0.7) < 0.005
    other = kept(torch.tensor(3), 0.3, 1, 4, 200, 200)
    assert abs((keep == other).double().mean() - (0.49 + 0.09)) < 0.005
    q, k, v = torch.randn(3, 1, 40, 2, 32).unbind()
    torch.manual_seed(5)
    one, two = (attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    again = attention(q, k, v, dropout_p=0.5)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert torch.equal(
        attention(q, k, v, dropout_p=0.5, dropout_seed=9),
        attention(q, k, v, dropout_p=0.5, dropout_seed=torch.tensor(9)),
    )


@pytest.mark.parametrize("backend", HERE)
def test_nan_and_infinity_show(backend):
    q, k, v = torch.randn(3, 1, 20, 1, 16).unbind()
    k[0, 7] = torch.nan
    out = attention(q, k, v, causal=True, backend=backend)
    assert out[0, :7].isfinite().all()
    assert out[0, 7:].isnan().all()


def bad(change):
    inputs = {name: torch.randn(1, 8, 4, 16) for name in ("q", "k", "v")}
    inputs |= change
    q, k, v = (inputs.pop(name) for name in ("q", "k", "v"))
    attention(q, k, v, **inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(8, 4, 16)}, ValueError, r"q must be \(B, S, H, D\); it is \(8, 4, 16\)"),
        ({"v": torch.randn(4, 16)}, ValueError, r"v must be \(B, S, H, D\)"),
        ({"q": torch.randn(1, 8, 3, 16)}, ValueError, "q has 3 heads, k and v have 4"),
        ({"k": torch.randn(1, 8, 4, 16).bfloat16()}, TypeError, "k is torch.bfloat16, q is"),
        ({"q": torch.ones(1, 8, 4, 16, dtype=torch.int64)}, TypeError, "q is torch.int64"),
        ({"v": torch.randn(1, 9, 4, 16)}, ValueError, "k and v must have one shape"),
        ({"q": torch.randn(2, 8, 4, 16)}, ValueError, "q has 2 sequences, k has 1"),
        ({"q": torch.randn(1, 8, 4, 32)}, ValueError, "one head size: 32 and 16"),
        ({"window_size": (-2, 0)}, ValueError, r"window_size is \(-2, 0\)"),
        ({"window_size": 3}, TypeError, "window_size is 3"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale is nan"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({"dropout_p": 0.1, "dropout_seed": torch.ones(2)}, TypeError, "dropout_seed must be one"),
        ({"sink": torch.zeros(3)}, ValueError, r"sink must be \(4,\)"),
        ({"sink": torch.zeros(4, dtype=torch.int64)}, TypeError, "sink is torch.int64"),
        ({"backend": "flash"}, ValueError, "'flash' is not one of"),
        (
            {name: torch.randn(1, 8, 4, 272) for name in "qkv"},
            ValueError,
            "head size is 272; it must be in 1 to 256",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        bad(change)


@pytest.mark.parametrize(
    ("ends", "longest", "error", "message"),
    [
        ([0, 5, 3, 8], 8, ValueError, "cu_seqlens_q falls from 5 to 3 at position 2"),
        ([1, 8], 8, ValueError, r"cu_seqlens_q\[0\] is 1"),
        ([0, 9], 9, ValueError, r"cu_seqlens_q\[-1\] is 9, but there are 8 tokens"),
        ([0, 8], 5, ValueError, "sequence 0 of cu_seqlens_q has 8 tokens, but max_seqlen_q is 5"),
        ([], 5, ValueError, r"cu_seqlens_q must be \(sequences \+ 1,\)"),
        ([0.0, 8.0], 8, TypeError, "cu_seqlens_q is torch.float32; it must be int32"),
    ],
)
def test_bad_ends_are_named(ends, longest, error, message):
    dtype = torch.float32 if any(isinstance(end, float) for end in ends) else torch.int32
    q = torch.randn(8, 2, 16)
    ends = torch.tensor(ends, dtype=dtype)
    with pytest.raises(error, match=message):
        attention_varlen(q, q, q, ends, ends, longest, longest)


def test_a_second_derivative_is_refused():
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    (dq,) = torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
def test_offsets_beyond_32_bits(tmp_path):
    """Rows that are 2^29 elements apart, in a sparse file."""
    rows, stride = 12, 2**29
    path = str(tmp_path / "sparse")
    elements = torch.from_file(path, shared=True, size=rows * stride, dtype=torch.bfloat16)
    far = elements.as_strided((1, rows, 1, 32), (0, stride, 32, 1))
    near = torch.randn(1, rows, 1, 32).bfloat16()
    far.copy_(near)
    for backend in HERE:
        one, other = (attention(x, x, x, causal=True, backend=backend) for x in (far, near))
        assert torch.equal(one, other)


def test_the_workspace_serves_two_calls_at_a_time():
    from concurrent.futures import ThreadPoolExecutor

    q = torch.randn(1, 600, 2, 64).bfloat16()
    expected = attention(q, q, q, causal=True)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: attention(q, q, q, causal=True), range(40)))
    assert all(torch.equal(result, expected) for result in results)
