"""torch.func, forward mode, autocast, modes: each op is as torch's own, or refuses by its name."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from gradsmith_kernels import (
    accelerate,
    attention,
    geglu,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rope,
    swiglu,
)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def torch_attention(q, k, v):
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2)


def torch_rope(q, cos, sin):
    one, two = q.chunk(2, -1)
    return q * cos[:, :, None] + torch.cat((-two, one), -1) * sin[:, :, None]


TARGET = torch.arange(6) * 7 % 20
ANGLES = torch.cat((normal(1, 5, 4),) * 2, -1)
# Name: ours, torch's, and the arguments for one sample: the first is different in each sample.
OPS = {
    "rms_norm": (
        lambda x, w: rms_norm(x, w, eps=1e-6),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        (normal(6, 16), normal(16)),
    ),
    "rms_norm with residual": (
        lambda x, r, w: torch.cat(rms_norm(x, w, residual=r, eps=1e-6)),
        lambda x, r, w: torch.cat((F.rms_norm(x + r, w.shape, w, 1e-6), x + r)),
        (normal(6, 16), normal(6, 16), normal(16)),
    ),
    "layer_norm": (
        layer_norm,
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        (normal(6, 16), normal(16), normal(16)),
    ),
    "layer_norm with residual": (
        lambda x, r, w: layer_norm(x, w, residual=r)[0],
        lambda x, r, w: F.layer_norm(x + r, w.shape, w),
        (normal(6, 16), normal(6, 16), normal(16)),
    ),
    "swiglu": (swiglu, lambda x, y: F.silu(x) * y, (normal(6, 16), normal(6, 16))),
    "geglu": (geglu, lambda x, y: F.gelu(x) * y, (normal(6, 16), normal(6, 16))),
    "linear": (linear, F.linear, (normal(6, 16), normal(20, 16), normal(20))),
    "attention": (
        lambda q, k, v: attention(q, k, v, causal=True),
        torch_attention,
        (normal(1, 6, 2, 8), normal(1, 6, 2, 8), normal(1, 6, 2, 8)),
    ),
    "rope": (
        lambda q: rope(q, q, ANGLES.cos(), ANGLES.sin())[1],
        lambda q: torch_rope(q, ANGLES.cos(), ANGLES.sin()),
        (normal(2, 5, 3, 8),),
    ),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, w, TARGET, label_smoothing=0.1),
        lambda x, w: F.cross_entropy(x @ w.T, TARGET, label_smoothing=0.1),
        (normal(6, 16), normal(20, 16)),
    ),
}
EACH = pytest.mark.parametrize("op", OPS)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def refused(op):
    return pytest.raises(NotImplementedError, match=f"{op.split()[0]}.* has no forward-mode")


def name_of(op):
    return "glu" if op in ("swiglu", "geglu") else op


@EACH
def test_grad_vjp_jacrev(op):
    ours, theirs, arguments = OPS[op]
    every = tuple(range(len(arguments)))

    def results(function):
        _, pull = vjp(function, *arguments)
        upstream = function(*arguments).cos()
        of_sum = grad(lambda *a: function(*a).sin().sum(), every)
        jacobian = jacrev(lambda x: function(x, *arguments[1:])[..., None].sum(-1))
        return of_sum(*arguments), pull(upstream), jacobian(arguments[0])

    close(results(ours), results(theirs))


@EACH
def test_vmap_and_the_gradients_of_each_sample(op):
    ours, theirs, (first, *rest) = OPS[op]
    samples, dims = torch.stack((first, first.flip(0), 2 * first), 1), (1, *(None for _ in rest))

    def results(function):
        def loss(*a):
            return function(*a).sin().sum()

        every = tuple(range(1 + len(rest)))
        each = vmap(function, dims)(samples, *rest)
        of_each = vmap(grad(loss, every), dims)(samples, *rest)
        of_all = grad(lambda *a: vmap(loss, dims)(*a).sum(), every)(samples, *rest)
        return each, of_each, of_all

    close(results(ours), results(theirs))


@EACH
def test_forward_mode_is_refused(op):
    ours, _, arguments = OPS[op]
    name = name_of(op)
    with refused(name):
        jvp(lambda x: ours(x, *arguments[1:]), arguments[:1], arguments[:1])
    with refused(name):
        jacfwd(lambda x: ours(x, *arguments[1:]))(arguments[0])
    with forward_ad.dual_level():
        for argument in range(len(arguments)):
            duals = list(arguments)
            duals[argument] = forward_ad.make_dual(arguments[argument], arguments[argument])
            with refused(name), torch.no_grad():
                ours(*duals)
        # Nothing to derive: nothing to refuse.
        torch.testing.assert_close(ours(*arguments), ours(*(x.clone() for x in arguments)))


@EACH
def test_forward_mode_of_a_gradient_is_refused(op):
    ours, _, arguments = OPS[op]
    leaves = [x.clone().requires_grad_() for x in arguments]
    out = ours(*leaves)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with refused(name_of(op)):
            torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("op", [op for op in OPS if op != "rope"])
def test_second_derivatives_are_refused_by_torch_func_too(op):
    ours, _, (first, *rest) = OPS[op]

    def slope(x):
        return grad(lambda x: ours(x, *rest).sin().sum())(x).sum()

    with pytest.raises(RuntimeError, match=f"{name_of(op).split()[0]}.* no second derivative"):
        grad(slope)(first)


def test_a_second_derivative_of_rope_by_torch_func():
    ours, theirs, (q,) = OPS["rope"]
    results = [
        grad(lambda x, f=f: grad(lambda x: (f(x) ** 3).sum())(x).sum())(q) for f in (ours, theirs)
    ]
    close(*results)


@EACH
def test_operators_themselves_under_transforms(op):
    """Called as torch.ops has them, without the functions that go around the dispatcher."""
    ours, _, (first, *rest) = OPS[op]

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "gradsmith":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    calls = []
    with Calls():
        ours(first, *rest)
    ((operator, arguments),) = calls
    (x, *others), (out, *_) = arguments, torch.utils._pytree.tree_leaves(operator(*arguments))

    def function(x):
        return torch.utils._pytree.tree_leaves(operator(x, *others))[0]

    assert torch.equal(vmap(function)(torch.stack((x, x)))[1], out)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).sum(), leaf)
    close(grad(lambda x: function(x).sum())(x), expected)
    with refused(name_of(op)):
        jvp(function, (x,), (x,))


@EACH
def test_no_gradient_no_dispatcher_and_the_same_bits(op):
    """What goes around the dispatcher, and what a mode, a profiler or a tracer sees."""
    ours, _, arguments = OPS[op]
    ours(*arguments)  # the first call of a kind is checked by the dispatcher
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        watched = ours(*arguments)
    assert any(event.key.startswith("gradsmith::") for event in seen.key_averages())
    assert torch.equal(ours(*arguments), watched)
    assert ours(*(x.to("meta") for x in arguments)).is_meta if op not in ONLY_HERE else True
    leaves = [x.clone().requires_grad_() for x in arguments]
    assert torch.equal(ours(*leaves), watched)
    assert "gradsmith::" in str(torch.jit.trace(lambda *a: ours(*a), arguments).graph)


ONLY_HERE = ("rope", "linear_cross_entropy")  # whose tables or targets are not arguments above


def test_what_the_schema_refuses_is_refused_each_time():
    x, weight = normal(6, 16), normal(16)
    rms_norm(x, weight)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"gradsmith::rms_norm.*eps"):
            rms_norm(x, weight, eps="small")


@EACH
@pytest.mark.parametrize("found", [None, 3, "x"])
def test_what_is_no_tensor_is_named(op, found):
    ours, _, arguments = OPS[op]
    optional = {"layer_norm": (1, 2), "layer_norm with residual": (1, 2), "linear": (2,)}
    names = "x, weight, bias, residual, gate, up, q, k, v, hidden".replace(", ", "|")
    for place in range(len(arguments)):
        if place in optional.get(op, ()) or op == "rope" or (op, place) == RESIDUAL:
            continue
        given = [*arguments[:place], found, *arguments[place + 1 :]]
        kind = type(found).__name__
        with pytest.raises(TypeError, match=rf"(?:{names}) is {kind}; it must be a tensor"):
            ours(*given)


RESIDUAL = ("rms_norm with residual", 1)  # of which None says that there is none


def test_a_view_that_negates():
    x = torch.randn(6, 16, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    for _ in range(2):
        assert torch.equal(rms_norm(x, normal(16)), rms_norm(x.resolve_neg(), normal(16)))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_linear_under_autocast(backend):
    """It has x's dtype, forward and backward, within autocast and behind it."""
    dtype = torch.bfloat16 if backend == "cpu" else torch.float32
    x, weight = (t.to(dtype).requires_grad_() for t in (normal(80, 16), normal(20, 16)))
    upstream = normal(80, 20).to(dtype)
    plain = linear(x, weight, backend=backend)
    expected = plain, *torch.autograd.grad(plain, (x, weight), upstream)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, backend=backend)
        within = torch.autograd.grad(y, (x, weight), upstream, retain_graph=True)
    behind = torch.autograd.grad(y, (x, weight), upstream)
    for gradients in (within, behind):
        for one, other in zip((y, *gradients), expected, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other)


def test_per_sample_gradients_of_an_accelerated_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 30}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    tokens = torch.arange(27).reshape(3, 9)

    def results():
        weights = dict(model.named_parameters())

        def loss(weights, tokens):
            row = tokens[None]
            options = {"input_ids": row, "labels": row, "use_cache": False}
            return functional_call(model, weights, (), options).loss

        each = vmap(grad(loss), (None, 0))(weights, tokens)
        return grad(loss)(weights, tokens[0]), each

    expected = results()
    report = accelerate(model)
    assert len({op for op, _ in report.replaced.values()}) >= 5
    close(results(), expected)
    weights = dict(model.named_parameters())
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        jvp(lambda w: functional_call(model, w, (tokens,)).logits, (weights,), (weights,))
