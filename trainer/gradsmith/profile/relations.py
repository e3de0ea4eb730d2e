"""How columns go together, in plain numpy. Letters: s rows, p columns.

Missing values are NaN or the code -1; of two columns the rows count that have both.
"""

from __future__ import annotations

import numpy as np

FOLDS = 5


def pearson(values: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each two columns of float64 (s, p): (p, p).

    r = Σ(x - x̄)(y - ȳ) / sqrt(Σ(x - x̄)² Σ(y - ȳ)²), over the rows that have both, as pandas has
    it; NaN where a column does not vary there.
    """
    there = ~np.isnan(values)
    scale = np.nanmax(np.abs(values), axis=0, initial=0.0)
    x = np.where(there, values, 0.0) / np.where(scale > 0, scale, 1.0)
    m = there.astype(np.float64)
    x -= m * (x.sum(0) / np.maximum(m.sum(0), 1))  # near zero, so that little cancels below
    n, of_x, of_xx = m.T @ m, x.T @ m, (x * x).T @ m
    with np.errstate(divide="ignore", invalid="ignore"):
        shared = x.T @ x - of_x * of_x.T / n
        spread = of_xx - of_x**2 / n
        spread = np.where(spread > 1e-12 * of_xx, spread, 0.0)  # of a constant: rounding alone
        found = shared / np.sqrt(spread * spread.T)
    return np.where(np.isfinite(found), np.clip(found, -1, 1), np.nan)


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])


def spearman(values: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks, ranked anew among the rows that two columns have."""
    there = ~np.isnan(values)
    whole = there.all(0)
    found = np.full((values.shape[1],) * 2, np.nan)
    full = np.flatnonzero(whole)
    if len(full):
        found[np.ix_(full, full)] = pearson(np.stack([ranks(values[:, j]) for j in full], 1))
    for i in range(values.shape[1]):
        for j in range(i, values.shape[1]):
            if whole[i] and whole[j]:
                continue
            both = there[:, i] & there[:, j]
            pair = np.stack([ranks(values[both, k]) for k in (i, j)], 1)
            found[i, j] = found[j, i] = pearson(pair)[0, 1]
    return found


def crossed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How often each two codes meet, float64; empty rows and columns are left out."""
    both = (a >= 0) & (b >= 0)
    _, x = np.unique(a[both], return_inverse=True)
    _, y = np.unique(b[both], return_inverse=True)
    shape = (x.max(initial=-1) + 1, y.max(initial=-1) + 1)
    size = int(shape[0] * shape[1])
    return np.bincount(x * shape[1] + y, minlength=size).reshape(shape).astype(np.float64)


def cramers_v(a: np.ndarray, b: np.ndarray) -> float:
    """V = sqrt(χ² / (n·(min(rows, columns) - 1))), without a correction for bias (Cramér 1946)."""
    table = crossed(a, b)
    if min(table.shape) < 2:
        return float("nan")
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    chi2 = ((table - expected) ** 2 / expected).sum()
    return float(np.sqrt(min(chi2 / table.sum() / (min(table.shape) - 1), 1.0)))


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """I(a; b) = Σ p(a, b) ln(p(a, b) / (p(a) p(b))), in nats, of codes."""
    table = crossed(a, b)
    if not table.size:
        return 0.0
    p = table / table.sum()
    outer = p.sum(1, keepdims=True) * p.sum(0)
    some = p > 0
    return max(float((p[some] * np.log(p[some] / outer[some])).sum()), 0.0)


def bins(values: np.ndarray, most: int) -> np.ndarray:
    """Numbers as codes: a value each where there are few, else between quantiles; -1 is NaN."""
    there = ~np.isnan(values)
    known = values[there]
    edges = np.unique(known)
    if len(edges) > most:
        edges = np.unique(np.quantile(known, np.linspace(0, 1, most + 1)))[:-1]
    codes = np.full(len(values), -1)
    codes[there] = np.searchsorted(edges, known, "right") - 1
    return codes


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """P(score of a positive row > score of another), ties count half; NaN with one kind alone."""
    n = int(positive.sum())
    others = len(positive) - n
    if not n or not others:
        return float("nan")
    return float((ranks(scores)[positive].sum() - n * (n + 1) / 2) / (n * others))


def class_score(codes: np.ndarray, classes: np.ndarray, folds: np.ndarray) -> float:
    """ROC-AUC of one feature alone, cross-fitted; of more than two classes their mean, each
    against the others.

    A row's score for a class is the class's share among the rows of the other folds that have the
    same code, with one row of the whole table's share mixed in.

    Args:
        codes: int (s,); a code of its own for what is missing.
        classes: int (s,), from 0.
        folds: int (s,), below FOLDS.
    """
    size, count = int(codes.max()) + 1, int(classes.max()) + 1
    rows = np.bincount(folds * size + codes, minlength=FOLDS * size).reshape(FOLDS, size)
    others = (rows.sum(0) - rows)[folds, codes]
    found = []
    for label in range(1, 2) if count == 2 else range(count):
        own = classes == label
        hits = np.bincount(folds * size + codes, own, FOLDS * size).reshape(FOLDS, size)
        scores = ((hits.sum(0) - hits)[folds, codes] + own.mean()) / (others + 1)
        found.append(auc(scores, own))
    known = [value for value in found if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def number_score(
    codes: np.ndarray, values: np.ndarray | None, target: np.ndarray, folds: np.ndarray
) -> float:
    """R² of one feature alone, cross-fitted: 1 - Σ(y - ŷ)² / Σ(y - ȳ)².

    ŷ is the mean of the rows of the other folds that have the same code; of a number a straight
    line as well, and the better of the two counts.
    """
    size = int(codes.max()) + 1
    place = folds * size + codes
    rows = np.bincount(place, minlength=FOLDS * size).reshape(FOLDS, size)
    sums = np.bincount(place, target, FOLDS * size).reshape(FOLDS, size)
    mean = target.mean()
    guess = ((sums.sum(0) - sums)[folds, codes] + mean) / ((rows.sum(0) - rows)[folds, codes] + 1)
    errors = [((target - guess) ** 2).sum()]
    if values is not None:
        line = np.full(len(target), mean)
        known = ~np.isnan(values)
        for fold in range(FOLDS):
            fit, own = known & (folds != fold), known & (folds == fold)
            x, y = values[fit], target[fit]
            spread = ((x - x.mean()) ** 2).sum() if len(x) else 0.0
            if spread > 0:
                slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
                line[own] = y.mean() + slope * (values[own] - x.mean())
        errors.append(((target - line) ** 2).sum())
    whole = ((target - mean) ** 2).sum()
    return float(1 - min(errors) / whole) if whole > 0 else float("nan")
