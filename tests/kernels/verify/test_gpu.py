"""What only a GPU can show: the compiled Triton kernels' numbers. `make gpu` runs these."""

import pytest
import torch

from gradsmith_kernels import optim
from gradsmith_kernels.certify import parity_rows
from gradsmith_kernels.verify.spec import all_specs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("spec", all_specs("triton"), ids=lambda spec: spec.op.name)
def test_parity(spec):
    rows = parity_rows(spec.op.name, ("triton", "cuda"))
    assert rows
    assert [row for row in rows if not row["passed"]] == []


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.op.name)
def test_opcheck(spec):
    for check in spec.opchecks(torch.device("cuda")):
        torch.library.opcheck(check.overload, check.args, check.kwargs)


def test_adamw_takes_the_steps_of_torch():
    torch.manual_seed(0)
    start = [torch.randn(shape, device="cuda") for shape in ((513, 7), (33,), (), (4096, 64))]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = optim.AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
