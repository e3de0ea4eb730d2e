"""Metrics of classification and regression as functions of sums that add.

Each object turns a batch's outputs into one float64 vector. Vectors add over batches, ranks,
splits and folds, and `summarize` turns the total into numbers: the same, in whatever pieces it
was counted. Letters: B examples, C classes, M the length of the vector, w an example's weight.
An example of weight 0 counts for nothing, whatever its target is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..blocks import Metric

MOST_CLASSES = 200  # above, the confusion matrix is kept as three counts a class
CALIBRATION_BINS = 15
LOGIT_RANGE = 20.0  # scores beyond count as the outermost ones: p = 2e-9

CLASSIFICATION_METRICS = (
    Metric("loss", "Loss", "nats per example"),
    Metric("accuracy", "Accuracy", "", True, ".1%"),
    Metric("top5_accuracy", "Top-5 accuracy", "", True, ".1%"),
    Metric("balanced_accuracy", "Balanced accuracy", "mean recall of the classes", True, ".1%"),
    Metric("f1_macro", "F1", "mean of the classes", True, ".3f"),
    Metric("precision_macro", "Precision", "mean of the classes", True, ".3f"),
    Metric("recall_macro", "Recall", "mean of the classes", True, ".3f"),
    Metric("f1_micro", "F1, micro", "of all examples", True, ".3f"),
    Metric("roc_auc", "ROC-AUC", "", True, ".3f"),
    Metric("pr_auc", "PR-AUC", "average precision", True, ".3f"),
    Metric("brier", "Brier score", "", False, ".4f"),
    Metric("calibration_error", "Calibration error", "expected", False, ".1%"),
)
"""What `ClassificationSums.summarize` returns, named."""

REGRESSION_METRICS = (
    Metric("rmse", "RMSE", "in the target's unit", False, ".4g"),
    Metric("mae", "MAE", "in the target's unit", False, ".4g"),
    Metric("r2", "R\u00b2", "share of the variance", True, ".3f"),
)
"""What `RegressionSums.summarize` returns, named; `coverage_...` stand beside them."""


class ClassificationSums:
    """The sums of one label among C.

        loss     = Σ w·(-log p[y]) / Σ w                      log loss, nats
        brier    = Σ w·Σ_c (p[c] - [c = y])² / Σ w            halved for two classes
        roc_auc  = P(score of an example of the class > score of another), ties count half
        pr_auc   = Σ_i (R_i - R_(i-1))·P_i                    average precision, from the top score

    Both areas are those of each class against the rest, averaged over the classes that have both;
    for two classes that of class 1. They come from histograms of log(p / (1 - p)), so scores in
    one bin are ties: exact to the bin. Macro averages are over the classes that occur among
    targets or predictions; balanced accuracy over those among the targets. All as in scikit-learn.

    Args:
        classes: C, at least 2.
        bins: of a class's histogram, between -20 and 20; by default 1000, and above 20 classes
            20,000 / C, so that the sums stay small. Not kept above `MOST_CLASSES` classes.
    """

    def __init__(self, classes: int, bins: int | None = None):
        if classes < 2:
            raise ValueError(f"classes: found {classes}; a classification has at least 2")
        self.classes = classes
        self.bins = bins or min(1000, 20_000 // classes)
        self.whole = classes <= MOST_CLASSES  # whether every pair of classes is counted
        self.scored = (1 if classes == 2 else classes) if self.whole else 0
        self._sizes = {
            "totals": 5,  # weight, nll, brier, correct, in the top 5
            "confusion": classes * classes if self.whole else 3 * classes,
            "calibration": 3 * CALIBRATION_BINS,
            "scores": 2 * self.scored * self.bins,
        }

    @property
    def size(self) -> int:
        """M"""
        return sum(self._sizes.values())

    @torch.no_grad()
    def sums(
        self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sums of a batch.

        Args:
            logits: (B, C), any floating dtype and device.
            target: int64 (B,), from 0 to C - 1.
            weight: (B,), at least 0; None is 1 each.

        Returns:
            float64 (M,) on the CPU.

        Raises:
            ValueError: shapes that do not fit, or a target that is no class.
        """
        count, classes = logits.shape[0], self.classes
        weight = torch.ones(count) if weight is None else weight
        if logits.shape != (count, classes) or not target.shape == weight.shape == (count,):
            raise ValueError(
                f"logits {tuple(logits.shape)}, target {tuple(target.shape)}, weight "
                f"{tuple(weight.shape)}: allowed are (B, {classes}), (B,) and (B,)"
            )
        logits, target, weight = logits.double().cpu(), target.cpu(), weight.double().cpu()
        counted = weight > 0
        logits, target, weight = logits[counted], target[counted], weight[counted]
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise ValueError(
                f"target: found {int(target.min())} to {int(target.max())}; allowed are 0 to "
                f"{classes - 1}"
            )
        logp = torch.log_softmax(logits, dim=-1)
        p = logp.exp()
        found = logits.argmax(dim=-1)
        correct = (found == target).double()
        of_target = logp.gather(1, target[:, None])
        ahead = (logp > of_target).sum(dim=1)
        squared = ((p - torch.nn.functional.one_hot(target, classes)) ** 2).sum(dim=1)
        brier = squared / 2 if classes == 2 else squared
        per_example = [torch.ones_like(weight), -of_target[:, 0], brier, correct, ahead < 5]
        totals = torch.stack([(weight * value).sum() for value in per_example])

        if self.whole:
            confusion = _histogram(target * classes + found, weight, classes * classes)
        else:
            counts = [(target, weight), (found, weight), (target, weight * correct)]
            confusion = torch.cat([_histogram(index, w, classes) for index, w in counts])

        confidence = p.max(dim=-1).values
        place = _bin(confidence, 0.0, 1.0, CALIBRATION_BINS)
        calibration = torch.cat(
            [
                _histogram(place, w, CALIBRATION_BINS)
                for w in (weight, weight * confidence, weight * correct)
            ]
        )
        return torch.cat([totals, confusion, calibration, self._scores(logp, target, weight)])

    def _scores(
        self, logp: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """(scored, 2, bins) as a vector: of each class, its own examples and the others."""
        if not self.scored:
            return torch.zeros(0, dtype=torch.float64)
        which = torch.tensor([1]) if self.classes == 2 else torch.arange(self.classes)
        logp = logp[:, which]
        place = _bin(logp - torch.log(-torch.expm1(logp)), -LOGIT_RANGE, LOGIT_RANGE, self.bins)
        other = (target[:, None] != which).long()
        row = torch.arange(self.scored) * 2 + other
        index = row * self.bins + place
        weights = weight[:, None].expand_as(index)
        return _histogram(index.flatten(), weights.flatten(), 2 * self.scored * self.bins)

    def _parts(self, sums: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = torch.split(sums, list(self._sizes.values()))
        return dict(zip(self._sizes, parts, strict=True))

    def summarize(self, sums: torch.Tensor) -> dict[str, float]:
        """The metrics that follow from the sums; NaN where nothing was counted.

        Returns:
            the names of `CLASSIFICATION_METRICS`; without top5_accuracy up to 5 classes, and
            without the areas above `MOST_CLASSES`. `examples` is the sum of the weights.
        """
        totals = self._parts(sums)["totals"]
        weight, nll, brier, correct, top5 = totals.tolist()
        support, predicted, hits = self._counts(sums)
        recall, precision = _ratio(hits, support), _ratio(hits, predicted)
        f1 = _ratio(2 * hits, support + predicted)
        seen = (support + predicted) > 0
        bins = self.reliability(sums)
        share = 1 / weight if weight else math.nan
        values = {
            "loss": nll * share,
            "accuracy": correct * share,
            "top5_accuracy": top5 * share,
            "balanced_accuracy": _mean(recall[support > 0]),
            "precision_macro": _mean(precision[seen]),
            "recall_macro": _mean(recall[seen]),
            "f1_macro": _mean(f1[seen]),
            "f1_micro": correct * share,  # and so are precision and recall: one label each
            "brier": brier * share,
            "calibration_error": sum(abs(c - a) * w for c, a, w in bins) * share,
            "examples": weight,
        }
        if self.classes <= 5:
            del values["top5_accuracy"]
        if self.scored:
            areas = [self.areas(sums, row) for row in range(self.scored)]
            known = torch.tensor([pair for pair in areas if pair], dtype=torch.float64)
            for column, name in enumerate(("roc_auc", "pr_auc")):
                values[name] = _mean(known[:, column]) if len(known) else math.nan
        return values

    def _counts(self, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each class (C,): its examples, how often it was predicted, how often rightly."""
        part = self._parts(sums)["confusion"]
        if not self.whole:
            support, predicted, hits = part.view(3, self.classes)
            return support, predicted, hits
        matrix = part.view(self.classes, self.classes)
        return matrix.sum(dim=1), matrix.sum(dim=0), matrix.diagonal()

    def per_class(self, sums: torch.Tensor) -> list[dict[str, float]]:
        """precision, recall, f1, support and hits of each class; 0 where there is none of it."""
        support, predicted, hits = self._counts(sums)
        columns = {
            "precision": _ratio(hits, predicted),
            "recall": _ratio(hits, support),
            "f1": _ratio(2 * hits, support + predicted),
            "support": support,
            "hits": hits,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def confusion(self, sums: torch.Tensor) -> torch.Tensor | None:
        """float64 (C, C): the weight of class i taken for class j; None above `MOST_CLASSES`."""
        part = self._parts(sums)["confusion"]
        return part.view(self.classes, self.classes) if self.whole else None

    def reliability(self, sums: torch.Tensor) -> list[tuple[float, float, float]]:
        """(mean confidence, accuracy, weight) of each bin of confidence that holds examples."""
        weight, confidence, correct = self._parts(sums)["calibration"].view(3, -1).tolist()
        rows = zip(weight, confidence, correct, strict=True)
        return [(c / w, hit / w, w) for w, c, hit in rows if w > 0]

    def curve(self, sums: torch.Tensor, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the class's own examples and of the others that score at least as high as
        each bin: float64 (bins,) each, from the highest bin down."""
        own, other = self._parts(sums)["scores"].view(self.scored, 2, self.bins)[row]
        return own.flip(0).cumsum(0), other.flip(0).cumsum(0)

    def areas(self, sums: torch.Tensor, row: int = 0) -> tuple[float, float] | None:
        """(ROC-AUC, average precision) of a class against the rest; None where one side is
        empty."""
        own, other = self.curve(sums, row)
        if not (own[-1] > 0 and other[-1] > 0):
            return None
        zero = torch.zeros(1, dtype=torch.float64)
        roc = torch.trapezoid(torch.cat([zero, own]), torch.cat([zero, other]))
        steps = torch.diff(own, prepend=zero)
        precision = _ratio(own, own + other)
        roc_auc = float(roc / (own[-1] * other[-1]))
        return roc_auc, float((steps * precision).sum() / own[-1])


class RegressionSums:
    """The sums of one number.

        mae  = Σ w·|ŷ - y| / Σ w,    rmse = sqrt(Σ w·(ŷ - y)² / Σ w)
        r2   = 1 - Σ w·(ŷ - y)² / Σ w·(y - ȳ)²
        coverage_10 = Σ w·[y ≤ q̂] / Σ w    for the quantile 0.1: 0.1 where q̂ is right

    Args:
        quantiles: what the columns of the outputs stand for, rising; the one nearest to 0.5 is
            the prediction ŷ. () is one column, the prediction.
        center: a number near the mean of the targets, such as that of the training split: Σ y² of
            large numbers that lie close together would lose what R² is about.
        scale: the targets' deviation, likewise; residuals are counted in bins of a tenth of it,
            and predictions in bins of a fifth.
    """

    RESIDUAL_BINS = 60
    PREDICTION_BINS = 30
    RESIDUAL_RANGE = 3.0  # times the scale, on both sides; beyond are the outermost bins

    def __init__(self, quantiles: Sequence[float] = (), center: float = 0.0, scale: float = 1.0):
        if any(not 0 < q < 1 for q in quantiles) or list(quantiles) != sorted(set(quantiles)):
            raise ValueError(f"quantiles: found {quantiles}; allowed are rising ones, 0 < q < 1")
        self.quantiles, self.center, self.scale = tuple(quantiles), center, scale
        distances = [abs(q - 0.5) for q in quantiles]
        self.point = distances.index(min(distances)) if distances else 0

    @property
    def size(self) -> int:
        """M"""
        return 5 + len(self.quantiles) + 4 * self.PREDICTION_BINS + self.RESIDUAL_BINS

    @torch.no_grad()
    def sums(
        self, outputs: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sums of a batch.

        Args:
            outputs: (B,), (B, 1), or with quantiles (B, Q), in the target's unit.
            target: (B,).
            weight: (B,), at least 0; None is 1 each.

        Returns:
            float64 (M,) on the CPU.

        Raises:
            ValueError: shapes that do not fit.
        """
        count, columns = len(target), max(1, len(self.quantiles))
        weight = torch.ones(count) if weight is None else weight
        shapes = ((count, columns), (count,)) if columns == 1 else ((count, columns),)
        if outputs.shape not in shapes or not target.shape == weight.shape == (count,):
            raise ValueError(
                f"outputs {tuple(outputs.shape)}, target {tuple(target.shape)}, weight "
                f"{tuple(weight.shape)}: allowed are (B, {columns}), (B,) and (B,)"
            )
        outputs = outputs.double().cpu().reshape(count, columns)
        target, weight = target.double().cpu(), weight.double().cpu()
        counted = weight > 0
        outputs, target, weight = outputs[counted], target[counted], weight[counted]
        residual, centered = outputs[:, self.point] - target, target - self.center
        values = [torch.ones_like(weight), residual.abs(), residual**2, centered, centered**2]
        if self.quantiles:
            values += (target[:, None] <= outputs).double().unbind(1)
        totals = torch.stack([(weight * value).sum() for value in values])
        reach = self.RESIDUAL_RANGE * (self.scale or 1.0)
        predicted = outputs[:, self.point] - self.center
        place = _bin(predicted, -reach, reach, self.PREDICTION_BINS)
        by_prediction = [
            _histogram(place, weight * value, self.PREDICTION_BINS)
            for value in (torch.ones_like(weight), predicted, residual, residual**2)
        ]
        place = _bin(residual, -reach, reach, self.RESIDUAL_BINS)
        residuals = _histogram(place, weight, self.RESIDUAL_BINS)
        return torch.cat([totals, *by_prediction, residuals])

    def summarize(self, sums: torch.Tensor) -> dict[str, float]:
        """The metrics that follow from the sums; NaN where nothing was counted.

        Returns:
            rmse, mae, r2 (0 where the targets are all the same and missed, 1 where they are met),
            `coverage_10` for the quantile 0.1, and `examples`, the sum of the weights.
        """
        weight, absolute, squared, centered, centered2 = sums[:5].tolist()
        share = 1 / weight if weight else math.nan
        variance = max(centered2 - centered * centered * share, 0.0) if weight else math.nan
        # Below, what is left of the variance is rounding.
        flat = variance <= 1e-14 * centered2
        r2 = (0.0 if squared else 1.0) if flat else 1 - squared / variance
        values = {
            "rmse": math.sqrt(squared * share) if weight else math.nan,
            "mae": absolute * share,
            "r2": r2 if weight else math.nan,
        }
        for quantile, below in zip(self.quantiles, sums[5:].tolist(), strict=False):
            values[f"coverage_{100 * quantile:g}"] = below * share
        return values | {"examples": weight}

    def by_prediction(self, sums: torch.Tensor) -> list[tuple[float, float, float, float]]:
        """(mean prediction, mean residual, the residuals' deviation around it, weight) of each
        bin of predictions that holds examples."""
        parts = sums[-self.RESIDUAL_BINS - 4 * self.PREDICTION_BINS : -self.RESIDUAL_BINS]
        rows = []
        for weight, predicted, residual, squared in parts.view(4, -1).T.tolist():
            if weight > 0:
                mean = residual / weight
                deviation = math.sqrt(max(squared / weight - mean * mean, 0.0))
                rows.append((predicted / weight + self.center, mean, deviation, weight))
        return rows

    def residuals(self, sums: torch.Tensor) -> list[tuple[float, float]]:
        """(prediction minus target at the middle of a bin, share of the weight in it)."""
        counts = sums[-self.RESIDUAL_BINS :]
        width = 2 * self.RESIDUAL_RANGE * (self.scale or 1.0) / self.RESIDUAL_BINS
        first = -self.RESIDUAL_RANGE * (self.scale or 1.0) + width / 2
        shares = (counts / counts.sum().clamp(min=1e-300)).tolist()
        return [(first + i * width, share) for i, share in enumerate(shares)]


def wilson_interval(hits: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Where a share lies of which `hits` of `count` were seen, at 95 % by default.

    (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)        Wilson 1927
    """
    if count <= 0:
        return 0.0, 1.0
    p = hits / count
    middle, square = p + z * z / (2 * count), z * z / count
    reach = z * math.sqrt(max(p * (1 - p), 0.0) / count + square / (4 * count))
    return max(0.0, (middle - reach) / (1 + square)), min(1.0, (middle + reach) / (1 + square))


def _bin(values: torch.Tensor, low: float, high: float, bins: int) -> torch.Tensor:
    """int64: which of `bins` equal parts of [low, high] a value is in; beyond, the outermost."""
    share = torch.nan_to_num((values - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    return (share.clamp(0, 1) * bins).long().clamp(0, bins - 1)


def _histogram(index: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
    """float64 (size,): the weight at each index."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, index, weight)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """part / whole, 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.clamp(min=1e-300), torch.zeros_like(part))


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan
