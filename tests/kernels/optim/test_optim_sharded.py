"""DTensor parameters, on 1 and 2 ranks: the steps, norms and state dicts of torch's optimizers."""

import copy
import math
import multiprocessing
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from gradsmith_kernels import optim

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PAIRS = [
    (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    (optim.AdamW, torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    (optim.SGD, torch.optim.SGD, {"momentum": 0.9}),
    (optim.Adagrad, torch.optim.Adagrad, {}),
]
NEED_WHOLE = [
    (optim.Adafactor, {}, "the means of its rows and columns"),
    (optim.LAMB, {}, "the norms of the whole"),
    (optim.Muon, {}, "orthogonalised as a whole"),
    (optim.AdamW8bit, {"min_8bit_size": 8}, "belongs to 256 elements"),
]


def model_of(kind, mesh):
    """Shards of unequal sizes, one of them empty on the last of 2 ranks; or tensor parallel."""
    torch.manual_seed(0)
    hidden = 32 if kind == "tensor parallel" else 33
    layers = [torch.nn.Linear(7, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)]
    model = torch.nn.Sequential(*layers)
    if kind == "fsdp":
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "tensor parallel":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model


def batches(kind, count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 7, generator=generator)
        yield x.chunk(dist.get_world_size())[dist.get_rank()] if kind == "fsdp" else x


def whole(tensors):
    tensors = (t.full_tensor() if isinstance(t, DTensor) else t for t in tensors)
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def as_torch_steps(kind, mesh, ours, theirs, options, clip):
    one, other = model_of(kind, mesh), model_of(kind, mesh)
    clips = {"max_grad_norm": clip, "zero_grads": True} if clip else {}
    first = ours(one.parameters(), lr=1e-2, **options, **clips)
    second = theirs(other.parameters(), lr=1e-2, **options)
    for x in batches(kind, 4):
        for model in (one, other):
            model(x).square().mean().backward()
        if clip:
            norm = whole(p.grad for p in other.parameters()).norm()
            for p in other.parameters():
                p.grad.mul_(min(1.0, clip / (float(norm) + 1e-6)))
        first.step()
        second.step()
        if clip:
            assert math.isclose(first.grad_norm, float(norm), rel_tol=1e-6)
            assert not whole(p.grad for p in one.parameters()).any()
        first.zero_grad()
        second.zero_grad()
    torch.testing.assert_close(whole(one.parameters()), whole(other.parameters()))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        mine, torchs = first.state[p], second.state[q]
        assert {k: type(mine[k]) for k in torchs} == {k: type(v) for k, v in torchs.items()}


def states_go_round(mesh):
    """Through torch's checkpoint functions, as shards and whole; and a step that is skipped."""
    model, twin = model_of("fsdp", mesh), model_of("fsdp", mesh)
    one = optim.AdamW(model.parameters(), max_grad_norm=1.0)
    x = next(batches("fsdp", 1))
    model(x).square().mean().backward()
    one.step()
    shards = copy.deepcopy(get_optimizer_state_dict(model, one))
    full = get_optimizer_state_dict(model, one, options=StateDictOptions(full_state_dict=True))
    assert full["state"]["0.weight"]["exp_avg"].shape == (33, 7) or dist.get_rank() > 0
    other = optim.AdamW(twin.parameters(), max_grad_norm=1.0)
    set_optimizer_state_dict(twin, other, shards)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in one.state[p].items():
            assert torch.equal(whole([value]), whole([other.state[q][name]]))
    raw = copy.deepcopy(one.state_dict())
    raw["state"][0]["exp_avg"] = torch.zeros(33, 7)
    with pytest.raises(ValueError, match="is no DTensor and the parameter is one"):
        other.load_state_dict(raw)

    model(x).square().mean().backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        next(model.parameters()).grad.to_local()[0] = math.nan
    before = whole(model.parameters())
    with pytest.warns(RuntimeWarning, match="is not finite"):
        one.step()
    assert torch.equal(before, whole(model.parameters()))


def sums_are_added_up(mesh):
    """A gradient whose sum is still spread over the ranks, of a parameter that all of them have."""
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    optimizer = optim.SGD([p], lr=1.0, max_grad_norm=math.inf, zero_grads=True)
    optimizer.step()
    ranks = dist.get_world_size()
    assert math.isclose(optimizer.grad_norm, ranks * math.sqrt(3), rel_tol=1e-6)
    assert torch.equal(p.full_tensor(), torch.full((3,), -float(ranks)))
    assert not p.grad.full_tensor().any()


def refusals(mesh):
    for cls, options, reason in NEED_WHOLE:
        model = model_of("fsdp", mesh)
        model(next(batches("fsdp", 1))).sum().backward()
        optimizer = cls(model.parameters(), **options)
        if dist.get_world_size() == 1:
            optimizer.step()
            continue
        with pytest.raises(TypeError, match=f"cut into shards .*{reason}.*; keep it whole"):
            optimizer.step()


def everything(rank, ranks, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            mesh = init_device_mesh("cpu", (ranks,))
            for kind in ("fsdp", "tensor parallel"):
                for ours, theirs, options in PAIRS:
                    as_torch_steps(kind, mesh, ours, theirs, options, 0.05)
                as_torch_steps(kind, mesh, *PAIRS[0], None)
            states_go_round(mesh)
            sums_are_added_up(mesh)
            refusals(mesh)
    finally:
        dist.destroy_process_group()


def test_one_rank(tmp_path):
    everything(0, 1, tmp_path / "store")


def test_two_ranks(tmp_path):
    spawned = multiprocessing.get_context("spawn")
    ranks = [spawned.Process(target=everything, args=(r, 2, tmp_path / "store")) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
