"""Which of a number of classes a row belongs to. Letters: B rows of a batch, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..data.labelled import LabelledTextProcessor
from ..data.prepared import PreparedData
from ..data.processor import Batch
from ..evaluation.blocks import Examination, Result
from ..recipe import Recipe
from .figures import classification_blocks
from .metrics import CLASSIFICATION_METRICS, ClassificationSums
from .task import Task


class Classification(Task):
    """Σ weight · cross-entropy; labels target, int64 (B,), and weight, float32 (B,).

    With label smoothing ε, a class's target is 1 - ε + ε/C for its own and ε/C for the others'.
    Metrics are of the classes alone: they know no weights and no smoothing.
    """

    unit = "rows"
    metrics = tuple(
        metric
        for metric in CLASSIFICATION_METRICS
        if metric.name in ("loss", "accuracy", "f1_macro", "calibration_error")
    )
    shown = ("accuracy", "f1_macro", "balanced_accuracy", "roc_auc", "loss", "calibration_error")

    processor: Any

    def __init__(self, recipe: Recipe, processor: Any) -> None:
        super().__init__(recipe, processor)
        self.labels: list[str] = processor.labels
        self.sums = ClassificationSums(len(self.labels))

    def head(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        losses = F.cross_entropy(
            self.outputs(model, batch).float(),
            batch.labels["target"],
            reduction="none",
            label_smoothing=self.recipe.objective.label_smoothing,
        )
        return losses @ batch.labels["weight"]

    def metric_sums(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        counts = (batch.labels["weight"] > 0).float()
        return self.sums.sums(outputs, batch.labels["target"], counts)

    def summarize(self, sums: torch.Tensor) -> dict[str, float]:
        return self.sums.summarize(sums)

    def examine(
        self,
        model: Any,
        base: Any,
        data: PreparedData,
        split: str,
        measured: Sequence[Result],
        sums: torch.Tensor,
    ) -> Examination:
        """Which classes are taken for which, how sure is right, and what is reached unread."""
        by_name = {metric.name: metric for metric in CLASSIFICATION_METRICS}
        values = measured[0]["values"]
        note = (
            f"The {split} split: {values['examples']:,.0f} rows of {len(self.labels)} classes, "
            "held out from training. Majority gives every row the shares that the classes have "
            "in the training split."
        )
        return Examination(
            results=[*measured, self.majority(sums)],
            definitions=tuple(by_name[name] for name in self.shown if name in values),
            blocks=classification_blocks(self.sums, sums, self.labels),
            note=note,
        )

    def majority(self, sums: torch.Tensor) -> Result:
        """What it reaches to give every row the classes' shares of the training split."""
        support = torch.tensor([of["support"] for of in self.sums.per_class(sums)])
        counts = torch.tensor(list(self.processor.classes.values()), dtype=torch.float64)
        logits = (counts / counts.sum()).log().expand(len(counts), -1)
        guessed = self.sums.sums(logits, torch.arange(len(counts)), support)
        values = self.sums.summarize(guessed)
        return {"name": "majority", "values": values, "note": "reads nothing"}

    def decode(self, outputs: torch.Tensor) -> list[dict[str, Any]]:
        """label, and scores: the probability of each class."""
        found = []
        for row in outputs.float().softmax(-1).cpu():
            scores = dict(zip(self.labels, row.tolist(), strict=True))
            found.append({"label": self.labels[int(row.argmax())], "scores": scores})
        return found


class TextClassification(Classification):
    """A text's class, by any of transformers' sequence classifiers."""

    auto_class = "AutoModelForSequenceClassification"
    architectures = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    models_are = "sequence classifiers"
    for_example = "bert, modernbert, llama"
    peft_type = "SEQ_CLS"
    processor: LabelledTextProcessor

    @classmethod
    def meta_inputs(cls, recipe: Recipe) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, 2, dtype=torch.long, device="meta")}

    def config(self) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        return {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **self.head(),
        }

    def head(self) -> dict[str, Any]:
        # Decoders find a row's last token by it.
        return {**super().head(), "pad_token_id": self.processor.tokenizer.pad_token_id}

    def rows_in_words(self, rows: int) -> str:
        return f"{rows:,} texts of {len(self.labels)} classes"

    def request(self, value: Any) -> dict[str, Any]:
        return {"text": value if isinstance(value, str) else value["text"]}
