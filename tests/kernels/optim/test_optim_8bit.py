"""8-bit states: the code, its rounding, and bitsandbytes."""

import copy

import pytest
import torch

from gradsmith_kernels import _native, optim
from gradsmith_kernels.ops.optimizer_step import optimizer_step_, quantize


def through_the_kernel(values, signed, seed=None):
    """Codes and scales that the C++ code gives a state with these values."""
    n = values.numel()
    options = {"lr": 0.0, "weight_decay": 0.0, "decoupled": 1.0, "l1": 0.0}
    signs = torch.full((n,), 127, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    scales = [[torch.zeros(-(-n // 256))] for _ in range(2)]
    # m = g with momentum 0; v = g^2 with beta2 = 0
    if signed:
        options |= {"momentum": 0.0, "dampening": 0.0, "nesterov": 0.0}
        rule, states, gradient = "momentum", [[signs[0]]], values
    else:
        options |= {"beta1": 0.0, "beta2": 0.0, "eps": 1.0}
        rule, states, gradient = "adam", [[s] for s in signs], values.sqrt()
    optimizer_step_(
        rule,
        [torch.zeros(n)],
        [gradient],
        *states,
        absmax=scales,
        steps=[torch.ones(())],
        options=options,
        seed=seed,
        backend="cpu",
    )
    which = 0 if signed else 1
    return states[which][0], scales[which][0]


@pytest.fixture(params=[level for level in _native.isa_levels() if level != "amx"])
def isa(request):
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def drawn(signed, n=256 * 64):
    """Values over all decades of the code, each block with its own scale."""
    generator = torch.Generator().manual_seed(5)
    values = 10 ** (-8 * torch.rand(n, generator=generator))
    values *= torch.rand(n // 256, generator=generator).repeat_interleave(256) * 100
    if signed:
        values *= torch.randn(n, generator=generator).sign()
    return values


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed, isa):
    values = drawn(signed)
    if not signed:
        values = values.sqrt().square()  # as the kernel computes it
    codes, absmax = through_the_kernel(values, signed)
    expected, scales = quantize.encode(values, signed)
    torch.testing.assert_close(absmax, scales)
    x = values.double() / scales.double().repeat_interleave(256)
    table = quantize.dynamic_map(signed).double()
    distance, best = (x - table[codes.long()]).abs(), (x - table[expected.long()]).abs()
    # Where they differ, the value lies in the middle of two codes, up to float32's rounding.
    assert (distance <= best + 1e-6 * x.abs() + 1e-12).all()
    assert (codes != expected).float().mean() < 1e-3


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_decoded_to_the_maps_value(signed, isa):
    """Through an update that shows the state: x = -momentum * m."""
    codes = torch.arange(256, dtype=torch.uint8)
    p, zero = torch.zeros(256), torch.zeros(256)
    options = {"lr": 1.0, "weight_decay": 0.0, "decoupled": 1.0, "l1": 0.0}
    if signed:
        options |= {"momentum": 1.0, "dampening": 0.0, "nesterov": 0.0}
        states, rule = [[codes.clone()]], "momentum"
    else:
        # With m = -1 the weight becomes 1 / (sqrt(v) / sqrt(1 - beta2^t) + eps).
        options |= {"beta1": 0.5, "beta2": 0.5, "eps": 1.0}
        states, rule = [[torch.zeros(256, dtype=torch.uint8)], [codes.clone()]], "adam"
    scales = [[torch.full((1,), 3.0)] for _ in range(2)]
    optimizer_step_(
        rule, [p], [zero], *states, absmax=scales, steps=[torch.tensor(100.0)], options=options,
        backend="cpu",
    )  # fmt: skip
    values = 3 * quantize.dynamic_map(signed).double()
    if signed:
        torch.testing.assert_close(p.double(), -values, rtol=3e-7, atol=0)
    else:
        m = 0.5 * 3 * quantize.dynamic_map(True)[0].double()
        expected = -m / ((0.5 * values).sqrt() + 1)
        torch.testing.assert_close(p.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_random_rounding_is_between_neighbours_and_without_bias(signed, isa):
    values = drawn(signed, 256).repeat(400)
    values[::256] = 200.0  # the scale, in every block
    if not signed:
        values = values.sqrt().square()
    codes, absmax = through_the_kernel(values, signed, seed=3)
    reference = quantize.dynamic_map(signed)
    x = values / 200
    position = torch.bucketize(x, reference)
    assert ((codes.long() - position).abs() <= 1).all()
    mean = quantize.decode(codes, absmax, signed).view(400, 256).double().mean(0)
    gaps = (reference[position.clamp(max=255)] - reference[(position - 1).clamp(min=0)])[:256]
    # The mean of 400 draws scatters by at most half a gap / 20.
    assert ((mean - values[:256]).abs() <= 200 * gaps * 0.5 / 20 * 5 + 1e-9).all()


def test_the_map_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(quantize.dynamic_map(signed), theirs, rtol=1e-6, atol=0)


def train(optimizer, p, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator) + p.detach()
        optimizer.step()


@pytest.mark.parametrize("n", [1000, 10_000])  # float32 states, 8-bit states
@pytest.mark.parametrize("ours_first", [True, False])
def test_states_go_to_bitsandbytes_and_back(n, ours_first):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    nearest = {"stochastic_rounding": False}
    ours, theirs = optim.AdamW8bit, bitsandbytes.optim.AdamW8bit
    first, second = (ours, theirs) if ours_first else (theirs, ours)
    torch.manual_seed(0)
    p = torch.randn(n, requires_grad=True)
    one = first([p], lr=1e-2, **(nearest if first is ours else {}))
    train(one, p, 5, seed=1)
    q = p.detach().clone().requires_grad_()
    other = second([q], lr=1e-2, **(nearest if second is ours else {}))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    start = p.detach().clone()
    train(one, p, 3, seed=2)
    train(other, q, 3, seed=2)
    # One step is float32 arithmetic; later a state may have been rounded to the other side.
    assert (p - q).norm() / (p - start).norm() < 5e-3


def test_one_step_is_as_near_to_float64_as_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, gradients = torch.randn(10_000), torch.randn(2, 10_000)
    results = {}
    warm = optim.AdamW8bit([start.clone().requires_grad_()], lr=1e-2, stochastic_rounding=False)
    (q,) = warm.param_groups[0]["params"]
    q.grad = gradients[0]
    warm.step()
    for cls in (optim.AdamW8bit, bitsandbytes.optim.AdamW8bit):
        p = q.detach().clone().requires_grad_()
        optimizer = cls([p], lr=1e-2)
        optimizer.load_state_dict(copy.deepcopy(warm.state_dict()))
        p.grad = gradients[1].clone()
        optimizer.step()
        results[cls] = p.detach().double()
    state = warm.state[q]
    m = quantize.decode(state["state1"], state["absmax1"], True).double()
    v = quantize.decode(state["state2"], state["absmax2"], False).double()
    g = gradients[1].double()
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    update = 1e-2 * (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    exact = q.detach().double() * (1 - 1e-4) - update
    ours, theirs = ((results[cls] - exact).norm() / exact.norm() for cls in results)
    assert ours <= 1.1 * theirs


def test_small_parameters_keep_float32_moments():
    p, q = torch.ones(4095, requires_grad=True), torch.ones(4096, requires_grad=True)
    p.grad, q.grad = torch.ones(4095), torch.ones(4096)
    optimizer = optim.AdamW8bit([p, q])
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == torch.float32
    assert optimizer.state[q]["state1"].dtype == torch.uint8
    smaller = optim.AdamW8bit([p, q], min_8bit_size=100)
    with pytest.raises(ValueError, match="min_8bit_size must be the same"):
        smaller.load_state_dict(optimizer.state_dict())


def test_another_map_is_refused():
    p = torch.ones(5000, requires_grad=True)
    p.grad = torch.ones(5000)
    optimizer = optim.AdamW8bit([p])
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["qmap1"] = torch.linspace(-1, 1, 256)
    with pytest.raises(ValueError, match="qmap1 is not the dynamic 8-bit map"):
        optimizer.load_state_dict(state)
