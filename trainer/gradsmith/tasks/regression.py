"""How much: a number, or quantiles of it. Letters: B rows of a batch, Q quantiles.

The target y is learned standardised, z = (y - mean) / scale by the training split, and its metrics
are told in its own unit. f is what the model says of z:

    squared   (f - z)²
    absolute  |f - z|
    huber     (f - z)² / 2 up to delta, beyond delta·(|f - z| - delta / 2)          Huber 1964
    quantile  mean over q of max(q·(z - f_q), (q - 1)·(z - f_q))       Koenker and Bassett 1978
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..blocks import Examination, Metric
from ..data.processor import Batch
from ..recipe import Recipe
from .figures import regression_blocks
from .metrics import REGRESSION_METRICS, RegressionSums
from .task import Subject, Task

QUANTILES = [0.1, 0.5, 0.9]


class Regression(Task):
    """Σ weight · loss; labels target, float32 (B,), standardised, and weight, float32 (B,).

    Metrics know no weights; the loss among them is of the standardised target.
    """

    unit = "rows"
    metrics = (Metric("loss", "Loss", "of the standardised target"), *REGRESSION_METRICS)

    processor: Any

    def __init__(self, recipe: Recipe, processor: Any) -> None:
        super().__init__(recipe, processor)
        objective = self.recipe.objective
        self.kind: str = objective.loss or "squared"
        quantiles = (objective.quantiles or QUANTILES) if self.kind == "quantile" else ()
        self.mean, self.scale = float(processor.target_mean), float(processor.target_scale)
        self.sums = RegressionSums(quantiles, self.mean, self.scale)

    def head(self) -> dict[str, Any]:
        return {"num_labels": max(1, len(self.sums.quantiles)), "problem_type": "regression"}

    def terms(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of each row, float32 (B,), of outputs (B, 1) or (B, Q)."""
        found, z = outputs.float(), target[:, None]
        if self.kind == "quantile":
            q, short = found.new_tensor(self.sums.quantiles), z - found
            return torch.maximum(q * short, (q - 1) * short).mean(1)
        if self.kind == "huber":
            delta = self.recipe.objective.delta or 1.0
            return F.huber_loss(found, z, reduction="none", delta=delta)[:, 0]
        distance = (found - z)[:, 0]
        return distance.abs() if self.kind == "absolute" else distance.square()

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        terms = self.terms(self.outputs(model, batch), batch.labels["target"])
        return terms @ batch.labels["weight"]

    def metric_sums(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        target, counts = batch.labels["target"], (batch.labels["weight"] > 0).float()
        loss = (self.terms(outputs, target) * counts).double().sum().cpu()
        sums = self.sums.sums(self.in_its_unit(outputs), self.in_its_unit(target), counts)
        return torch.cat([loss[None], sums])

    def in_its_unit(self, standardised: torch.Tensor) -> torch.Tensor:
        """float64, of the same shape."""
        return standardised.double() * self.scale + self.mean

    def summarize(self, sums: torch.Tensor) -> dict[str, float]:
        values = self.sums.summarize(sums[1:])
        rows = values["examples"]
        return {"loss": float(sums[0]) / rows if rows else float("nan"), **values}

    def examine(self, subject: Subject) -> Examination:
        """How far off it is, and where, in the target's unit."""
        values = subject.measured[0]["values"]
        coverage = tuple(
            Metric(f"coverage_{100 * q:g}", f"Below {100 * q:g} %", "share of the targets", True,
                   ".1%")
            for q in self.sums.quantiles
        )  # fmt: skip
        loss, *others = self.metrics
        return Examination(
            results=list(subject.measured),
            definitions=(*others, *coverage, loss),
            blocks=regression_blocks(self.sums, subject.sums[1:]),
            note=f"The {subject.split} split: {values['examples']:,.0f} rows, held out from "
            "training.",
        )

    def decode(self, outputs: torch.Tensor) -> list[dict[str, Any]]:
        """prediction; and each quantile, by name."""
        found = []
        for row in self.in_its_unit(outputs.cpu()).tolist():
            quantiles = zip(self.sums.quantiles, row, strict=False)
            named = {f"quantile_{100 * q:g}": value for q, value in quantiles}
            found.append({"prediction": row[self.sums.point], **named})
        return found
