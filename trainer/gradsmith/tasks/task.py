"""What a task is to training, evaluation and serving.

A task knows no rank, optimizer, file or page. Three rules make it independent of all of them:

- the loss is a *sum* of terms, and a dataset's `items` say how many each row has before any
  forward pass: the step divides by those of the whole global batch;
- what is random about a row follows from its place in the run (`Dataset.batch`'s draws);
- metrics are functions of sums that add: over batches, ranks, folds and windows.

Letters: B rows of a batch, M sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..blocks import Examination, Metric, Result
from ..data.prepared import PreparedData
from ..data.processor import Batch, Dataset, Processor
from ..errors import UserError, did_you_mean
from ..recipe import Recipe


@dataclass(frozen=True)
class Subject:
    """What `examine` looks at.

    Attributes:
        model: the run's.
        base: what it was fine-tuned from; None where it was not.
        data, split: what they were measured on.
        measured: what they reached: a result for the model, and one for its base if there is one.
        sums: the model's, float64 (M,).
    """

    model: Any
    base: Any
    data: PreparedData
    split: str
    measured: Sequence[Result]
    sums: torch.Tensor


class Task(ABC):
    """An objective, with the processor that made its rows.

    Attributes:
        unit: what speed is told in, and how many were read: tokens, images, rows.
        metrics: what is logged at each validation; the first is monitored unless the recipe names
            another.
        auto_class: transformers' class that builds the model, or "module:class" of one like it.
        architectures: what transformers' modeling_auto calls the table of what it can build, or
            "module:name" of a mapping of `model.architecture` to transformers' model type.
        models_are: what transformers' are called, for messages.
        for_example: some of them.
        peft_type: peft's word for the task, or None.
        peft_saves: modules that are trained whole beside an adapter, where peft_type does not say.
        needs_reference: whether the loss compares with what the model says as training begins:
            `reference` is then computed once for each row, and is in every batch's labels.
        needs_statistics: whether the loss needs `statistics` of the whole global batch.
        shared: those statistics, added over the global batch; the step sets them.
        fused_loss: whether the model computes its loss without its logits; training sets it once
            the kernels are placed.
    """

    unit: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    auto_class: ClassVar[str]
    architectures: ClassVar[str]
    models_are: ClassVar[str] = ""
    for_example: ClassVar[str] = ""
    peft_type: ClassVar[str | None] = None
    peft_saves: ClassVar[tuple[str, ...]] = ()
    needs_reference: bool = False
    needs_statistics: bool = False
    shared: torch.Tensor | None = None
    fused_loss: bool = False

    recipe: Any  # of the task's own class

    def __init__(self, recipe: Recipe, processor: Processor) -> None:
        self.recipe, self.processor = recipe, processor

    @classmethod
    def of(cls, recipe: Recipe, processor: Any) -> Task:
        """The task over what `processor` encodes, which may decide which of several it is.

        Raises:
            UserError: the recipe asks for what does not go with the data.
        """
        return cls(recipe, processor)

    # ------------------------------------------------------------------------------ the model

    @classmethod
    def row_length(cls, recipe: Any) -> int:
        """What a row costs at most, in `unit`s."""
        return 1

    def rows_in_words(self, rows: int) -> str:
        """The training rows, for the run's headline."""
        return f"{rows:,} {self.unit}"

    @classmethod
    def meta_inputs(cls, recipe: Any) -> dict[str, torch.Tensor] | None:
        """Inputs on the meta device that show whether a model's layers fit together."""
        return None

    @classmethod
    def implied(cls, recipe: Any) -> dict[str, Any]:
        """What the recipe's other parts decide of the config of a model that is made new."""
        return {}

    def config(self) -> dict[str, Any]:
        """What the data decides of the config of a model that is made new."""
        return self.head()

    def head(self) -> dict[str, Any]:
        """What the data decides of any model's config, also of one that brings its weights."""
        return {}

    def check_model(self, model: Any) -> None:  # noqa: B027
        """
        Raises:
            UserError: a model that brings its own weights does not fit the data.
        """

    def check_data(self, data: PreparedData, dataset: Dataset) -> None:
        """Looks at the rows to train on before the model is built.

        Raises:
            UserError: there is nothing to learn from.
        """
        if not dataset.items.any():
            raise UserError("data: the training split has no item: nothing to learn from")

    def start(self, model: Any, dataset: Dataset) -> None:  # noqa: B027
        """Refuses what cannot be trained, and computes what is needed once.

        Args:
            model: the engine around the model, in evaluation mode.
            dataset: the rows to train on.

        Raises:
            UserError: model and data do not go together.
        """

    # -------------------------------------------------------------------------------- training

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The sum of the batch's terms, in float32; a scalar that can be differentiated."""

    def reference(self, outputs: torch.Tensor) -> torch.Tensor:
        """What of the outputs the loss compares with, float32 (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} has no reference")

    def statistics(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sums over a batch that the loss needs of the whole global batch, float64."""
        raise NotImplementedError(f"{type(self).__name__} has no statistics")

    # ------------------------------------------------------------------------------ evaluation

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """What the model says of the inputs, (B, ...)."""
        logits: torch.Tensor = model(**batch.inputs).logits
        return logits

    @abstractmethod
    def metric_sums(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The sums that `summarize` reads, float64 (M,), on the CPU."""

    @abstractmethod
    def summarize(self, sums: torch.Tensor) -> dict[str, float]:
        """The metrics, by name, that follow from the added sums; NaN where nothing was counted."""

    def examine(self, subject: Subject) -> Examination:
        """What is worth knowing beside the metrics: baselines, figures, how to read the results."""
        return Examination(list(subject.measured))

    @classmethod
    def examined(cls, recipe: Any, split: str) -> tuple[str, ...]:
        """The splits that an evaluation of one reads."""
        return (split,)

    # --------------------------------------------------------------------------------- serving

    def decode(self, outputs: torch.Tensor) -> list[dict[str, Any]]:
        """An answer for each row of outputs."""
        raise NotImplementedError(f"{type(self).__name__} does not answer row by row")


def monitored(recipe: Recipe, task: type[Task]) -> Metric:
    """The metric that `training.validate.monitor` names, by default the task's first.

    Raises:
        UserError: the task has no such metric.
    """
    name = recipe.training.validate_.monitor or task.metrics[0].name
    names = [metric.name for metric in task.metrics]
    if name not in names:
        raise UserError(
            f"training.validate.monitor: found {name}; allowed are {', '.join(names)}."
            f"{did_you_mean(name, names)}"
        )
    return task.metrics[names.index(name)]
