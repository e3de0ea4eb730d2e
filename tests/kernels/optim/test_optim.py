import copy

import pytest
import torch

from gradsmith_kernels import optim
from gradsmith_kernels.ops.optimizer_step import optimizer_step_
from gradsmith_kernels.optim import AdamW


def model_and_twin(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1))
    model = model.to(dtype)
    return model, copy.deepcopy(model)


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 7, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def assert_same_parameters(one, other, rtol=1e-5, atol=1e-6):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


def test_groups_and_options_are_torchs():
    ours, theirs = model_and_twin()
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}

    def groups(model):
        return [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "lr": 3e-2, "weight_decay": 0.0},
        ]

    train(ours, AdamW(groups(ours), **options), 50)
    train(theirs, torch.optim.AdamW(groups(theirs), **options), 50)
    assert_same_parameters(ours, theirs)


def test_defaults_are_torchs():
    ours, theirs = model_and_twin()
    mine, torchs = AdamW(ours.parameters()), torch.optim.AdamW(theirs.parameters())
    own = {"decoupled", "l1"}
    assert all(torchs.defaults[n] == value for n, value in mine.defaults.items() if n not in own)
    train(ours, mine, 5)
    train(theirs, torchs, 5)
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_load_into_torch_and_back(ours_first):
    model, twin = model_and_twin()
    first, second = (AdamW, torch.optim.AdamW) if ours_first else (torch.optim.AdamW, AdamW)
    optimizer = first(model.parameters(), lr=1e-2)
    train(model, optimizer, 10)
    twin.load_state_dict(model.state_dict())
    other = second(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 10, seed=2)
    train(twin, other, 10, seed=2)
    assert other.param_groups[0]["lr"] == 1e-2
    assert_same_parameters(model, twin)


def test_a_state_dict_keeps_the_float32_moments_of_bfloat16_parameters():
    model, twin = model_and_twin(torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 5)
    twin.load_state_dict(model.state_dict())
    other = AdamW(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(state["exp_avg"].dtype == torch.float32 for state in other.state.values())
    train(model, optimizer, 5, seed=2)
    train(twin, other, 5, seed=2)
    assert_same_parameters(model, twin, rtol=0, atol=0)


def test_a_state_of_another_shape_is_refused():
    p, q = torch.ones(4, 6, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    p.grad = torch.ones(4, 6)
    one, other = AdamW([p]), AdamW([q])
    one.step()
    with pytest.raises(ValueError, match=r"exp_avg has shape \(4, 6\) for a parameter of shape"):
        other.load_state_dict(one.state_dict())


def test_a_step_count_that_is_a_number_is_refused():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    optimizer = AdamW([p])
    optimizer.step()
    optimizer.state[p]["step"] = 1
    with pytest.raises(TypeError, match="its step is 1; it must be one float32 element"):
        optimizer.step()


ADAM = {"foreach": None, "fused": True, "capturable": False, "differentiable": False}
EVERY = {"foreach": False, "fused": None, "differentiable": False}


@pytest.mark.parametrize(
    ("cls", "taken", "refused"),
    [
        (optim.AdamW, ADAM | {"amsgrad": False, "maximize": False}, {"capturable": True}),
        (optim.Adam, ADAM | {"decoupled_weight_decay": False}, {"differentiable": True}),
        (optim.AdamW8bit, ADAM | {"amsgrad": False}, {"amsgrad": True}),
        (optim.SGD, EVERY | {"maximize": False}, {"differentiable": True}),
        (optim.Adagrad, EVERY | {"maximize": False}, {"foreach": 2}),
        (optim.Adafactor, {"foreach": True, "maximize": False}, {"foreach": "yes"}),
    ],
)
def test_torchs_arguments_that_change_nothing_are_taken(cls, taken, refused):
    p = torch.ones(1, requires_grad=True)
    optimizer = cls([p], **taken)
    assert not set(optimizer.param_groups[0]) & {"foreach", "fused", "capturable"}
    with pytest.raises(ValueError, match=f"^{cls.__name__}: {next(iter(refused))}"):
        cls([p], **refused)
    with pytest.raises(TypeError, match=f"^{cls.__name__}: there is no argument 'nestrov'"):
        cls([p], nestrov=True)


def test_a_compiled_function_may_take_a_step():
    model, twin = model_and_twin()
    ours, theirs = AdamW(model.parameters(), lr=1e-2), AdamW(twin.parameters(), lr=1e-2)

    def train_step(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled = torch.compile(train_step, backend="eager")
    for _ in range(3):
        x = torch.randn(4, 7)
        assert torch.equal(compiled(model, ours, x), train_step(twin, theirs, x))
    assert_same_parameters(model, twin, rtol=0, atol=0)


def test_a_graph_that_has_seen_the_old_weights_is_refused():
    p = torch.ones(3, requires_grad=True)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_bits_do_not_depend_on_the_number_of_threads_or_on_the_split_into_tensors():
    torch.manual_seed(0)
    start, gradient = torch.randn(300_001), torch.randn(300_001)
    before, results = torch.get_num_threads(), []
    try:
        for threads, parts in ((1, 1), (2, 1), (3, 1), (2, 7), (5, 60)):
            torch.set_num_threads(threads)
            params = [p.clone().requires_grad_() for p in start.tensor_split(parts)]
            for p, g in zip(params, gradient.tensor_split(parts), strict=True):
                p.grad = g.clone()
            AdamW(params, lr=0.1).step()
            results.append(torch.cat(params))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_parameters_without_gradient_are_left_alone():
    used, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = AdamW([used, unused])
    used.grad = torch.ones(3)
    optimizer.step()
    assert unused not in optimizer.state
    assert torch.equal(unused, torch.ones(3))
    assert not torch.equal(used, torch.ones(3))


def test_a_closure_is_called_with_gradients_on():
    p = torch.ones(3, requires_grad=True)
    optimizer = AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert p.sum() < 3


def test_lr_may_be_a_tensor():
    ours, theirs = model_and_twin()
    train(ours, AdamW(ours.parameters(), lr=torch.tensor(1e-2)), 3)
    train(theirs, AdamW(theirs.parameters(), lr=float(torch.tensor(1e-2))), 3)
    assert_same_parameters(ours, theirs, rtol=0, atol=0)


def test_groups_that_are_pointed_to_other_parameters_just_work():
    """DeepSpeed's ZeRO replaces the parameters of every group by flat float32 partitions."""
    optimizer = AdamW([torch.ones(4, requires_grad=True, dtype=torch.bfloat16)], lr=0.1)
    partition = torch.ones(10, requires_grad=True)
    optimizer.param_groups[0]["params"] = [partition]
    partition.grad = torch.ones(10)
    optimizer.step()
    assert optimizer.state[partition]["step"] == 1
    twin = torch.ones(10, requires_grad=True)
    twin.grad = torch.ones(10)
    torch.optim.AdamW([twin], lr=0.1).step()
    torch.testing.assert_close(partition, twin)


def test_schedulers_and_zero_weight():
    ours, theirs = model_and_twin()
    for cls, model in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = cls(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
        for seed in range(10):
            train(model, optimizer, 1, seed)
            schedule.step()
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr is -1; it must be a number >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"l1": -0.1}, "l1 is -0.1"),
    ],
)
def test_bad_options_of_a_group(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([torch.ones(1, requires_grad=True)], **options)
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": [torch.ones(1, requires_grad=True)], **options}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be > 0 or None"),
        ({"weights": "fp32"}, "weights is 'fp32'; allowed are rounded, master, kahan"),
        ({"state_dtype": torch.float16}, "it must be torch.float32 or torch.bfloat16"),
    ],
)
def test_bad_options_of_an_optimizer(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([torch.ones(1, requires_grad=True)], **options)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="nesterov needs momentum > 0"):
        optim.SGD([torch.ones(1, requires_grad=True)], nesterov=True)


