import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsmith_kernels import backends, rope
from gradsmith_kernels.ops.rope.spec import SPEC, angles, sample
from gradsmith_kernels.verify import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(0, 4) for _ in range(4))),
    half=st.integers(1, 70),
    rest=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    wide_tables=st.booleans(),
    interleaved=st.booleans(),
    shared=st.booleans(),
    layout=st.sampled_from(["contiguous", "heads", "fused", "columns"]),
)
def test_any_shape(shape, half, rest, dtype, wide_tables, interleaved, shared, layout):
    drawn = sample(
        (*shape, 2 * half + rest),
        dtype,
        rotated=2 * half,
        table_dtype=torch.float32 if wide_tables else dtype,
        interleaved=interleaved,
        shared=shared,
        layout=layout,
    )
    testing.check_parity(SPEC, drawn, "cpu", CPU)


@pytest.mark.parametrize(
    ("family", "interleaved", "rotated"),
    [("llama", False, 64), ("cohere", True, 64), ("phi3", False, 48), ("gpt_neox", False, 16)],
)
def test_transformers_functions(family, interleaved, rotated):
    """Heads before positions, as its models have them; theirs in float64, ours in bfloat16."""
    models = pytest.importorskip("transformers.models")
    module = f"modeling_{family}"
    theirs = getattr(getattr(models, family), module).apply_rotary_pos_emb
    cos, sin = (table.bfloat16() for table in angles(2, 30, rotated, interleaved))
    q, dq = torch.randn(2, 2, 6, 30, 64, dtype=torch.bfloat16)
    k, dk = torch.randn(2, 2, 3, 30, 64, dtype=torch.bfloat16)

    def gradients(function, q, k, cos, sin):
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        results = function(q, k, cos, sin)
        upstream = [d.to(q.dtype) for d in (dq, dk)]
        return [*results, *torch.autograd.grad(results, (q, k), upstream)]

    def ours(q, k, cos, sin):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = rope(q, k, cos, sin, interleaved=interleaved)
        return q.transpose(1, 2), k.transpose(1, 2)

    # Cohere's rounds to float32 in between.
    expected = gradients(theirs, *(x.double() for x in (q, k, cos, sin)))
    for result, exact in zip(gradients(ours, q, k, cos, sin), expected, strict=True):
        torch.testing.assert_close(result, exact.bfloat16(), rtol=2**-7, atol=1e-5)


def test_gptj_has_its_pairs_interleaved():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    cos, sin = angles(2, 9, 24, interleaved=True)
    q, k = torch.randn(2, 9, 4, 24), torch.randn(2, 9, 4, 24)
    result = rope(q, k, cos, sin, interleaved=True)
    for x, ours in zip((q, k), result, strict=True):
        theirs = gptj.apply_rotary_pos_emb(x, sin[..., ::2], cos[..., ::2])
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved):
    """What the embedding is for: moving both positions changes no product of q and k."""
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    cos, sin = angles(1, 90, 64, interleaved)

    def score(i, j):
        (row,) = rope(q, k, cos[:, i : i + 1], sin[:, i : i + 1], interleaved=interleaved)[:1]
        column = rope(q, k, cos[:, j : j + 1], sin[:, j : j + 1], interleaved=interleaved)[1]
        return (row * column).sum()

    torch.testing.assert_close(score(3, 11), score(70, 78), rtol=1e-4, atol=1e-4)
    assert abs(score(3, 11) - score(3, 12)) > 1e-3


def test_the_bits_do_not_depend_on_the_number_of_threads():
    inputs = sample((3, 333, 6, 3, 64), torch.bfloat16, interleaved=True).make(CPU)
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


def rotated_alike(x, cos, sin, backend=None):
    """Of one tensor, by the pair's q."""
    return rope(x, x[:, :, :1], cos, sin, backend=backend)[0]


