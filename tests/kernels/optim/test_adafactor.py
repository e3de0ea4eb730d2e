"""Adafactor: against torch, transformers and float64; shapes, skipped steps, weights of 16 bits."""

import copy
import math
from functools import partial

import pytest
import stepping
import torch
from stepping import flat, steps

from gradsmith_kernels import _native
from gradsmith_kernels.ops.adafactor_step import adafactor_step_
from gradsmith_kernels.ops.adafactor_step.spec import SPEC
from gradsmith_kernels.optim import Adafactor
from gradsmith_kernels.verify import testing

# No, one and several dimensions; one row, one column; more than a block of 4096 columns, than a
# piece of 131072 elements, than what one thread does alone; many small matrices.
SHAPES = [(), (5,), (33, 7), (1, 300), (300, 1), (2, 3, 41), (130, 4200), (70_001,), (64, 5, 3, 3)]
EPS = 2.0**-23  # float32's
parameters = partial(stepping.parameters, shapes=SHAPES)


def assert_near(params, twins):
    for p, q in zip(params, twins, strict=True):
        assert (p.detach() - q.detach()).norm() <= 5e-6 * q.detach().norm()


def states(optimizer, params):
    names = ("row_var", "col_var", "variance")
    return {
        n: flat([optimizer.state[p][n] for p in params if n in optimizer.state[p]]) for n in names
    }