def test_bad_gradients_and_parameters():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"gradient of shape .* is torch\.sparse_coo; it must be dense"
    ):
        AdamW(embedding.parameters()).step()
    p = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"parameter of shape .* is complex"):
        AdamW([p]).step()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, r"got \{'grads': 0"),
        ({"grads": [torch.ones(2)]}, ValueError, "the shapes must be equal"),
        ({"grads": [torch.ones(3).int()]}, TypeError, "its gradient torch.int32"),
        ({"exp_avg": [torch.ones(3).half()]}, TypeError, "its states are"),
        ({"grads": [torch.ones(3, device="meta")]}, ValueError, "all must be on cpu"),
        ({"steps": [torch.ones(2)]}, TypeError, "its step is torch.float32 .2,. on cpu"),
        ({"masters": [torch.ones(3)]}, TypeError, "beside 16-bit params"),
        ({"exp_avg": [torch.ones(3).byte()], "exp_avg_sq": [torch.ones(3).byte()]}, ValueError,
         "absmax1 has 0 tensors"),
        ({"options": {"lr": 0.1}}, ValueError, "adam takes"),
        ({"rule": "adamw"}, ValueError, "'adamw' is not one of adam, lion"),
    ],
)  # fmt: skip
def test_the_op_checks_what_it_is_given(change, error, message):
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    options |= {"weight_decay": 0.0, "decoupled": 1.0, "l1": 0.0}
    arguments = {name: [torch.ones(3)] for name in ("params", "grads", "exp_avg", "exp_avg_sq")} | {
        "rule": "adam",
        "steps": [torch.zeros(())],
        "options": options,
    }
    arguments |= change
    ordered = [arguments.pop(n) for n in ("rule", "params", "grads", "exp_avg", "exp_avg_sq")]
    with pytest.raises(error, match=message):
        optimizer_step_(*ordered, **arguments)