@pytest.mark.parametrize("missing", ["q", "k"])
@pytest.mark.parametrize("how", ["unused", "frozen"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_one_gradient_without_the_other(missing, how, backend, monkeypatch):
    inputs = sample((2, 9, 4, 2, 32), torch.float32).make(CPU)
    both = SPEC.run(inputs, backend)
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("q", "k")}
    if how == "frozen":
        leaves[missing].requires_grad_(False)
    results = rope(leaves["q"], leaves["k"], inputs["cos"], inputs["sin"], backend=backend)
    results = dict(zip(("q", "k"), results, strict=True))

    kernels = SPEC.op.choose(backend, CPU, torch.float32)
    rotate, rotated = kernels.rotate, []
    monkeypatch.setattr(
        kernels, "rotate", lambda x, *rest: rotated.append(len(x)) or rotate(x, *rest)
    )
    (there,) = {"q", "k"} - {missing}
    used = [there] if how == "unused" else ["q", "k"]
    loss = sum((results[name] * inputs[f"upstream {name}"]).sum() for name in used)
    loss.backward()
    assert rotated == [1]  # and nothing is computed for the other
    assert torch.equal(leaves[there].grad, both[f"d{there}"])
    assert leaves[missing].grad is None


FROZEN = """
import torch
from gradsmith_kernels import rope
q, k = torch.randn(2, 3, 4, 24, requires_grad=True), torch.randn(2, 3, 2, 24)
cos, sin = torch.randn(2, 2, 3, 16)
grads = []
for backend in ("triton", "reference"):
    loss = sum((y ** 2).sum() for y in rope(q, k, cos, sin, backend=backend))
    grads += torch.autograd.grad(loss, q)
torch.testing.assert_close(*grads)
"""


def test_a_frozen_key_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", FROZEN], env=environment, check=True)


def test_expanded_tables_are_those_of_one_sequence():
    inputs = sample((3, 9, 4, 2, 32), torch.bfloat16, shared=True).make(CPU)
    expanded = {name: inputs[name].expand(3, -1, -1) for name in ("cos", "sin")}
    one, other = (SPEC.run(given, "cpu") for given in (inputs, inputs | expanded))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_but_the_tables_is_kept():
    q, k = torch.randn(2, 9, 4, 32, requires_grad=True), torch.randn(2, 9, 2, 32)
    cos, sin = angles(1, 9, 32, False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        rope(q, k, cos, sin)
    assert [x.data_ptr() for x in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_an_expanded_gradient():
    q = torch.randn(2, 9, 4, 32, requires_grad=True)
    cos, sin = angles(2, 9, 32, False)
    rotated_alike(q, cos, sin).sum().backward()  # the gradient of sum() has stride 0
    (expected,) = torch.autograd.grad(
        rotated_alike(q, cos, sin, "reference"), q, torch.ones(2, 9, 4, 32)
    )
    torch.testing.assert_close(q.grad, expected)


def test_offsets_beyond_2_to_the_31_elements():
    """Of batch, position and head: 4 GiB of addresses each, of which a few pages are touched."""
    apart = 2**31 + 64
    cos, sin = angles(2, 2, 64, False)
    for dim in range(3):
        shape = [1, 1, 1, 64]
        shape[dim] = 2
        strides = [64, 64, 64, 1]
        strides[dim] = apart
        x = torch.empty(apart + 64, dtype=torch.bfloat16).as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        tables = [table[: shape[0], : shape[1]].bfloat16() for table in (cos, sin)]
        far = rope(x, x, *tables)
        near = rope(x.clone(), x.clone(), *tables)
        assert x.stride(dim) == apart
        assert torch.equal(far[0], near[0])
        assert torch.equal(far[1], near[1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_in_float64_passes_gradcheck_twice(interleaved):
    q = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 1, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 2, 3, 4, dtype=torch.float64)

    def function(q, k):
        return rope(q, k, cos, sin, interleaved=interleaved)

    assert torch.autograd.gradcheck(function, (q, k))
    assert torch.autograd.gradgradcheck(function, (q, k))


def test_a_second_derivative_on_the_cpu():
    inputs = sample((2, 9, 4, 2, 32), torch.float32).make(CPU)

    def second(backend):
        q, k = (inputs[name].clone().requires_grad_() for name in ("q", "k"))
        a, b = rope(q, k, inputs["cos"], inputs["sin"], backend=backend)
        loss = (a**3 * inputs["upstream q"]).sum() + (b**2).sum()
        dq, dk = torch.autograd.grad(loss, (q, k), create_graph=True)
        return torch.autograd.grad((dq**2).sum() + dk.sum(), (q, k))

    for ours, expected in zip(second("cpu"), second("reference"), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def block(q, k, cos, sin):
        q, k = rope(torch.sin(q), k, cos, sin, interleaved=True)
        return (q * k.repeat_interleave(2, 2)).cos()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (9, 14):
        inputs = sample((2, length, 4, 2, 32), torch.float32, rotated=16).make(CPU)
        upstream = inputs["upstream q"]

        def gradients(function, inputs=inputs, upstream=upstream):
            q, k = (inputs[name].clone().requires_grad_() for name in ("q", "k"))
            out = function(q, k, inputs["cos"], inputs["sin"])
            return [out, *torch.autograd.grad(out, (q, k), upstream)]

        for one, other in zip(gradients(block), gradients(compiled), strict=True):
            torch.testing.assert_close(one, other)


TABLE = torch.ones(2, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": torch.ones(2, 3, 8)}, ValueError, r"q must be \(B, S, H, D\); it is \(2, 3, 8\)"),
        ({"q": torch.ones(2, 3, 4, 8).int()}, TypeError, "q is torch.int32; it must be float32"),
        ({"k": torch.ones(2, 3, 8)}, ValueError, r"k must be .* k is \(2, 3, 8\)"),
        ({"k": torch.ones(2, 4, 2, 8)}, ValueError, r"q is \(2, 3, 4, 8\), k is \(2, 4, 2, 8\)"),
        ({"k": torch.ones(2, 3, 2, 9)}, ValueError, r"k is \(2, 3, 2, 9\)"),
        ({"k": torch.ones(2, 3, 2, 8).half()}, TypeError, "k is torch.float16, q is torch.float32"),
        ({"k": torch.ones(2, 3, 2, 8, device="meta")}, ValueError, "q is on cpu, k on meta"),
        ({"cos": TABLE.bfloat16()}, TypeError, "cos is torch.bfloat16; it must be float32 or of q"),
        ({"sin": TABLE.double()}, TypeError, "sin is torch.float64"),
        ({"sin": TABLE.to("meta")}, ValueError, "q is on cpu, sin on meta"),
        ({"cos": torch.ones(3, 8)}, ValueError, r"cos must be \(B or 1, S, R\).* cos is \(3, 8\)"),
        ({"cos": torch.ones(3, 3, 8)}, ValueError, r"cos is \(3, 3, 8\)"),
        ({"cos": torch.ones(2, 4, 8)}, ValueError, r"cos is \(2, 4, 8\)"),
        ({"sin": torch.ones(1, 3, 8)}, ValueError, r"sin must be like cos.* it is \(1, 3, 8\)"),
        ({"cos": TABLE[..., :7], "sin": TABLE[..., :7]}, ValueError, "cos has 7 columns"),
        ({"cos": TABLE[..., :0], "sin": TABLE[..., :0]}, ValueError, "cos has 0 columns"),
        ({"q": torch.ones(2, 3, 4, 6), "k": torch.ones(2, 3, 2, 6)}, ValueError, "dimension, 6"),
        ({"cos": TABLE.clone().requires_grad_()}, ValueError, "cos requires grad"),
        ({"sin": TABLE.clone().requires_grad_()}, ValueError, "sin requires grad"),
        ({"backend": "cudnn"}, ValueError, "'cudnn' is not one of reference, cpu, triton, cuda"),
        ({"backend": "cuda"}, backends.BackendError, "rope has no cuda implementation"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 3, 2, 8), "cos": TABLE, "sin": TABLE}
    with pytest.raises(error, match=message):
        rope(**(good | arguments))


def test_tables_of_two_dtypes_are_refused():
    q, k = torch.ones(2, 3, 4, 8).half(), torch.ones(2, 3, 2, 8).half()
    with pytest.raises(TypeError, match=r"cos is torch\.float32, sin is torch\.float16"):
        rope(q, k, TABLE, TABLE.half())


def test_tables_may_require_grad_where_none_is_recorded():
    q, k = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 2, 8)
    with torch.no_grad():
        rope(q, k, TABLE.clone().requires_grad_(), TABLE)
