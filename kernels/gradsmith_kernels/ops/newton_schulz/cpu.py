"""Newton-Schulz on the CPU. torch's products run at the machine's peak: what is saved is products.

A product of symmetric matrices that commute is symmetric: its lower triangle of blocks is computed
and mirrored. Of two ways the one with less work is taken:

- direct, the published loop: `steps` times X X^T, A A and P X;
- Gram, for bfloat16: the result is Q X with Q a polynomial of G = X X^T, a matrix of the smaller
  size m, and all but the products G and Q X is done on such matrices. What G lacks in its small
  eigenvalues grows with them, a^2 = 12 times a step. In bfloat16 that would explode; in float32,
  whose products take twice the time, it stays below the published loop's error.

Q is computed from G's eigenvalues, or by the iteration itself,
P = a I + b A + c A^2,   Q = Q P,   A = A P P.
The first is less work, by a third to a half, the second is shared better among threads.

Where torch multiplies bfloat16 in a slow loop (AVX2), all products are in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsmith_kernels.backends import torch_multiplies_bf16

SMALL = 128  # matrices with fewer rows are no more work in float32; also the smallest blocks

FEW_THREADS = 4  # up to which the eigenvalues are faster (estimated from one thread's times)
EIGENVALUES = 14  # their work, in units of m^3 multiplications in bfloat16


def newton_schulz(x: Tensor, steps: int, coefficients: Sequence[float], eps: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, cols = x.shape[-2:]
    m, n = min(rows, cols), max(rows, cols)
    iterate = _gram if x.dtype == torch.bfloat16 and _gram_is_less(m, n, steps) else _direct
    for one, result in zip(x.reshape(-1, rows, cols), y.view(-1, rows, cols), strict=True):
        iterate(one, result, steps, coefficients, eps)
    return y


def _gram_is_less(m: int, n: int, steps: int) -> bool:
    """Compares the multiplications in bfloat16 (one in float32 is two) of the two ways."""
    if m < SMALL:
        return False
    half = sum((r1 - r0) * (c1 - c0) for r0, r1, c0, c1 in _triangle(m))
    one = 1 if torch_multiplies_bf16() else 2
    direct = one * steps * (half * (n + m) + m * m * n)
    polynomial = EIGENVALUES * m**3 if _few_threads() else 2 * half * (4 * steps - 3) * m
    gram = 2 * half * n + polynomial + one * m * m * n
    return gram < direct


def _few_threads() -> bool:
    return torch.get_num_threads() <= FEW_THREADS


@functools.cache
def _triangle(m: int, begin: int = 0) -> list[tuple[int, int, int, int]]:
    """Blocks that cover the lower triangle: (first row, end, first column, end)."""
    if m <= SMALL:
        return [(begin, begin + m, begin, begin + m)]
    half = -(-m // 2)
    middle, end = begin + half, begin + m
    below = (middle, end, begin, middle)
    return [*_triangle(half, begin), below, *_triangle(m - half, middle)]


def _symmetric_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    add: Tensor | None = None,
    factors: Sequence[float] = (),
) -> Tensor:
    """out = left @ right, or factors[0] add + factors[1] left @ right; all symmetric."""
    for r0, r1, c0, c1 in _triangle(out.shape[0]):
        rows, columns, block = left[r0:r1], right[:, c0:c1], out[r0:r1, c0:c1]
        if add is None:
            torch.mm(rows, columns, out=block)
        else:
            beta, alpha = factors
            torch.addmm(add[r0:r1, c0:c1], rows, columns, beta=beta, alpha=alpha, out=block)
        if r0 != c0:
            out[c0:c1, r0:r1].copy_(block.t())
    return out


def _gram(x: Tensor, result: Tensor, steps: int, coefficients: Sequence[float], eps: float) -> None:
    """Writes one matrix's result by way of the Gram matrix of its smaller side."""
    tall = x.shape[0] > x.shape[1]
    wide = x.float().t() if tall else x.float()
    m = wide.shape[0]
    gram = _symmetric_product(wide, wide.t(), torch.empty(m, m))
    scale = 1 / gram.trace().sqrt().clamp(min=eps)
    gram *= scale * scale
    if not gram.isfinite().all():
        result.fill_(torch.nan)
        return
    polynomial = _by_eigenvalues if _few_threads() else _by_products
    q = polynomial(gram, steps, coefficients)
    q *= scale
    if not torch_multiplies_bf16():
        product = q @ wide
        result.copy_(product.t() if tall else product)
        return
    rounded = q.bfloat16()
    # Where singular values are small, q is nearly a multiple of the identity: what rounding takes
    # from its diagonal would all go in one direction. The rest averages out over m elements.
    lost = (q.diagonal() - rounded.diagonal()).bfloat16()
    if tall:
        torch.mm(x, rounded, out=result).addcmul_(x, lost)
    else:
        torch.mm(rounded, x, out=result).addcmul_(x, lost[:, None])


def _by_eigenvalues(gram: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    a, b, c = coefficients
    values, vectors = torch.linalg.eigh(gram)
    values = values.double().clamp(min=0)
    factors = torch.ones_like(values)
    for _ in range(steps):
        p = a + values * (b + values * c)
        factors *= p
        values *= p * p
    return _symmetric_product(vectors * factors.float(), vectors.t(), gram)


def _by_products(gram: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    a, b, c = coefficients
    p, q, t = (torch.empty_like(gram) for _ in range(3))
    for step in range(steps):
        _symmetric_product(gram, gram, p, gram, (b, c)).diagonal().add_(a)
        if step == 0:
            q.copy_(p)
        else:
            q, t = _symmetric_product(q, p, t), q
        if step < steps - 1:
            _symmetric_product(gram, p, t)
            _symmetric_product(t, p, gram)
    return q


def _direct(
    x: Tensor, result: Tensor, steps: int, coefficients: Sequence[float], eps: float
) -> None:
    """Writes one matrix's result by the published loop."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    y = (x.t() if tall else x).to(torch.float32, memory_format=torch.contiguous_format)
    m = y.shape[0]
    y = y / torch.linalg.matrix_norm(y).clamp(min=eps)
    # float16 products are slow on all CPUs
    if x.dtype == torch.bfloat16 and m >= SMALL and torch_multiplies_bf16():
        y = y.bfloat16()
    gram, p = (torch.empty(m, m, dtype=y.dtype) for _ in range(2))
    other = torch.empty_like(y)
    for _ in range(steps):
        _symmetric_product(y, y.t(), gram)
        _symmetric_product(gram, gram, p, gram, (b, c))
        other, y = y, torch.addmm(y, p, y, beta=a, out=other)
    result.copy_(y.t() if tall else y)
