"""newton_schulz: hard matrices against float64 and the published loop, layouts, errors."""

import pytest
import torch
from torch.autograd import forward_ad

from gradsmith_kernels.ops.newton_schulz import cpu, newton_schulz
from gradsmith_kernels.ops.newton_schulz.spec import published


def matrices(m, n):
    """Name and matrix: with noise below the largest singular values, without, and of no rank."""
    generator = torch.Generator().manual_seed(m + n)

    def normal(*size):
        return torch.randn(size, generator=generator)

    left, _ = torch.linalg.qr(normal(m, m))
    right, _ = torch.linalg.qr(normal(n, m))
    spectra = {
        "condition 1e3": torch.logspace(0, -3, m),
        "condition 1e6": torch.logspace(0, -6, m),
        "power law": 1 / torch.arange(1, m + 1),
        "one large": torch.cat([torch.ones(1), torch.full((m - 1,), 1e-3)]),
        "half small": torch.cat([torch.ones(m // 2), torch.full((m - m // 2,), 1e-4)]),
    }
    sparse = torch.zeros(m, n)
    sparse.diagonal().copy_(normal(m) * (torch.arange(m) % 3 == 0))
    rows = normal(m, n)
    rows[::3] *= 1e-3
    yield "normal", normal(m, n)
    yield "low rank", normal(m, m // 8) @ normal(m // 8, n)
    yield "rank 1", normal(m, 1) @ normal(1, n)
    yield from ((name, left * values @ right.T) for name, values in spectra.items())
    yield "sparse", sparse
    yield "small rows", rows
    yield "with a mean", normal(m, n) + 1
    yield "norm below eps", normal(m, n) * 1e-12
    yield "norm near overflow", normal(m, n) * 1e15


def error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(params=["eigenvalues", "products"])
def few_threads(request, monkeypatch):
    """The two ways to a polynomial of a Gram matrix."""
    monkeypatch.setattr(cpu, "FEW_THREADS", 1000 if request.param == "eigenvalues" else 0)


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("shape", [(130, 700), (256, 1024), (700, 130), (200, 260)])
def test_the_error_is_at_most_that_of_the_published_loop(shape):
    m, n = sorted(shape)
    for name, x in matrices(m, n):
        x = (x if shape[0] == m else x.T).bfloat16()
        exact = published(x.double())
        bound = 1.1 * error(published(x), exact)
        assert error(newton_schulz(x), exact) <= bound, name


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("fast", [True, False])
def test_the_gram_way_is_taken_and_far_more_exact(fast, monkeypatch):
    """On machines on which torch's bfloat16 products are fast, and on those where they are slow."""
    monkeypatch.setattr(cpu, "torch_multiplies_bf16", lambda: fast)
    assert cpu._gram_is_less(256, 1024, 5)
    if fast:
        assert not cpu._gram_is_less(1024, 1024, 5)
    for name, x in matrices(256, 1024):
        if name in ("normal", "low rank", "rank 1", "with a mean"):
            x = x.bfloat16()
            exact = published(x.double())
            assert error(newton_schulz(x), exact) < 0.4 * error(published(x), exact), name


@pytest.mark.parametrize("shape", [(128, 128), (129, 129), (130, 1000), (500, 501), (1024, 4096)])
def test_blocks_cover_the_lower_triangle_once(shape):
    m, _ = shape
    covered = torch.zeros(m, m, dtype=torch.int8)
    for r0, r1, c0, c1 in cpu._triangle(m):
        assert r0 == c0 or c1 <= r0
        covered[r0:r1, c0:c1] += 1
    assert covered.max() == 1
    assert covered.tril().sum() == m * (m + 1) // 2


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(160, 800), (3, 5), (20, 20)])
def test_zero_gives_zero_and_a_nan_is_not_hidden(shape, backend):
    x = torch.zeros(2, *shape, dtype=torch.bfloat16)
    assert torch.equal(newton_schulz(x, backend=backend), x)
    x[1, 1, 2] = float("nan")
    y = newton_schulz(x, backend=backend)
    assert not y[0].any()
    assert y[1].isnan().all()


def test_singular_values_go_to_one():
    torch.manual_seed(0)
    x = torch.randn(150, 900)
    left, values, right = torch.linalg.svd(newton_schulz(x, steps=6), full_matrices=False)
    assert 0.6 < values.min() <= values.max() < 1.3
    exact_left, _, exact_right = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(left @ right, exact_left @ exact_right, atol=0.02, rtol=0)


def test_cubic_coefficients_converge():
    x = torch.randn(40, 60, dtype=torch.float64)
    y = newton_schulz(x, steps=40, coefficients=(1.5, -0.5, 0.0))
    torch.testing.assert_close(y @ y.T, torch.eye(40, dtype=torch.float64))


def test_views_and_batches():
    torch.manual_seed(0)
    base = torch.randn(2, 3, 150, 620, dtype=torch.bfloat16)
    y = newton_schulz(base[..., ::2])
    assert y.is_contiguous()
    for i in range(2):
        for j in range(3):
            assert torch.equal(y[i, j], newton_schulz(base[i, j, :, ::2].contiguous()))
    tall = newton_schulz(base[0, 0].T)
    assert tall.is_contiguous()
    torch.testing.assert_close(tall, newton_schulz(base[0, 0]).T, rtol=0.02, atol=0.002)


@pytest.mark.parametrize(
    ("x", "options", "kind", "message"),
    [
        (torch.ones(3), {}, ValueError, r"x is \(3,\); it must have 2 dimensions"),
        (torch.ones(3, 3, dtype=torch.int32), {}, TypeError, "x is torch.int32"),
        (torch.ones(3, 3), {"steps": 0}, ValueError, "steps is 0; it must be at least 1"),
        (torch.ones(3, 3), {"eps": 0.0}, ValueError, "eps is 0.0; it must be > 0"),
        (torch.ones(3, 3), {"coefficients": (1.0, 2.0)}, ValueError, "must be three numbers"),
    ],
)
def test_errors(x, options, kind, message):
    with pytest.raises(kind, match=message):
        newton_schulz(x, **options)


def test_derivatives_are_refused():
    x = torch.randn(3, 5)
    with pytest.raises(NotImplementedError, match="newton_schulz has no forward-mode derivative"):
        torch.func.jvp(newton_schulz, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="newton_schulz has no"):
        newton_schulz(forward_ad.make_dual(x, x))
    out = newton_schulz(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"^newton_schulz has no derivative$"):
        out.sum().backward()
    samples = torch.func.vmap(newton_schulz)(torch.stack((x, 2 * x)))
    assert torch.equal(samples[0], newton_schulz(x))
