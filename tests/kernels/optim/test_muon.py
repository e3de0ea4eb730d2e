"""Muon: torch.optim.Muon's trajectories, groups, state dicts, weights of 16 bits, errors."""

import copy
import math
from functools import partial

import pytest
import stepping
import torch
from stepping import steps

from gradsmith_kernels import optim
from gradsmith_kernels.ops.newton_schulz.spec import published

SHAPES = [(64, 32), (32, 200), (130, 600), (1, 7), (20, 20)]
parameters = partial(stepping.parameters, shapes=SHAPES)


def exact_muon(params, count, lr, decay=0.1, momentum=0.95, nesterov=True, ratio=None, seed=1):
    """The published algorithm in float64, iterations too."""
    generator = torch.Generator().manual_seed(seed)
    values = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(x) for x in values]
    for _ in range(count):
        for x, m in zip(values, buffers, strict=True):
            g = torch.randn(x.shape, generator=generator).double()
            m.lerp_(g, 1 - momentum)
            update = published(g.lerp(m, momentum) if nesterov else m)
            scale = ratio(x.shape) if ratio else max(1, x.shape[0] / x.shape[1]) ** 0.5
            x.mul_(1 - lr * decay).sub_(lr * scale * update)
    return values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.9},
        {"adjust_lr_fn": "original", "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3},
        {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    ],
)
def test_the_trajectory_is_torchs(options):
    ours, theirs = parameters(), parameters()
    one = optim.Muon(ours, lr=0.02, **options)
    other = torch.optim.Muon(theirs, lr=0.02, **options)
    steps(one, ours, 20)
    steps(other, theirs, 20)
    for p, q, start in zip(ours, theirs, parameters(), strict=True):
        # Both round the iterations to bfloat16: a hundredth of the way, which is all that differs.
        assert (p - q).norm() <= 0.02 * (q - start).norm()
        buffers = (one.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
        torch.testing.assert_close(*buffers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_in_float64_the_trajectory_is_exact(nesterov, adjust):
    ratio = (lambda shape: 0.2 * math.sqrt(max(shape))) if adjust != "original" else None
    params = parameters(dtype=torch.float64)
    exact = exact_muon(params, 20, 0.02, nesterov=nesterov, ratio=ratio)
    optimizer = optim.Muon(params, lr=0.02, nesterov=nesterov, adjust_lr_fn=adjust)
    for p, x in zip(steps(optimizer, params, 20), exact, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-12)


def test_the_error_is_at_most_torchs():
    exact = exact_muon(parameters(), 30, 0.02)
    errors = []
    for cls in (optim.Muon, torch.optim.Muon):
        params = parameters()
        steps(cls(params, lr=0.02), params, 30)
        errors.append([(p - x).norm() / x.norm() for p, x in zip(params, exact, strict=True)])
    for mine, torchs in zip(*errors, strict=True):
        assert mine <= 1.1 * torchs


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_load_into_torch_and_back(ours_first):
    first, second = optim.Muon, torch.optim.Muon
    if not ours_first:
        first, second = second, first
    params, twins = parameters(), parameters()
    one = first(params, lr=0.02, momentum=0.9)
    steps(one, params, 5)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    other = second(twins)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert (other.param_groups[0]["lr"], other.param_groups[0]["momentum"]) == (0.02, 0.9)
    start = [p.detach().clone() for p in params]
    steps(one, params, 5, seed=2)
    steps(other, twins, 5, seed=2)
    for p, q, before in zip(params, twins, start, strict=True):
        assert (p - q).norm() <= 0.02 * (q - before).norm()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.conv = torch.nn.Conv1d(8, 8, 3, padding=1)
        self.hidden = torch.nn.Linear(8, 16)
        self.out = torch.nn.Linear(16, 10)


def test_groups_are_split_by_dimensions():
    net = Net()
    optimizer = optim.Muon(net.named_parameters(), lr=0.02, adamw_lr=1e-3, adamw_eps=1e-9)
    muon, adamw = optimizer.param_groups
    assert muon["param_names"] == ["embed.weight", "hidden.weight", "out.weight"]
    assert adamw["param_names"] == ["conv.weight", "conv.bias", "hidden.bias", "out.bias"]
    assert (muon["use_muon"], muon["lr"], muon["eps"]) == (True, 0.02, 1e-7)
    assert (adamw["use_muon"], adamw["lr"], adamw["eps"]) == (False, 1e-3, 1e-9)


def test_what_is_no_hidden_matrix_is_stepped_as_adamw_does():
    net = Net()
    twin = copy.deepcopy(net)

    def groups(net):
        rest = [p for n, p in net.named_parameters() if n != "hidden.weight"]
        return net.hidden.weight, rest[:3], rest[3:]

    matrix, tables, biases = groups(net)
    own = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    ours = optim.Muon(
        [
            {"params": [matrix]},
            {"params": tables, "use_muon": False, **own},
            {"params": biases, "use_muon": False, "weight_decay": 0.0},
        ],
        lr=0.02,
        adamw_lr=1e-3,
    )
    matrix, tables, biases = groups(twin)
    theirs = [
        torch.optim.Muon([matrix], lr=0.02),
        torch.optim.AdamW(tables, **own),
        torch.optim.AdamW(biases, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        tolerance = {"rtol": 0, "atol": 4e-3} if name == "hidden.weight" else {}
        torch.testing.assert_close(p, q, **tolerance)
    assert set(ours.state[net.embed.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def mixed(dtype=torch.float32):
    return parameters(dtype, shapes=[*SHAPES, (7,), (2, 3, 4)])


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}])
def test_a_loaded_state_goes_on_with_the_same_bits(options):
    params, twins = mixed(), mixed()
    one, other = (optim.Muon(p, lr=0.02, **options) for p in (params, twins))
    steps(one, params, 4)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    steps(one, params, 4, seed=2)
    steps(other, twins, 4, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_master_weights_are_stepped_in_float32():
    params = mixed(torch.bfloat16)
    exact = [p.detach().float().requires_grad_() for p in params]
    ours, theirs = optim.Muon(params, lr=1e-3, weights="master"), optim.Muon(exact, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for p, q in zip(params, exact, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, q in zip(params, exact, strict=True):
        assert torch.equal(p, q.bfloat16())


def test_kahan_keeps_small_changes_that_rounding_loses():
    ends = {}
    for weights in ("rounded", "kahan", "master"):
        p = torch.full((16, 40), 8.0, dtype=torch.bfloat16, requires_grad=True)
        optimizer = optim.Muon([p], lr=1e-3, weight_decay=0.0, weights=weights)
        gradient = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
        for _ in range(50):
            p.grad = gradient.clone()
            optimizer.step()
        state = optimizer.state[p]
        ends[weights] = state.get("master", p.float() + state.get("compensation", 0.0))
    assert (ends["rounded"] == 8).all()
    moved = (ends["master"] - 8).norm()
    assert moved > 0.1
    assert (ends["kahan"] - ends["master"]).norm() < 0.05 * moved


def test_the_norm_is_clipped_over_both_kinds():
    params, twins = mixed(), mixed()
    one = optim.Muon(params, lr=0.02, max_grad_norm=0.5, zero_grads=True)
    other = optim.Muon(twins, lr=0.02)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(twins, 0.5)
        one.step()
        other.step()
        assert math.isclose(one.grad_norm, float(expected), rel_tol=1e-6)
        assert not any(p.grad.any() for p in params)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=4e-3)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing():
    params = mixed()
    optimizer = optim.Muon(params, lr=0.02, max_grad_norm=math.inf)
    steps(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
    params[2].grad[0, 3] = math.inf
    with pytest.warns(RuntimeWarning, match=r"gradient of params\[2\] of group 0"):
        optimizer.step()
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[0][i][key]) for key, value in state.items())
    assert all(torch.equal(p, q) for p, q in zip(params, before[1], strict=True))


def test_the_scaler_of_torch_is_served():
    params, twins = mixed(), mixed()
    ours, theirs = optim.Muon(params, lr=0.02), optim.Muon(twins, lr=0.02)
    steps(theirs, twins, 1)
    generator = torch.Generator().manual_seed(1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 256
    ours.grad_scale, ours.found_inf = torch.tensor(256.0), torch.tensor(1.0)
    ours.step()
    assert not ours.state
    ours.found_inf.zero_()
    ours.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_views_and_missing_gradients():
    base = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    p, q = base.clone()[:, ::2].requires_grad_(), base[:, ::2].clone().requires_grad_()
    idle = torch.ones(3, 3, requires_grad=True)
    one, other = optim.Muon([p, idle], lr=0.1), optim.Muon([q], lr=0.1)
    for _ in range(3):
        gradient = torch.randn(24, 40).t()
        p.grad, q.grad = gradient, gradient.contiguous()
        one.step()
        other.step()
    assert torch.equal(p, q)
    assert idle not in one.state
    assert torch.equal(idle, torch.ones(3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr is -1; it must be a number >= 0"),
        ({"momentum": 1.0}, r"momentum is 1.0; it must be in \[0, 1\)"),
        ({"eps": 0.0}, "eps is 0.0; it must be > 0"),
        ({"ns_steps": 0}, "ns_steps is 0; it must be from 1 to 99"),
        ({"ns_coefficients": (1.0, 2.0)}, "must be three numbers"),
        ({"adjust_lr_fn": "adamw"}, "adjust_lr_fn is 'adamw'; allowed are None, 'original'"),
        ({"adamw_betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        optim.Muon([torch.ones(2, 2, requires_grad=True)], **options)


def test_use_muon_needs_matrices():
    group = {"params": [torch.ones(2, 2, 3, requires_grad=True)], "use_muon": True}
    with pytest.raises(ValueError, match=r"has shape \(2, 2, 3\); it must have two dimensions"):
        optim.Muon([group])
