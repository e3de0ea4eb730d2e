"""Blocks that classification and regression share, from the sums of `tasks.metrics`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blocks import Bars, Block, Chart, Line, Matrix, Table
from .metrics import ClassificationSums, RegressionSums, wilson_interval

LEGIBLE = 50  # classes in a confusion matrix; of more, the most frequent mistakes are listed
LISTED = 20
POINTS = 100  # of a curve


def classification_blocks(
    counter: ClassificationSums, sums: torch.Tensor, names: Sequence[str]
) -> list[Block]:
    """What there is to see of a classification: mistakes, classes, confidence, and for two
    classes the curves.

    Args:
        counter, sums: what was counted.
        names: of the classes (C,).
    """
    blocks: list[Block | None] = [
        confusion_block(counter, sums, names),
        per_class_block(counter, sums, names),
        reliability_block(counter, sums),
    ]
    if counter.classes == 2:
        blocks += curve_blocks(counter, sums, names)
    return [block for block in blocks if block is not None]


def confusion_block(
    counter: ClassificationSums, sums: torch.Tensor, names: Sequence[str]
) -> Matrix | Table:
    """The confusion matrix; of many classes the pairs that are confused most, and of more than
    are counted in pairs the classes that are missed most."""
    confusion = counter.confusion(sums)
    if confusion is None:
        rows = sorted(
            zip(names, counter.per_class(sums), strict=True),
            key=lambda row: row[1]["hits"] - row[1]["support"],
        )
        return {
            "kind": "table",
            "title": "Classes with the most mistakes",
            "columns": [
                {"name": "Class"},
                {"name": "Examples", "format": ",.0f"},
                {"name": "Missed", "format": ",.0f"},
                {"name": "Recall", "format": ".1%"},
            ],
            "rows": [
                [name, of["support"], of["support"] - of["hits"], of["recall"]]
                for name, of in rows[:LISTED]
            ],
        }
    if len(names) <= LEGIBLE:
        return {
            "kind": "matrix",
            "title": "Confusion matrix",
            "note": "Examples by their class (rows) and by what was predicted (columns), shaded "
            "by the share of the row.",
            "rows": list(names),
            "columns": list(names),
            "row_title": "class",
            "column_title": "predicted",
            "values": confusion.tolist(),
        }
    mistakes = confusion.clone().fill_diagonal_(0)
    counts, places = mistakes.flatten().topk(LISTED)
    support = confusion.sum(dim=1)
    pairs = [(count, *divmod(place, len(names))) for count, place in
             zip(counts.tolist(), places.tolist(), strict=True) if count > 0]  # fmt: skip
    return {
        "kind": "table",
        "title": "Most frequent mistakes",
        "columns": [
            {"name": "Class"},
            {"name": "Taken for"},
            {"name": "Examples", "format": ",.0f"},
            {"name": "Of the class", "format": ".1%"},
        ],
        "rows": [[names[i], names[j], n, n / float(support[i])] for n, i, j in pairs],
    }


def per_class_block(
    counter: ClassificationSums, sums: torch.Tensor, names: Sequence[str]
) -> Bars | None:
    """Recall of each class with its interval; of many classes the lowest."""
    found = [(n, of) for n, of in zip(names, counter.per_class(sums), strict=True)
             if of["support"] > 0]  # fmt: skip
    if not found:
        return None
    title, note = "Recall of each class", "With the interval of 95 % (Wilson) and F1."
    if len(found) > LEGIBLE:
        found = sorted(found, key=lambda row: row[1]["recall"])[:LISTED]
        title = f"The {LISTED} classes of the lowest recall"
    bars: Bars = {
        "kind": "bars", "title": title, "note": note, "unit": "recall", "format": ".1%", "bars": []
    }  # fmt: skip
    for name, of in found:
        low, high = wilson_interval(of["hits"], of["support"])
        more = f"{of['support']:,.6g} examples, F1 {of['f1']:.3f}"
        bars["bars"].append(
            {"name": name, "value": of["recall"], "low": low, "high": high, "note": more}
        )
    return bars


def reliability_block(counter: ClassificationSums, sums: torch.Tensor) -> Chart | None:
    """Accuracy against confidence: what is sure should be right as often as it is sure."""
    bins = counter.reliability(sums)
    if not bins:
        return None
    total = sum(weight for _, _, weight in bins)
    ends = [wilson_interval(accuracy * weight, weight) for _, accuracy, weight in bins]
    error = counter.summarize(sums)["calibration_error"]
    return {
        "kind": "chart",
        "title": "Reliability",
        "note": f"Accuracy of the predictions of each confidence, in {len(bins)} bins that hold "
        f"{total:,.6g} examples, with the interval of 95 %. Their mean distance from the "
        f"diagonal is the calibration error, {error:.1%}.",
        "x": "confidence",
        "y": "accuracy",
        "lines": [
            {
                "name": "accuracy",
                "points": [[confidence, accuracy] for confidence, accuracy, _ in bins],
                "band": [[c, *end] for (c, _, _), end in zip(bins, ends, strict=True)],
                "dots": True,
            },
            {"name": "as sure as right", "points": [[0, 0], [1, 1]], "dashed": True},
        ],
    }


def curve_blocks(
    counter: ClassificationSums, sums: torch.Tensor, names: Sequence[str]
) -> list[Block]:
    """The ROC and the precision-recall curve of class 1; [] where a class is missing."""
    areas = counter.areas(sums)
    if areas is None:
        return []
    own, other = counter.curve(sums)
    recall, false = own / own[-1], other / other[-1]
    precision = own / (own + other).clamp(min=1e-300)
    met = (own + other) > 0
    share = float(own[-1] / (own[-1] + other[-1]))
    start: list[list[float]] = [[0.0, 0.0]]
    roc: list[Line] = [
        {"name": names[1], "points": start + _pairs(false, recall)},
        {"name": "by chance", "points": [[0, 0], [1, 1]], "dashed": True},
    ]
    pr: list[Line] = [
        {"name": names[1], "points": _pairs(recall[met], precision[met])},
    ]
    return [
        {
            "kind": "chart",
            "title": "ROC",
            "note": f"The area under it is {areas[0]:.3f}.",
            "x": f"share of the others taken for {names[1]}",
            "y": f"share of {names[1]} found",
            "lines": roc,
        },
        {
            "kind": "chart",
            "title": "Precision and recall",
            "note": f"The average precision is {areas[1]:.3f}.",
            "x": f"share of {names[1]} found",
            "y": "precision",
            "lines": pr,
            "references": [{"name": "by chance", "value": share}],
        },
    ]


def _pairs(x: torch.Tensor, y: torch.Tensor) -> list[list[float]]:
    """Points with x rising, where either has moved by a share of the whole."""
    points = torch.stack([x, y], dim=1).tolist()
    kept = points[:1]
    for point in points[1:-1]:
        if max(abs(a - b) for a, b in zip(point, kept[-1], strict=True)) >= 1 / POINTS:
            kept.append(point)
    return kept + points[-1:] * (len(points) > 1)


def regression_blocks(counter: RegressionSums, sums: torch.Tensor) -> list[Block]:
    """Predicted against actual, the residuals, and for quantiles how often the target is below
    each."""
    if not float(sums[0]) > 0:
        return []
    reach = counter.RESIDUAL_RANGE * (counter.scale or 1.0)
    bins = counter.by_prediction(sums)
    ends = [[bins[0][0]] * 2, [bins[-1][0]] * 2]
    note = f"Rows in {len(bins)} bins of their prediction; the band is one deviation wide."
    blocks: list[Block] = [
        {
            "kind": "chart",
            "title": "Predicted against actual",
            "note": note,
            "x": "prediction",
            "y": "target",
            "lines": [
                {
                    "name": "mean target",
                    "points": [[x, x - mean] for x, mean, _, _ in bins],
                    "band": [[x, x - mean - off, x - mean + off] for x, mean, off, _ in bins],
                    "dots": True,
                },
                {"name": "as predicted", "points": ends, "dashed": True},
            ],
        },
        {
            "kind": "chart",
            "title": "Residuals against predictions",
            "note": note,
            "x": "prediction",
            "y": "prediction minus target",
            "lines": [
                {
                    "name": "mean residual",
                    "points": [[x, mean] for x, mean, _, _ in bins],
                    "band": [[x, mean - off, mean + off] for x, mean, off, _ in bins],
                    "dots": True,
                },
            ],
            "references": [{"name": "none", "value": 0.0}],
        },
        {
            "kind": "chart",
            "title": "Residuals",
            "note": f"Those beyond {reach:.4g} on either side are counted at the ends.",
            "x": "prediction minus target",
            "y": "share of examples",
            "lines": [
                {"name": "share", "points": [[x, y] for x, y in counter.residuals(sums)]},
            ],
        },
    ]
    if counter.quantiles:
        values = counter.summarize(sums)
        count = float(sums[0])
        bars: Bars = {
            "kind": "bars",
            "title": "Targets below each quantile",
            "note": "A quantile that is right has its own share of the targets below it.",
            "unit": "share of targets",
            "format": ".1%",
            "bars": [],
        }
        for quantile in counter.quantiles:
            share = values[f"coverage_{100 * quantile:g}"]
            low, high = wilson_interval(share * count, count)
            name = f"{100 * quantile:g} %"
            bars["bars"].append({"name": name, "value": share, "low": low, "high": high})
        blocks.append(bars)
    return blocks
