"""What simple models reach on the very same split and features, and which features ours needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..blocks import Bars, Metric
from ..data.loader import evaluation_batches
from ..data.processor import Batch, Dataset

ROWS = 200_000  # of a split that baselines are fitted on: more make them slow, and hardly better
BATCH = 4096
REPEATS, SHUFFLED, SHOWN = 5, 4000, 20  # of the permutation importance: times, rows, features


@dataclass(frozen=True)
class Rows:
    """Rows of a split: numbers (B, N), categories int64 (B, M), target and weight (B,)."""

    numbers: np.ndarray
    categories: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, most: int | None = None) -> Rows:
        """All rows, or `most` of them at equal distances."""
        count = len(dataset)
        chosen = np.arange(count)
        if most is not None and count > most:
            chosen = np.linspace(0, count - 1, most).astype(np.int64)
        batches = [dataset.batch(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
        columns = [
            torch.cat([getattr(b, part)[name] for b in batches]).numpy()
            for part, name in (("inputs", "numbers"), ("inputs", "categories"),
                               ("labels", "target"), ("labels", "weight"))
        ]  # fmt: skip
        return cls(*columns)


def fit_baselines(
    train: Rows, cardinalities: list[int], classify: bool
) -> dict[str, Callable[[Rows], np.ndarray]] | None:
    """A linear model and gradient boosting; None without scikit-learn.

    Returns:
        name -> what says of rows their classes' log-probabilities (B, C), or their targets (B, 1).
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.preprocessing import OneHotEncoder
    except ImportError:
        return None
    encoder = OneHotEncoder(
        categories=[np.arange(n) for n in cardinalities] or "auto", handle_unknown="ignore"
    )

    def flat(rows: Rows) -> Any:
        """Numbers, and categories as one column for each value."""
        from scipy.sparse import csr_matrix, hstack

        if not cardinalities:
            return rows.numbers
        return hstack([csr_matrix(rows.numbers), encoder.transform(rows.categories)]).tocsr()

    def side_by_side(rows: Rows) -> np.ndarray:
        return np.concatenate([rows.numbers, rows.categories], axis=1)

    count = train.numbers.shape[1]
    few = [count + i for i, values in enumerate(cardinalities) if values <= 255]  # its limit
    if cardinalities:
        encoder.fit(train.categories)
    linear: Any = LogisticRegression(max_iter=1000) if classify else Ridge()
    trees: Any = HistGradientBoostingClassifier if classify else HistGradientBoostingRegressor
    trees = trees(categorical_features=few or None, random_state=0)
    linear.fit(flat(train), train.target, sample_weight=train.weight)
    trees.fit(side_by_side(train), train.target, sample_weight=train.weight)

    def answers(model: Any, features: Callable[[Rows], Any]) -> Callable[[Rows], np.ndarray]:
        if classify:
            return lambda rows: np.log(np.maximum(model.predict_proba(features(rows)), 1e-12))
        return lambda rows: model.predict(features(rows))[:, None]

    return {
        "logistic regression" if classify else "linear regression": answers(linear, flat),
        "gradient boosting": answers(trees, side_by_side),
    }


@torch.no_grad()
def permutation_importance(
    measure: Callable[[Batch], dict[str, float]],
    dataset: Dataset,
    names: tuple[list[str], list[str]],
    metric: Metric,
) -> Bars:
    """How much worse the metric gets when a feature's values are shuffled among the rows.

    The intervals are of the mean of the shuffles at 95 %, by Student's t. Breiman 2001.

    Args:
        measure: the metrics of a batch.
        dataset: the held-out rows; of many some, spread evenly.
        names: of the numbers and of the categories.
        metric: which of the metrics.
    """
    (batch,) = evaluation_batches(
        dataset, rank=0, world=1, batch=min(len(dataset), SHUFFLED), limit=SHUFFLED
    )
    sign = 1 if metric.greater_is_better else -1
    before = measure(batch)[metric.name]
    generator = torch.Generator().manual_seed(0)
    bars: Bars = {
        "kind": "bars",
        "title": "Permutation importance",
        "note": f"By how much {metric.words} gets worse where a feature's values are shuffled "
        f"among {len(batch.labels['target']):,} rows: the mean of {REPEATS} shuffles, with its "
        "interval of 95 %.",
        "unit": metric.unit or metric.words,
        "format": metric.format,
        "bars": [],
    }
    for part, columns in zip(("numbers", "categories"), names, strict=True):
        whole = batch.inputs[part]
        for column, name in enumerate(columns):
            found = []
            for _ in range(REPEATS):
                shuffled = whole.clone()
                order = torch.randperm(len(whole), generator=generator)
                shuffled[:, column] = whole[order, column]
                inputs = {**batch.inputs, part: shuffled}
                after = measure(Batch(inputs, batch.labels))[metric.name]
                found.append(sign * (before - after))
            mean, reach = float(np.mean(found)), 2.776 * float(np.std(found, ddof=1))
            reach /= math.sqrt(REPEATS)  # 2.776: of 4 degrees of freedom
            bars["bars"].append(
                {"name": name, "value": mean, "low": mean - reach, "high": mean + reach}
            )
    ranked = sorted(bars["bars"], key=lambda bar: -bar["value"])
    if len(ranked) > SHOWN:
        bars["note"] += f" The {SHOWN} greatest of {len(ranked)} features."
    bars["bars"] = ranked[:SHOWN]
    return bars
