"""What a table learns of several features at once: imputation, interactions, selection, components.

Each stage takes the numeric features that the columns became, and gives others. A row's result
depends on that row alone, to the last bit: sums run along a row, not through a matrix product
whose order follows the number of rows.

Letters: k rows of a chunk, n features, d donors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import UserError, did_you_mean
from .table_steps import Scaler

Numbers = dict[str, np.ndarray]
Chunks = Callable[[], Iterator[Numbers]]

DONORS = 2_000  # training rows that knn looks among
NEIGHBOURS = 5
SAMPLE = 50_000  # training rows for iterative imputation and mutual information
ROUNDS = 10
RIDGE = 1e-3


class Stage(Protocol):
    """A step over all numeric features; its fields are plain data."""

    def apply(self, numbers: Numbers) -> Numbers: ...


def matrix(numbers: Numbers, names: list[str]) -> np.ndarray:
    """float64 (k, n)."""
    return np.stack([numbers[name] for name in names], axis=1)


def sample(chunks: Chunks, rows: int) -> Numbers:
    """The first rows of the training split, in the order of the sources."""
    found: list[Numbers] = []
    left = rows
    for numbers in chunks():
        found.append({name: values[:left] for name, values in numbers.items()})
        left -= len(next(iter(found[-1].values()), ()))
        if left <= 0:
            break
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


# ------------------------------------------------------------------------------------ missing


@dataclass
class Nearest:
    """The mean of the nearest training rows that have the value, as scikit-learn's KNNImputer:
    their distance is over the features that both have, scaled up to all n."""

    names: list[str]
    donors: list[list[float | None]]

    @classmethod
    def fit(cls, chunks: Chunks) -> Nearest:
        found = sample(chunks, DONORS)
        donors = matrix(found, list(found))
        shown = [[None if np.isnan(x) else float(x) for x in row] for row in donors]
        return cls(list(found), shown)

    def apply(self, numbers: Numbers) -> Numbers:
        values = matrix(numbers, self.names)
        gaps = np.flatnonzero(np.isnan(values).any(axis=1))
        if len(gaps) == 0:
            return numbers
        donors = np.array(self.donors, np.float64)
        there = ~np.isnan(donors)
        means = np.array([_mean(donors[:, place]) for place in range(donors.shape[1])])
        for row in gaps:
            one = values[row]
            both = there & ~np.isnan(one)
            count = both.sum(axis=1)
            apart = np.where(both, donors - np.nan_to_num(one), 0.0)
            squares = (apart * apart).sum(axis=1) * len(one) / np.maximum(count, 1)
            squares[count == 0] = np.inf
            order = np.argsort(squares, kind="stable")
            for place in np.flatnonzero(np.isnan(one)):
                near = order[there[order, place] & np.isfinite(squares[order])][:NEIGHBOURS]
                values[row, place] = donors[near, place].mean() if len(near) else means[place]
        return dict(zip(self.names, values.T, strict=True))


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else 0.0


@dataclass
class Chained:
    """Each feature by ridge regression on all others, in rounds (van Buuren's chained equations):
    weights[i] has 0 at i, and a gap starts from its feature's mean."""

    names: list[str]
    means: list[float]
    weights: list[list[float]]
    intercepts: list[float]

    @classmethod
    def fit(cls, chunks: Chunks) -> Chained:
        found = sample(chunks, SAMPLE)
        values = matrix(found, names := list(found))
        gaps, n = np.isnan(values), len(names)
        means = [_mean(values[:, place]) for place in range(n)]
        whole = np.where(gaps, means, values)
        weights, intercepts = np.zeros((n, n)), np.array(means)
        for _ in range(ROUNDS):
            for place in range(n):
                known = ~gaps[:, place]
                if not known.any():
                    continue
                others = np.delete(np.arange(n), place)
                x, y = whole[known][:, others], whole[known, place]
                x_mean, y_mean = x.mean(axis=0), y.mean()
                square = (x - x_mean).T @ (x - x_mean)
                square[np.diag_indices(n - 1)] += RIDGE * len(y)
                weights[place, others] = np.linalg.solve(square, (x - x_mean).T @ (y - y_mean))
                intercepts[place] = y_mean - weights[place, others] @ x_mean
                if not known.all():
                    guess = whole[~known] @ weights[place] + intercepts[place]
                    whole[~known, place] = guess
        return cls(names, means, weights.tolist(), intercepts.tolist())

    def apply(self, numbers: Numbers) -> Numbers:
        values = matrix(numbers, self.names)
        gaps = np.isnan(values)
        rows = np.flatnonzero(gaps.any(axis=1))
        if len(rows) == 0:
            return numbers
        some, missing = values[rows], gaps[rows]
        some = np.where(missing, self.means, some)
        weights = np.array(self.weights)
        for _ in range(ROUNDS):
            for place in np.flatnonzero(missing.any(axis=0)):
                guess = (some * weights[place]).sum(axis=1) + self.intercepts[place]
                some[:, place] = np.where(missing[:, place], guess, some[:, place])
        values[rows] = some
        return dict(zip(self.names, values.T, strict=True))


# ------------------------------------------------------------------- interactions, selection, PCA


@dataclass
class Products:
    """The product of two scaled features, scaled again."""

    pairs: list[list[str]]
    scalers: list[dict[str, Any]]

    @classmethod
    def fit(cls, chunks: Chunks, pairs: list[list[str]], how: str) -> Products:
        """
        Raises:
            UserError: one of a pair is no numeric feature.
        """
        names = list(next(iter(chunks())))
        for one in (name for pair in pairs for name in pair):
            if one not in names:
                raise UserError(
                    f'data.features.interactions: "{one}" is no numeric feature; there are '
                    f"{', '.join(names[:20])}.{did_you_mean(one, names)}"
                )
        scalers = []
        for first, second in pairs:
            whole = np.concatenate([part[first] * part[second] for part in chunks()])
            scalers.append(vars(Scaler.fit(whole, how)))
        return cls(pairs, scalers)

    def apply(self, numbers: Numbers) -> Numbers:
        found = dict(numbers)
        for (first, second), scaler in zip(self.pairs, self.scalers, strict=True):
            found[f"{first} * {second}"] = Scaler(**scaler).apply(numbers[first] * numbers[second])
        return found


@dataclass
class Selection:
    """The features that are kept; `scores` are of all that there were."""

    kept: list[str]
    scores: dict[str, float]

    def apply(self, numbers: Numbers) -> Numbers:
        return {name: numbers[name] for name in self.kept}


def select(
    chunks: Chunks,
    categories: dict[str, np.ndarray],
    target: np.ndarray,
    problem: str,
    settings: Any,
) -> tuple[Selection, list[str]]:
    """Which numeric features and which categories are worth keeping.

    variance: of a numeric feature stretched to [0, 1]; categories stay. mutual_information: with
    the target, by scikit-learn, over the first `SAMPLE` rows.

    Args:
        chunks: the numeric features of the training split.
        categories: int32 (rows,), of the sample's rows.
        target: of those rows.
        problem: classification or regression.
        settings: the recipe's data.features.select.
    """
    if settings.by == "variance":
        scores = _variances(chunks)
    else:
        found = sample(chunks, SAMPLE)
        rows = len(target)
        columns = [*(v[:rows] for v in found.values()), *categories.values()]
        try:
            from sklearn.feature_selection import mutual_info_classif, mutual_info_regression
        except ImportError:
            raise UserError(
                "data.features.select: mutual_information needs scikit-learn: "
                "pip install 'gradsmith[table]'"
            ) from None
        score = mutual_info_classif if problem == "classification" else mutual_info_regression
        discrete = [len(np.unique(column)) <= 2 for column in found.values()]
        discrete += [True] * len(categories)
        names = [*found, *categories]
        values = score(np.stack(columns, 1), target, discrete_features=discrete, random_state=0)
        scores = dict(zip(names, map(float, values), strict=True))
    best = sorted(scores, key=lambda name: -scores[name])
    if settings.keep is not None:
        kept = set(best[: settings.keep])
    else:
        kept = {name for name in best if scores[name] > settings.above}
    numeric = [name for name in scores if name in kept and name not in categories]
    others = [name for name in categories if name in kept or name not in scores]
    if not numeric and not others:
        first = ", ".join(f"{name} {scores[name]:.3g}" for name in best[:5])
        raise UserError(
            f"data.features.select.above: no feature scores above {settings.above}; the best are "
            f"{first}"
        )
    return Selection(numeric, scores), others


def _variances(chunks: Chunks) -> dict[str, float]:
    found = {}
    for name in next(iter(chunks())):
        values = np.concatenate([part[name] for part in chunks()])
        reach = np.ptp(values)
        found[name] = float((values / reach).var()) if reach else 0.0
    return found


@dataclass
class Components:
    """The features' principal components, as scikit-learn's PCA: (x - mean) · component, largest
    variance first; each component's largest weight is positive.

    Attributes:
        components: (components, n).
        variance: what each has of the whole variance.
    """

    names: list[str]
    mean: list[float]
    components: list[list[float]]
    variance: list[float]

    @classmethod
    def fit(cls, chunks: Chunks, count: int) -> Components:
        """
        Raises:
            UserError: there are fewer features than components.
        """
        names = list(next(iter(chunks())))
        n = len(names)
        if count > n:
            raise UserError(f"data.features.pca: {count} components of {n} numeric features")
        sums, rows = np.zeros(n), 0
        for part in chunks():
            values = matrix(part, names)
            sums, rows = sums + values.sum(axis=0), rows + len(values)
        mean, square = sums / rows, np.zeros((n, n))
        for part in chunks():
            values = matrix(part, names) - mean
            square += values.T @ values
        variance, vectors = np.linalg.eigh(square / max(1, rows - 1))
        order = np.argsort(variance)[::-1][:count]
        found = vectors[:, order].T
        signs = np.sign(found[np.arange(count), np.abs(found).argmax(axis=1)])
        found = found * signs[:, None]
        shares = variance[order] / max(variance.sum(), 1e-300)
        return cls(names, mean.tolist(), found.tolist(), shares.tolist())

    def apply(self, numbers: Numbers) -> Numbers:
        values = matrix(numbers, self.names) - np.array(self.mean)
        return {
            f"component {place + 1}": (values * np.array(component)).sum(axis=1)
            for place, component in enumerate(self.components)
        }


STAGES: dict[str, Callable[..., Stage]] = {
    "nearest": Nearest,
    "chained": Chained,
    "products": Products,
    "selection": Selection,
    "components": Components,
}


# ----------------------------------------------------------------------------------- outliers


def isolation_forest(chunks: Chunks) -> Callable[[Numbers], np.ndarray]:
    """scikit-learn's isolation forest over the training split; says which rows are outliers."""
    try:
        from sklearn.ensemble import IsolationForest
    except ImportError:
        raise UserError(
            "data.clean.outliers: isolation_forest needs scikit-learn: "
            "pip install 'gradsmith[table]'"
        ) from None
    found = sample(chunks, SAMPLE)
    names = list(found)
    forest = IsolationForest(random_state=0).fit(np.nan_to_num(matrix(found, names)))

    def outliers(numbers: Numbers) -> np.ndarray:
        judged: np.ndarray = forest.predict(np.nan_to_num(matrix(numbers, names))) < 0
        return judged

    return outliers
