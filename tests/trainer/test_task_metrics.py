"""Metrics as functions of sums, against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from gradsmith.tasks.figures import classification_blocks, regression_blocks
from gradsmith.tasks.metrics import (
    CALIBRATION_BINS,
    CLASSIFICATION_METRICS,
    LOGIT_RANGE,
    REGRESSION_METRICS,
    ClassificationSums,
    RegressionSums,
    wilson_interval,
)


def examples(classes: int, count: int, seed: int = 0, weighted: bool = False):
    """Logits that know something of the target, skewed classes."""
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.ones(classes))
    target = random.choice(classes, count, p=share)
    logits = random.normal(size=(count, classes)) * 1.5
    logits[np.arange(count), target] += 1.2
    weight = random.uniform(0.2, 3.0, count) if weighted else np.ones(count)
    return torch.tensor(logits), torch.tensor(target), torch.tensor(weight)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("classes", [2, 3, 12])
def test_classification_is_what_scikit_learn_says(classes, weighted):
    logits, target, weight = examples(classes, 700, classes, weighted)
    counter = ClassificationSums(classes)
    sums = counter.sums(logits, target, weight)
    assert sums.shape == (counter.size,)
    found = counter.summarize(sums)
    p, y, w = torch.softmax(logits, -1).numpy(), target.numpy(), weight.numpy()
    answer, labels = p.argmax(-1), range(classes)

    def near(value):
        return pytest.approx(value, rel=1e-10)

    kwargs = {"sample_weight": w, "zero_division": 0}
    assert found["loss"] == near(oracle.log_loss(y, p, sample_weight=w, labels=labels))
    assert found["accuracy"] == near(oracle.accuracy_score(y, answer, sample_weight=w))
    balanced = oracle.balanced_accuracy_score(y, answer, sample_weight=w)
    assert found["balanced_accuracy"] == near(balanced)
    for name in ("precision", "recall", "f1"):
        score = getattr(oracle, f"{name}_score")
        assert found[f"{name}_macro"] == near(score(y, answer, average="macro", **kwargs))
        each = score(y, answer, average=None, labels=labels, **kwargs)
        assert [row[name] for row in counter.per_class(sums)] == near(list(each))
    assert found["f1_micro"] == near(oracle.f1_score(y, answer, average="micro", **kwargs))
    expected = oracle.confusion_matrix(y, answer, sample_weight=w, labels=labels)
    np.testing.assert_allclose(counter.confusion(sums), expected, rtol=1e-10)
    brier = oracle.brier_score_loss(y, p[:, 1] if classes == 2 else p, sample_weight=w,
                                    labels=list(labels))  # fmt: skip
    assert found["brier"] == near(brier)
    if classes > 5:
        top = oracle.top_k_accuracy_score(y, p, k=5, sample_weight=w, labels=labels)
        assert found["top5_accuracy"] == near(top)
    else:
        assert "top5_accuracy" not in found
    assert found["examples"] == near(w.sum())
    named = {metric.name for metric in CLASSIFICATION_METRICS}
    assert set(found) - {"examples"} == named - ({"top5_accuracy"} if classes <= 5 else set())


@pytest.mark.parametrize("bins", [7, 1000])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_areas_are_exact_to_the_bin(classes, bins):
    """Scores put into the same bins by hand, which are ties for scikit-learn too."""
    logits, target, weight = examples(classes, 600, 5, weighted=True)
    found = ClassificationSums(classes, bins=bins)
    values = found.summarize(found.sums(logits, target, weight))
    p = torch.softmax(logits, -1).numpy()
    edges = np.linspace(-LOGIT_RANGE, LOGIT_RANGE, bins + 1)
    binned = np.digitize(np.log(p / (1 - p)), edges)
    areas = {"roc_auc": oracle.roc_auc_score, "pr_auc": oracle.average_precision_score}
    for name, function in areas.items():
        classes_scored = [1] if classes == 2 else range(classes)
        each = [function(target.numpy() == c, binned[:, c], sample_weight=weight.numpy())
                for c in classes_scored]  # fmt: skip
        assert values[name] == pytest.approx(np.mean(each), rel=1e-10)
    if bins == 1000:
        each = [oracle.roc_auc_score(target == c, p[:, c], sample_weight=weight)
                for c in classes_scored]  # fmt: skip
        assert values["roc_auc"] == pytest.approx(np.mean(each), abs=2e-3)


def test_the_calibration_error_follows_its_formula():
    logits, target, weight = examples(4, 900, 3, weighted=True)
    counter = ClassificationSums(4)
    found = counter.summarize(counter.sums(logits, target, weight))
    p = torch.softmax(logits, -1)
    confidence, answer = p.max(-1)
    error = 0.0
    for bin_ in range(CALIBRATION_BINS):
        low, high = bin_ / CALIBRATION_BINS, (bin_ + 1) / CALIBRATION_BINS
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            w = weight[inside]
            gap = (w * confidence[inside]).sum() - (w * (answer == target)[inside]).sum()
            error += abs(float(gap))
    assert found["calibration_error"] == pytest.approx(error / float(weight.sum()), rel=1e-10)


def test_binary_accuracy_against_confidence_is_scikit_learns_curve():
    """For two classes, where what is sure of class 0 is turned round."""
    logits, target, _ = examples(2, 500, 8)
    counter = ClassificationSums(2)
    p = torch.softmax(logits, -1)
    confidence, answer = p.max(-1)
    right = (answer == target).numpy()
    accuracy, mean = oracle_curve(right, confidence.numpy())
    bins = counter.reliability(counter.sums(logits, target))
    assert [b[0] for b in bins] == pytest.approx(list(mean))
    assert [b[1] for b in bins] == pytest.approx(list(accuracy))


def oracle_curve(right, confidence):
    from sklearn.calibration import calibration_curve

    return calibration_curve(right, confidence, n_bins=CALIBRATION_BINS)


@pytest.mark.parametrize("classes", [2, 7, 230])
def test_classification_sums_add(classes):
    logits, target, weight = examples(classes, 300, 1, weighted=True)
    counter = ClassificationSums(classes, bins=50)
    whole = counter.sums(logits, target, weight)
    parts = [slice(0, 1), slice(1, 90), slice(90, 90), slice(90, None)]
    total = sum(counter.sums(logits[s], target[s], weight[s]) for s in parts)
    torch.testing.assert_close(whole, total, rtol=1e-12, atol=1e-12)
    # of weight 0, whatever it is
    more = torch.cat([logits, torch.full((2, classes), math.nan)])
    padded = counter.sums(
        more, torch.cat([target, torch.tensor([-100, 10**6])]), torch.cat([weight, torch.zeros(2)])
    )
    assert torch.equal(padded, whole)


def test_many_classes_are_counted_without_their_pairs():
    classes = 230
    logits, target, _ = examples(classes, 4000, 2)
    counter = ClassificationSums(classes)
    sums = counter.sums(logits, target)
    assert counter.size < 1000
    assert counter.confusion(sums) is None
    found = counter.summarize(sums)
    answer = logits.argmax(-1)
    expected = oracle.f1_score(target, answer, average="macro", zero_division=0)
    assert found["f1_macro"] == pytest.approx(expected, rel=1e-10)
    recall = oracle.recall_score(target, answer, average=None, labels=range(classes),
                                 zero_division=0)  # fmt: skip
    assert [row["recall"] for row in counter.per_class(sums)] == pytest.approx(list(recall))
    assert "roc_auc" not in found


def test_one_class_alone_has_no_areas():
    counter = ClassificationSums(2)
    found = counter.summarize(counter.sums(torch.randn(5, 2), torch.ones(5, dtype=torch.int64)))
    assert math.isnan(found["roc_auc"])
    assert math.isnan(found["pr_auc"])
    assert 0 <= found["accuracy"] <= 1


def test_nothing_counted_is_no_number():
    for counter in (ClassificationSums(3), RegressionSums((0.1, 0.9))):
        values = counter.summarize(torch.zeros(counter.size, dtype=torch.float64))
        assert values.pop("examples") == 0
        assert all(math.isnan(value) for value in values.values()), values


def test_surest_of_all_and_wrong():
    """Logits so far apart that p rounds to 0 and 1: the loss stays what it is."""
    logits = torch.tensor([[400.0, 0.0], [0.0, 900.0], [-300.0, 300.0]])
    counter = ClassificationSums(2)
    found = counter.summarize(counter.sums(logits, torch.tensor([1, 1, 0])))
    assert found["loss"] == pytest.approx((400 + 0 + 600) / 3)
    assert found["roc_auc"] == pytest.approx(0.25), "a tie at the top, and one that is below"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(4, 2), torch.zeros(4).long()), "logits"),
        ((torch.zeros(4, 3), torch.zeros(3).long()), "target"),
        ((torch.zeros(4, 3), torch.full((4,), 3)), "0 to 2"),
        ((torch.zeros(4, 3), torch.full((4,), -100)), "0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        ClassificationSums(3).sums(*arguments)


# --------------------------------------------------------------------------------- regression


@pytest.mark.parametrize("offset", [0.0, 1e9])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_regression_is_what_scikit_learn_says(weighted, offset):
    random = np.random.default_rng(4)
    y = offset + random.normal(size=800)
    found_y = y + random.normal(size=800) * 0.4 + 0.1
    w = random.uniform(0.1, 2, 800) if weighted else np.ones(800)
    counter = RegressionSums(center=offset + 0.3)
    sums = counter.sums(*map(torch.tensor, (found_y[:, None], y, w)))
    values = counter.summarize(sums)
    assert values["mae"] == pytest.approx(oracle.mean_absolute_error(y, found_y, sample_weight=w))
    rmse = oracle.root_mean_squared_error(y, found_y, sample_weight=w)
    assert values["rmse"] == pytest.approx(rmse)
    r2 = oracle.r2_score(y, found_y, sample_weight=w)
    assert values["r2"] == pytest.approx(r2, rel=1e-6)
    halves = [counter.sums(*map(torch.tensor, (found_y[s], y[s], w[s])))
              for s in (slice(300), slice(300, None))]  # fmt: skip
    torch.testing.assert_close(halves[0] + halves[1], sums, rtol=1e-10, atol=1e-9)
    assert set(values) == {metric.name for metric in REGRESSION_METRICS} | {"examples"}


def test_targets_that_are_all_the_same():
    same = torch.full((4,), 7.0)
    counter = RegressionSums()
    assert counter.summarize(counter.sums(same, same))["r2"] == 1
    assert counter.summarize(counter.sums(same + 1, same))["r2"] == 0


def test_quantiles_cover_their_share():
    random = np.random.default_rng(0)
    y = random.normal(size=20_000)
    levels = (0.1, 0.5, 0.95)
    exact = np.quantile(y, levels)
    outputs = torch.tensor(np.tile(exact, (len(y), 1)))
    counter = RegressionSums(levels)
    values = counter.summarize(counter.sums(outputs, torch.tensor(y)))
    for level in levels:
        assert values[f"coverage_{100 * level:g}"] == pytest.approx(level, abs=1e-3)
    median = np.full_like(y, exact[1])
    assert values["mae"] == pytest.approx(oracle.mean_absolute_error(y, median))
    with pytest.raises(ValueError, match="rising"):
        RegressionSums((0.9, 0.1))


def test_the_interval_is_wilsons():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                   (0, 20, 0.0, 0.1611)):  # fmt: skip
        assert wilson_interval(hits, count) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


# -------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("classes", [2, 9, 80, 230])
def test_a_classification_has_figures_of_any_size(classes):
    from test_report import drawn

    logits, target, _ = examples(classes, 900, 1)
    counter = ClassificationSums(classes)
    sums = counter.sums(logits, target)
    names = [f"class <{i}>" for i in range(classes)]
    blocks = classification_blocks(counter, sums, names)
    kinds = [block["kind"] for block in blocks]
    first = "matrix" if classes <= 50 else "table"
    assert kinds == [first, "bars", "chart", *["chart", "chart"] * (classes == 2)]
    page = drawn(blocks)
    for block in blocks:
        assert block["title"] in page.text
    if classes == 9:
        counts = counter.confusion(sums)
        assert blocks[0]["values"] == counts.tolist()
        assert f"{counts[3].sum():.0f} examples, F1" in page.text


def test_a_regression_has_figures():
    from test_report import drawn

    random = np.random.default_rng(0)
    y = torch.tensor(random.normal(size=500))
    counter = RegressionSums((0.1, 0.5, 0.9))
    outputs = torch.stack([y - 1, y + 0.01, y + 1], dim=1)
    blocks = regression_blocks(counter, counter.sums(outputs, y))
    assert [block["kind"] for block in blocks] == ["chart", "chart", "chart", "bars"]
    assert sum(share for _, share in blocks[2]["lines"][0]["points"]) == pytest.approx(1)
    assert [bar["value"] for bar in blocks[3]["bars"]] == [0, 1, 1]
    assert "Residuals" in drawn(blocks).text


def test_the_majority_follows_from_the_sums():
    from types import SimpleNamespace

    from gradsmith.tasks.classification import Classification

    logits, target, _ = examples(3, 500, 6)
    processor = SimpleNamespace(labels=["a", "b", "c"], classes={"a": 10, "b": 70, "c": 20})
    task = Classification(None, processor)
    found = task.majority(task.sums.sums(logits, target))["values"]
    always = np.tile([0.1, 0.7, 0.2], (500, 1))
    assert found["accuracy"] == pytest.approx(float((target == 1).double().mean()))
    assert found["loss"] == pytest.approx(oracle.log_loss(target, always, labels=range(3)))
    assert found["roc_auc"] == pytest.approx(0.5)