OPTIONS = [
    {},
    {"lr": 0.3, "weight_decay": 0.1},
    {"d": 2.0, "beta2_decay": -0.5, "eps": (1e-3, 0.1)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_100_steps_are_as_near_to_float64_as_torchs(options):
    def run(cls, dtype, **more):
        params = parameters(dtype)
        optimizer = cls(params, **({"eps": (EPS, 1e-3)} | options | more))
        steps(optimizer, params, 100)
        return {"param": flat(params)} | states(optimizer, params)

    exact = run(torch.optim.Adafactor, torch.float64)
    naive = run(torch.optim.Adafactor, torch.float32, foreach=True)
    ours = run(Adafactor, torch.float32)
    for name, values in exact.items():
        floor = values.abs().clamp(min=1e-3)
        naive_errors, errors = (naive[name] - values).abs(), (ours[name] - values).abs()
        size = len(values)
        naive_error = naive_errors.norm() / values.norm()
        bound = testing.error_bound(naive_error, torch.float32, size, "cpu")
        assert errors.norm() / values.norm() <= bound, name
        # Element by element: none is further off than torch's worst, or by much of an ulp.
        worst = 1.1 * (naive_errors / floor).max() + 2.0**-23
        assert (errors / floor).max() <= worst, name


@pytest.mark.parametrize("isa", _native.isa_levels())
def test_every_instruction_set_is_right(isa):
    before = _native.isa()
    _native.set_isa(isa)
    try:
        for sample in SPEC.samples():
            testing.check_parity(SPEC, sample, "cpu", torch.device("cpu"))
    finally:
        _native.set_isa(before)


def test_transformers_adafactor_is_the_same_where_the_formulas_meet():
    """With no decay, which transformers multiplies with the scaled rate, and gradients far above
    eps, which it adds to their squares."""
    from transformers.optimization import Adafactor as Peer

    params, twins = parameters(), parameters()
    peer = Peer(twins, eps=(1e-30, 1e-3), scale_parameter=True, relative_step=True)
    steps(Adafactor(params, lr=1e-2), params, 30)
    steps(peer, twins, 30)
    assert_near(params, twins)


def test_defaults_and_groups_are_torchs():
    params, twins = parameters(), parameters()

    def groups(tensors):
        return [
            {"params": tensors[:4]},
            {"params": tensors[4:], "lr": 0.1, "weight_decay": 0.2, "eps": (1e-4, 0.5)},
        ]

    ours, theirs = Adafactor(groups(params)), torch.optim.Adafactor(groups(twins))
    assert all(theirs.defaults[n] == value for n, value in ours.defaults.items() if n != "l1")
    steps(ours, params, 10)
    steps(theirs, twins, 10)
    assert_near(params, twins)


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_load_into_torch_and_back(ours_first):
    first, second = (Adafactor, torch.optim.Adafactor)[:: 1 if ours_first else -1]
    params, twins = parameters(), parameters()
    one = first(params, lr=0.1, weight_decay=0.1, maximize=True, foreach=False)
    steps(one, params, 7)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    other = second(twins)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.param_groups[0]["weight_decay"] == 0.1
    steps(one, params, 5, seed=2)
    steps(other, twins, 5, seed=2)
    assert_near(params, twins)
    for p, q in zip(params, twins, strict=True):
        assert one.state[p].keys() == other.state[q].keys()


@pytest.mark.parametrize("weights", ["rounded", "master", "kahan"])
def test_a_loaded_state_goes_on_with_the_same_bits(weights):
    dtype = torch.float32 if weights == "rounded" else torch.bfloat16
    params, twins = parameters(dtype), parameters(dtype)
    one, other = Adafactor(params, weights=weights), Adafactor(twins, weights=weights)
    steps(one, params, 5)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    steps(one, params, 5, seed=2)
    steps(other, twins, 5, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_the_bits_do_not_depend_on_the_number_of_threads():
    shapes = [*SHAPES, (700, 900), (300_001,), (3, 300, 200), (40_000, 9)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = parameters(shapes=shapes)
            optimizer = Adafactor(params, lr=0.1, max_grad_norm=1.0)
            steps(optimizer, params, 3)
            results.append([flat(params), *states(optimizer, params).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_tensor_does_not_depend_on_its_neighbours():
    """Tensors are stepped in waves and shares: which one is in which must not show."""
    shapes = [(64, 65), (600, 700), (900, 800), (1100, 1300), (9,), (2_000_001,)]
    together = parameters(shapes=shapes)
    steps(Adafactor(together), together, 2)
    for i in range(len(shapes)):
        alone = parameters(shapes=shapes)
        for q in alone:
            q.requires_grad_()
        optimizer = Adafactor([alone[i]])
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            grads = [torch.randn(shape, generator=generator) for shape in shapes]
            alone[i].grad = grads[i]
            optimizer.step()
        assert torch.equal(alone[i], together[i])


def test_empty_tensors_and_parameters_without_gradient_are_left_alone():
    params = [torch.ones(s, requires_grad=True) for s in ((0, 3), (3, 0), (0,), (2, 2), (4, 4))]
    optimizer = Adafactor(params, lr=0.1)
    for p in params[:-1]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[-1] not in optimizer.state
    assert torch.equal(params[-1], torch.ones(4, 4))
    assert not optimizer.state[params[0]]["col_var"].any()
    assert optimizer.state[params[0]]["step"] == 1
    torch.testing.assert_close(params[3].detach(), torch.full((2, 2), 0.9))


def test_views_that_are_not_contiguous():
    base, twin = torch.randn(8, 12), torch.empty(8, 12)
    twin.copy_(base)
    p, q = base[:, ::2].requires_grad_(), twin[:, ::2].contiguous().requires_grad_()
    one, other = Adafactor([p], lr=0.1, zero_grads=True), Adafactor([q], lr=0.1)
    for _ in range(3):
        gradient = torch.randn(6, 8).t()
        p.grad, q.grad = gradient, gradient.contiguous()
        one.step()
        other.step()
        assert not gradient.any()
    assert torch.equal(p, q)
    assert torch.equal(base[:, 1::2], twin[:, 1::2])


def test_the_norm_is_clipped_in_the_step():
    params, twins = parameters(), parameters()
    one = Adafactor(params, lr=0.1, max_grad_norm=0.5, zero_grads=True)
    other = Adafactor(twins, lr=0.1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(twins, 0.5)
        one.step()
        other.step()
        assert math.isclose(one.grad_norm, float(expected), rel_tol=1e-5)
        assert not any(p.grad.any() for p in params)
    assert_near(params, twins)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad):
    params = parameters(shapes=[(50, 40), (7, 3)])
    optimizer = Adafactor(params, max_grad_norm=math.inf)
    steps(optimizer, params, 2)
    before = flat(params), copy.deepcopy(optimizer.state_dict()["state"])
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[3, 1] = bad
    with pytest.warns(RuntimeWarning, match=r"gradient of params\[1\] of group 0, shape \(7, 3\)"):
        optimizer.step()
    assert torch.equal(flat(params), before[0])
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][i][name]) for name, value in state.items())


@pytest.mark.parametrize("l1", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(40,), (8, 5)])
def test_without_a_norm_nan_shows_in_every_weight_as_in_torch(shape, l1):
    p = torch.ones(shape, requires_grad=True)
    p.grad = torch.ones(shape)
    p.grad[-1] = math.nan
    Adafactor([p], l1=l1).step()
    assert p.isnan().all()


def test_the_scaler_of_torch_is_served():
    params, twins = parameters(), parameters()
    ours, plain = Adafactor(params), Adafactor(twins)
    steps(plain, twins, 1)
    ours.grad_scale, ours.found_inf = torch.tensor(256.0), torch.tensor(0.0)
    steps(ours, params, 1, scale=256.0)
    torch.testing.assert_close(flat(params), flat(twins))
    before = flat(params)
    ours.found_inf = torch.tensor(1.0)
    steps(ours, params, 1)
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_are_stepped_in_float32(dtype):
    params = parameters(dtype)
    exact = [p.detach().float().requires_grad_() for p in params]
    ours, theirs = Adafactor(params, weights="master"), Adafactor(exact)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for p, q in zip(params, exact, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(params, exact, strict=True))


def test_kahan_keeps_small_changes_that_rounding_loses():
    results = {}
    for weights in ("rounded", "kahan", "master"):
        p = torch.ones(30, 10, dtype=torch.bfloat16, requires_grad=True)
        optimizer = Adafactor([p], lr=1e-5, weights=weights)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        state = optimizer.state[p]
        whole = p.detach().float() + state.get("compensation", torch.zeros(()))
        results[weights] = state.get("master", whole)[0, 0].item()
    assert results["rounded"] == 1
    assert math.isclose(results["kahan"], results["master"], abs_tol=4e-4)
    assert results["master"] < 1 - 5e-4


def test_l1_moves_weights_to_zero_and_keeps_them_there():
    p = torch.tensor([[1e-3, -1e-3], [1.0, -1.0]], requires_grad=True)
    p.grad = torch.zeros(2, 2)
    Adafactor([p], lr=0.1, l1=0.05).step()
    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, 0.0], [0.995, -0.995]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr is -1; it must be a number >= 0"),
        ({"beta2_decay": 0.1}, "beta2_decay is 0.1; it must be a number <= 0"),
        ({"eps": (-1.0, 1e-3)}, r"eps is \(-1.0, 0.001\); it must be two numbers >= 0"),
        ({"eps": (None, -1e-3)}, "eps is"),
        ({"d": 0.5}, "d is 0.5; it must be a number >= 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"l1": -0.1}, "l1 is -0.1"),
        (
            {"state_dtype": torch.bfloat16},
            "state_dtype is torch.bfloat16; it must be torch.float32",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Adafactor([torch.ones(1, requires_grad=True)], **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, "2 params need as many of each; got {'grads': 0"),
        ({"grads": [torch.ones(2, 3), torch.ones(5)]}, ValueError, "its grads .5,.; it must be"),
        ({"grads": [torch.ones(2, 3).int(), torch.ones(4)]}, TypeError, "gradient torch.int32"),
        ({"row_vars": [torch.ones(2), torch.ones(4)]}, ValueError, "row_vars .2,.; it must"),
        ({"col_vars": [torch.ones(1, 3), torch.ones(1)]}, ValueError, "it must be .0,"),
        ({"row_vars": [torch.ones(2, 1).half(), torch.ones(4)]}, TypeError, "must be torch"),
        ({"steps": [torch.ones(2), torch.ones(())]}, TypeError, "its step is torch.float32"),
        ({"masters": [torch.ones(2, 3), torch.ones(4)]}, TypeError, "masters are for bfloat16"),
        ({"masters": [torch.ones(2, 3)]}, ValueError, "masters has 1 tensors for 2 params"),
    ],
)  # fmt: skip
def test_the_op_checks_what_it_is_given(change, error, message):
    arguments = {
        "params": [torch.ones(2, 3), torch.ones(4)],
        "grads": [torch.ones(2, 3), torch.ones(4)],
        "row_vars": [torch.ones(2, 1), torch.ones(4)],
        "col_vars": [torch.ones(1, 3), torch.ones(0)],
        "steps": [torch.zeros(()), torch.zeros(())],
    }
    with pytest.raises(error, match=message):
        adafactor_step_(**(arguments | change), lr=0.1)


def test_sparse_and_complex_are_refused():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"Adafactor: a gradient of shape .* must be dense"):
        Adafactor(embedding.parameters()).step()
    p = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"Adafactor: a parameter of shape .* is complex"):
        Adafactor([p]).step()


def test_float64_is_stepped_in_float64():
    params, twins = parameters(torch.float64), parameters(torch.float64)
    steps(Adafactor(params), params, 3)
    steps(torch.optim.Adafactor(twins), twins, 3)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)
