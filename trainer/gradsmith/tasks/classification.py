"""Which of a number of classes a row belongs to. Letters: B rows of a batch, C classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..blocks import Block, Examination, Result
from ..data.labelled import LabelledSplit, LabelledTextProcessor
from ..data.loader import evaluation_batches
from ..data.prepared import PreparedData
from ..data.processor import Batch
from ..recipe import Recipe
from .causal import token_on_meta, vocabulary
from .figures import classification_blocks
from .metrics import CLASSIFICATION_METRICS, ClassificationSums
from .task import Subject, Task

BATCH, LISTED = 64, 10


class Classification(Task):
    """Σ weight · cross-entropy; labels target, int64 (B,) or shares of the classes, float32 (B, C),
    and weight, float32 (B,).

    With label smoothing ε, a class's target is 1 - ε + ε/C for its own and ε/C for the others'.
    Metrics are of the classes alone: they know no weights and no smoothing.
    """

    unit = "rows"
    metrics = tuple(
        metric
        for metric in CLASSIFICATION_METRICS
        if metric.name in ("loss", "accuracy", "f1_macro", "calibration_error")
    )
    shown = ("accuracy", "top5_accuracy", "f1_macro", "balanced_accuracy", "roc_auc", "loss",
             "calibration_error")  # fmt: skip

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

    def examine(self, subject: Subject) -> Examination:
        """Which classes are taken for which, how sure is right, and what is reached unread."""
        by_name = {metric.name: metric for metric in CLASSIFICATION_METRICS}
        values = subject.measured[0]["values"]
        note = (
            f"The {subject.split} split: {values['examples']:,.0f} {self.unit} of "
            f"{len(self.labels)} classes, held out from training. Majority gives each the "
            "shares that the classes have "
            "in the training split."
        )
        return Examination(
            results=[*subject.measured, self.majority(subject.sums)],
            definitions=tuple(by_name[name] for name in self.shown if name in values),
            blocks=classification_blocks(self.sums, subject.sums, self.labels),
            note=note,
        )

    def beside(self, found: Examination, linear: Result | None, on: str, reads: str) -> None:
        """Adds logistic regression, or how to get it where scikit-learn is missing."""
        if linear is None:
            found.note += f" Logistic regression {on} needs: pip install 'gradsmith[table]'."
        else:
            found.results.append(linear)
            found.note += f" {reads}"

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
        return token_on_meta()

    def config(self) -> dict[str, Any]:
        return vocabulary(self.processor.tokenizer) | self.head()

    def examine(self, subject: Subject) -> Examination:
        found = super().examine(subject)
        held_out = subject.data.split(subject.split)
        linear = self._linear(subject.data, held_out)
        reads = "TF-IDF + logistic regression reads words and pairs of words of the same rows."
        self.beside(found, linear, "on TF-IDF", reads)
        found.blocks.append(self._surest_mistakes(subject.model, held_out))
        return found

    @classmethod
    def examined(cls, recipe: Any, split: str) -> tuple[str, ...]:
        return (split, "train")

    def _text(self, split: LabelledSplit, i: int) -> str:
        ids = split.row(i)["tokens"].tolist()
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _texts(self, split: LabelledSplit) -> list[str]:
        return [self._text(split, i) for i in range(len(split))]

    def _linear(self, data: PreparedData, held_out: LabelledSplit) -> Result | None:
        """Logistic regression on TF-IDF of words and pairs of words; None without scikit-learn."""
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            return None
        train = data.split("train")
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=1, sublinear_tf=True)
        model = LogisticRegression(C=10.0, max_iter=1000)
        model.fit(vectorizer.fit_transform(self._texts(train)), np.asarray(train.label))
        logp = model.predict_log_proba(vectorizer.transform(self._texts(held_out)))
        target = torch.from_numpy(np.asarray(held_out.label, np.int64))
        sums = self.sums.sums(torch.from_numpy(logp), target)
        return {
            "name": "TF-IDF + logistic regression",
            "values": self.sums.summarize(sums),
            "note": "words and pairs of words",
        }

    @torch.no_grad()
    def _surest_mistakes(self, model: Any, held_out: LabelledSplit) -> Block:
        """The rows that the model is surest of, and wrong."""
        rows, targets = self.processor.dataset(held_out), np.asarray(held_out.label).tolist()
        device, answers = next(model.parameters()).device, []
        for batch in evaluation_batches(rows, rank=0, world=1, batch=BATCH):
            answers += self.decode(self.outputs(model, batch.to(device)))
        wrong = [
            (answer["scores"][answer["label"]], i, answer["label"])
            for i, (answer, target) in enumerate(zip(answers, targets, strict=True))
            if answer["label"] != self.labels[target]
        ]
        table: list[list[str | float | None]] = [
            [self._text(held_out, i)[:300], self.labels[targets[i]], label, score]
            for score, i, label in sorted(wrong, reverse=True)[:LISTED]
        ]
        return {
            "kind": "table",
            "title": "The surest mistakes",
            "columns": [
                {"name": "Text"},
                {"name": "Label"},
                {"name": "Answer"},
                {"name": "Probability", "format": ".1%"},
            ],
            "rows": table,
        }

    def head(self) -> dict[str, Any]:
        # Decoders find a row's last token by it.
        return {**super().head(), "pad_token_id": self.processor.tokenizer.pad_token_id}

    def rows_in_words(self, rows: int) -> str:
        return f"{rows:,} texts of {len(self.labels)} classes"
