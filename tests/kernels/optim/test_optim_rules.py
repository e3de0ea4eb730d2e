"""Every optimizer: against torch and float64, skipped steps, clipping, weights of 16 bits."""

import copy
import math
import warnings
from functools import partial

import pytest
import stepping
import torch
from stepping import flat, steps

from gradsmith_kernels import optim
from gradsmith_kernels.verify import testing

SHAPES = [(), (5,), (33, 7), (300, 40), (0, 3), (2, 3, 41)]
parameters = partial(stepping.parameters, shapes=SHAPES)
COUNTERPARTS = [
    (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    (optim.Adam, torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    (optim.Adam, torch.optim.Adam, {}),
    (optim.AdamW, torch.optim.AdamW, {"amsgrad": True, "betas": (0.9, 0.5)}),
    (optim.Adam, torch.optim.Adam, {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    (optim.AdamW, torch.optim.AdamW, {"betas": (0.3, 1e-3), "eps": 1e-3}),
    (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    (optim.SGD, torch.optim.SGD, {"weight_decay": 0.1}),
    (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.Adagrad, torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
]
OPTIMIZERS = [
    (optim.AdamW, {}),
    (optim.AdamW, {"state_dtype": torch.bfloat16}),
    (optim.AdamW, {"amsgrad": True, "state_dtype": torch.bfloat16}),
    (optim.Adam, {"maximize": True}),
    (optim.AdamW8bit, {}),
    (optim.Lion, {}),
    (optim.SGD, {}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.Adagrad, {}),
    (optim.LAMB, {}),
    (optim.ScheduleFreeAdamW, {}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), COUNTERPARTS)
def test_100_steps_are_as_near_to_float64_as_torchs(ours, theirs, options):
    options = {"lr": 1e-2} | options
    exact = steps_of(theirs, options, torch.float64)
    naive = (steps_of(theirs, options, torch.float32) - exact).abs()
    errors = (steps_of(ours, options, torch.float32) - exact).abs()
    size = len(exact)
    bound = testing.error_bound(naive.norm() / exact.norm(), torch.float32, size, "cpu")
    assert errors.norm() / exact.norm() <= bound
    # Nor is any weight much further off than torch's worst: the 100 worst on average, as which one
    # element is worst is a matter of luck. Errors are taken against the size that a weight had at
    # the start or the end: one that ends near 0 has been rounded where it came from.
    sizes = torch.maximum(exact.abs(), flat(parameters()).abs()).clamp(min=1e-3)
    worst, torchs = ((error / sizes).topk(100).values.mean() for error in (errors, naive))
    assert worst <= 1.1 * torchs + 2.0**-23


def steps_of(cls, options, dtype):
    params = parameters(dtype)
    return flat(steps(cls(params, **options), params, 100))


@pytest.mark.parametrize(("ours", "theirs", "options"), COUNTERPARTS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_load_into_torch_and_back(ours, theirs, options, ours_first):
    options = {"lr": 1e-2} | options
    first, second = (ours, theirs) if ours_first else (theirs, ours)
    params, twins = parameters(), parameters()
    one = first(params, **options)
    steps(one, params, 7)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    other = second(twins)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    steps(one, params, 5, seed=2)
    steps(other, twins, 5, seed=2)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_loaded_state_goes_on_with_the_same_bits(cls, options):
    shapes = [*SHAPES, (5000,)]
    params, twins = parameters(shapes=shapes), parameters(shapes=shapes)
    one, other = cls(params, lr=1e-2, **options), cls(twins, lr=1e-2, **options)
    steps(one, params, 5)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    steps(one, params, 5, seed=2)
    steps(other, twins, 5, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_the_bits_do_not_depend_on_the_number_of_threads(cls, options):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            params = parameters(shapes=[(300_001,), (70_000,), (7,)])
            optimizer = cls(params, lr=1e-2, max_grad_norm=1.0, **options)
            results.append(flat(steps(optimizer, params, 3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_the_norm_is_clipped_in_the_step(cls, options):
    params, twins = parameters(), parameters()
    one = cls(params, lr=1e-2, max_grad_norm=0.5, zero_grads=True, **options)
    other = cls(twins, lr=1e-2, **options)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(twins, 0.5)
        one.step()
        other.step()
        assert math.isclose(one.grad_norm, float(expected), rel_tol=1e-6)
        assert not any(p.grad.any() for p in params)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if options or cls in (optim.AdamW8bit, optim.Lion):  # a rounding may fall on the other side
        tolerance = {"rtol": 1e-2, "atol": 2.1e-2}
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(cls, options, bad):
    params = parameters(shapes=[(5000,), (7,)])
    optimizer = cls(params, lr=1e-2, max_grad_norm=math.inf, **options)
    steps(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict()), flat(params)
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[3] = bad
    with pytest.warns(RuntimeWarning, match=r"gradient of params\[1\] of group 0, shape \(7,\)"):
        optimizer.step()
    after = optimizer.state_dict()
    assert torch.equal(flat(params), before[1])
    for i, state in before[0]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(after["state"][i][key]), torch.as_tensor(value))
    assert not math.isfinite(optimizer.grad_norm)


def test_a_skipped_step_names_the_parameter_and_clears_gradients_where_asked():
    model = torch.nn.Linear(3, 2)
    optimizer = optim.AdamW(model.named_parameters(), max_grad_norm=1.0, zero_grads=True)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.full((2,), math.nan)
    with pytest.warns(RuntimeWarning, match="gradient of bias, shape"):
        optimizer.step()
    assert not model.weight.grad.any()
    assert not model.bias.grad.any()


def test_large_finite_gradients_are_not_taken_for_infinite_ones():
    p = torch.ones(3000, requires_grad=True)
    p.grad = torch.full_like(p, 1e30)
    optimizer = optim.SGD([p], lr=1.0, max_grad_norm=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert math.isclose(optimizer.grad_norm, 1e30 * math.sqrt(3000), rel_tol=1e-5)
    torch.testing.assert_close(p, torch.full_like(p, 1 - 1 / math.sqrt(3000)))


def test_the_norm_follows_the_shapes_alone():
    torch.manual_seed(0)
    gradient = torch.randn(1_000_003)
    norms = set()
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        p = torch.zeros_like(gradient, requires_grad=True)
        p.grad = gradient.clone()
        optimizer = optim.SGD([p], max_grad_norm=math.inf)
        optimizer.step()
        norms.add(optimizer.grad_norm)
    torch.set_num_threads(before)
    assert len(norms) == 1
    assert math.isclose(norms.pop(), gradient.double().norm(), rel_tol=1e-7)


def test_the_scaler_of_torch_is_served():
    params, twins = parameters(), parameters()
    ours, theirs = optim.AdamW(params, max_grad_norm=1.0), optim.AdamW(twins, max_grad_norm=1.0)
    steps(theirs, twins, 1)
    ours.grad_scale, ours.found_inf = torch.tensor(256.0), torch.tensor(0.0)
    steps(ours, params, 1, scale=256.0)
    assert math.isclose(ours.grad_norm, theirs.grad_norm, rel_tol=1e-6)
    torch.testing.assert_close(flat(params), flat(twins))
    before = flat(params)
    ours.found_inf = torch.tensor(1.0)
    steps(ours, params, 1)
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_are_stepped_in_float32(dtype):
    params = parameters(dtype)
    exact = [p.detach().float().requires_grad_() for p in params]
    ours, theirs = optim.AdamW(params, weights="master"), optim.AdamW(exact)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for p, q in zip(params, exact, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, q in zip(params, exact, strict=True):
        assert torch.equal(p, q.to(dtype))


@pytest.mark.parametrize("cls", [optim.AdamW, optim.Lion, optim.SGD, optim.ScheduleFreeAdamW])
def test_kahan_keeps_small_changes_that_rounding_loses(cls):
    """200 changes of a thousandth of the weight's last place."""
    start, rate = 1.0, 1e-5
    results = {}
    for weights in ("rounded", "kahan", "master"):
        p = torch.full((300,), start, dtype=torch.bfloat16, requires_grad=True)
        optimizer = cls([p], lr=rate, weights=weights)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        state = optimizer.state[p]
        whole = p.detach().float() + state.get("compensation", torch.zeros(()))
        results[weights] = state.get("master", whole)[0].item()
    assert results["rounded"] == start
    assert math.isclose(results["kahan"], results["master"], abs_tol=4e-4)
    assert results["master"] < start - 5e-4


def test_bfloat16_states_are_rounded_randomly_and_without_bias():
    """A second moment that decays by a thousandth a step stands still if rounded to nearest."""
    results = {}
    for random in (False, True):
        p = torch.zeros(4096, requires_grad=True)
        options = {"state_dtype": torch.bfloat16, "stochastic_rounding": random}
        optimizer = optim.AdamW([p], lr=0.0, betas=(0.9, 0.999), **options)
        for value in [1.0] + [0.0] * 200:
            p.grad = torch.full_like(p, value)
            optimizer.step()
        results[random] = optimizer.state[p]["exp_avg_sq"].float().mean().item()
    exact = 0.001 * 0.999**200
    assert abs(results[False] - exact) > 0.1 * exact
    assert math.isclose(results[True], exact, rel_tol=2e-3)


def test_the_random_bits_follow_from_seed_step_and_index():
    results = {}
    for seed, key in ((0, "one"), (0, "same"), (1, "other")):
        params = parameters(shapes=[(5000,), (5000,)])
        with torch.no_grad():
            params[1].copy_(params[0])
        optimizer = optim.AdamW(params, state_dtype=torch.bfloat16, seed=seed)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            params[0].grad = torch.randn(5000, generator=generator)
            params[1].grad = params[0].grad.clone()
            optimizer.step()
        results[key] = [optimizer.state[p]["exp_avg"].clone() for p in params]
    assert torch.equal(results["one"][0], results["same"][0])
    assert not torch.equal(results["one"][0], results["other"][0])
    assert not torch.equal(results["one"][0], results["one"][1])  # each tensor has its own


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.Lion])
def test_l1_moves_weights_to_zero_and_keeps_them_there(cls):
    p = torch.tensor([1e-3, -1e-3, 1.0, -1.0], requires_grad=True)
    p.grad = torch.zeros(4)
    cls([p], lr=0.1, l1=0.05, weight_decay=0.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, 0.0, 0.995, -0.995]))


@pytest.mark.parametrize("cls", [optim.AdamW, optim.LAMB, optim.ScheduleFreeAdamW, optim.Lion])
@pytest.mark.parametrize("beta", [0.0, 1e-3])
def test_a_small_beta_forgets_what_was_far_larger(cls, beta):
    p = torch.zeros(40, requires_grad=True)
    optimizer = cls([p], lr=1e-3, betas=(beta or 1e-3, beta))
    for size in (1.0, 1e-4):
        p.grad = torch.full((40,), size)
        optimizer.step()
    state = optimizer.state[p]
    second, first = state.get("exp_avg_sq"), state.get("exp_avg")
    beta1 = beta if cls is optim.Lion else beta or 1e-3
    if second is not None:
        expected = beta * (1 - beta) + (1 - beta) * 1e-8
        torch.testing.assert_close(second, torch.full((40,), expected), rtol=3e-7, atol=0)
    if first is not None:
        expected = beta1 * (1 - beta1) + (1 - beta1) * 1e-4
        torch.testing.assert_close(first, torch.full((40,), expected), rtol=3e-7, atol=0)


def test_lamb_scales_each_tensor_by_its_trust_ratio():
    big, small = torch.full((50,), 10.0), torch.full((50,), 0.1)
    params = [big.requires_grad_(), small.requires_grad_()]
    optimizer = optim.LAMB(params, lr=0.01)
    for p in params:
        p.grad = torch.ones(50)
    optimizer.step()
    torch.testing.assert_close(big.detach(), torch.full((50,), 9.9))
    torch.testing.assert_close(small.detach(), torch.full((50,), 0.099))


def test_schedule_free_evaluates_the_average():
    """On a noisy quadratic the average is nearer to the optimum than where gradients are taken."""
    torch.manual_seed(0)
    p = torch.full((64,), 3.0, requires_grad=True)
    optimizer = optim.ScheduleFreeAdamW([p], lr=0.3, warmup_steps=10)
    for _ in range(300):
        p.grad = p.detach() + torch.randn(64)
        optimizer.step()
    at_y = p.detach().clone()
    optimizer.eval()
    at_x = p.detach().clone()
    with pytest.raises(RuntimeError, match="call train"):
        optimizer.step()
    optimizer.train()
    torch.testing.assert_close(p.detach(), at_y)
    assert at_x.norm() < at_y.norm()
    # x from its definition: y = (1 - beta1) z + beta1 x
    z = optimizer.state[p]["z"]
    torch.testing.assert_close(0.1 * z + 0.9 * at_x, at_y)


def test_views_that_are_not_contiguous():
    base, twin = torch.randn(8, 12), torch.empty(8, 12)
    twin.copy_(base)
    p, q = base[:, ::2].requires_grad_(), twin[:, ::2].contiguous().requires_grad_()
    one = optim.AdamW([p], lr=0.1, zero_grads=True, max_grad_norm=1.0)
    other = optim.AdamW([q], lr=0.1, max_grad_norm=1.0)
    for _ in range(3):
        gradient = torch.randn(6, 8).t()
        p.grad, q.grad = gradient, gradient.contiguous()
        one.step()
        other.step()
        assert not gradient.any()
    assert torch.equal(p, q)
    assert torch.equal(base[:, 1::2], twin[:, 1::2])


def test_other_strides_at_the_same_address_are_noticed():
    p, q = (torch.arange(9.0).view(3, 3).clone().requires_grad_() for _ in range(2))
    ours, theirs = optim.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    for _ in range(3):
        for weight, optimizer in ((p, ours), (q, theirs)):
            weight.grad = torch.arange(9.0).view(3, 3) - 4
            optimizer.step()
            weight.data = weight.data.t()
    torch.testing.assert_close(p, q)


def test_what_changes_between_steps_is_noticed():
    """The addresses are kept from step to step: every way to change them must be seen."""
    p, q = (torch.ones(10, requires_grad=True) for _ in range(2))
    optimizer = optim.AdamW([p, q], lr=0.1)
    p.grad = torch.ones(10)
    optimizer.step()
    assert torch.equal(q, torch.ones(10))
    q.grad = torch.ones(10)  # now both have one
    optimizer.step()
    assert optimizer.state[q]["step"] == 1
    p.data = torch.full((10,), 5.0)  # another storage under the same parameter
    optimizer.step()
    assert (p < 5).all()
    optimizer.state[p]["exp_avg"] = torch.zeros(10)  # another state
    optimizer.state[p]["exp_avg_sq"].data = torch.ones(10)  # another storage of a state
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((10,), 0.1))
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], torch.ones(10))
    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    p.grad.data = torch.ones(4)  # fewer elements at another place, in the same object
    with pytest.raises(ValueError, match="the shapes must be equal"):
        optimizer.step()
    p.grad.data = torch.ones(10)
    optimizer.param_groups[0]["lr"] = 0.0
    before = p.detach().clone()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert torch.equal(p, before)
    p.grad = torch.ones(10).bfloat16().float()
    optimizer.step()
    q.grad = None
    optimizer.step()
    assert optimizer.state[p]["step"] == 4
    assert optimizer.state[q]["step"] == 3
