"""Which of a number of classes a row belongs to. Letters: B rows of a batch, C classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..data.labelled import LabelledTextProcessor
from ..data.processor import Batch
from ..recipe import Recipe
from .metrics import ClassificationSums
from .task import Metric, Task


class Classification(Task):
    """Σ weight · cross-entropy; labels target, int64 (B,), and weight, float32 (B,).

    With label smoothing ε, a class's target is 1 - ε + ε/C for its own and ε/C for the others'.
    Metrics are of the classes alone: they know no weights and no smoothing.
    """

    unit = "rows"
    metrics = (
        Metric("loss", "Loss", "nats per row"),
        Metric("accuracy", "Accuracy", greater_is_better=True),
        Metric("f1_macro", "F1, mean over the classes", greater_is_better=True),
        Metric("calibration_error", "Calibration error"),
    )

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
