"""From a raw example to numbers: what `prepare`, training, evaluation and serving share.

A processor is fitted on the training split alone and saved beside the weights. It knows no model.
Letters: B rows of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch

from ..recipe import Source
from ..shapes import DataManifest, ProcessorManifest
from .columns import Column, Columns
from .example import Dropped, Example, Ledger
from .tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    from .spool import Spool

Row = dict[str, np.ndarray]
"""One encoded example: what `prepare` stores, and what a request becomes."""

PROCESSOR_FILES = {
    "tokenizer": TOKENIZER_FILES,
    "processor": (*TOKENIZER_FILES, "processor.json", "preprocessor_config.json"),
}
"""A processor's folder -> what it may write there, and what goes into every checkpoint's model."""

PROCESSORS = {
    "language_modeling": "text:TextProcessor",
    "chat": "text:ChatProcessor",
    "text_classification": "labelled:LabelledTextProcessor",
    "preference": "pairs:PairProcessor",
    "table": "table:TableProcessor",
    "image_classification": "image:ImageProcessor",
}
"""data.task -> where its processor is, below gradsmith.data; imported on use."""


def processor_class(task: str) -> type[Processor]:
    found: type[Processor] = resolve_name(f"gradsmith.data.{PROCESSORS[task]}")
    return found


@dataclass(frozen=True)
class Batch:
    """B rows. All tensors are (B, ...).

    Attributes:
        inputs: the model's keyword arguments.
        labels: the task's own; {} when serving.
    """

    inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """On `device`, with floating inputs in `dtype`."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        inputs = {name: moved(tensor) for name, tensor in self.inputs.items()}
        return Batch(inputs, {name: tensor.to(device) for name, tensor in self.labels.items()})


class Dataset(Protocol):
    """The rows of a split.

    Attributes:
        items: (rows,): how many terms of the loss are in each row: target tokens, 1 for an image,
            or a weight. Known before any forward pass, so that a global batch's loss has one
            divisor.
        lengths: int64 (rows,): what a row costs: its tokens, else 1.
        reference: float32 (rows, ...): what the model said of each row before training, where the
            task's loss compares with it; None until it is known.
    """

    items: np.ndarray
    lengths: np.ndarray
    reference: np.ndarray | None

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | np.ndarray, draws: np.ndarray | None = None) -> Batch:
        """Rows as a batch.

        Args:
            rows: which (B,). None at all: a batch that counts for nothing, for a rank that has no
                row left.
            draws: uint64 (B,): each row's place in the run, from which all that is random about
                it follows. None: nothing random.
        """
        ...


class Processor(ABC):
    """Raw examples -> rows -> batches.

    Attributes:
        folder: its place in the data's folder, a key of `PROCESSOR_FILES`.
        manifest_shape: what the data's manifest.json looks like.
        split_class: what reads a split.
        noun: what its examples are called.
        counted: what `tally` counts, in the manifest's order.
        columns: what it stores of a row.
        together: how many rows at neighbouring places of the run make each other, and so must be
            in one batch: those at places k * together to (k + 1) * together - 1.
    """

    folder: ClassVar[str] = "processor"
    manifest_shape: ClassVar[type[DataManifest]] = ProcessorManifest
    split_class: ClassVar[type[Columns]] = Columns
    noun: ClassVar[str] = "examples"
    counted: ClassVar[tuple[str, ...]] = ()
    columns: Mapping[str, Column]
    together: int = 1

    @classmethod
    def check_source(cls, source: Source, where: str) -> None:
        """
        Raises:
            UserError: the processor cannot use what the recipe's key `where` names.
        """
        return None

    @classmethod
    def reads(cls, source: Source) -> list[str]:
        """The columns or keys that it reads of a source's rows."""
        raise NotImplementedError(f"{cls.__name__} reads no rows")

    @classmethod
    def example(cls, row: dict[str, Any], at: str, source: Source) -> Example:
        """A row of a source as an example.

        Raises:
            UserError: naming `at`, where it stands, and what is wrong with it.
        """
        raise NotImplementedError(f"{cls.__name__} reads no rows")

    @classmethod
    def spool(cls) -> type[Spool]:
        """What keeps what was read until it is encoded; imported on use."""
        from .spool import ExampleSpool

        return ExampleSpool

    @classmethod
    def group_of(cls, example: Example) -> bytes | None:
        """What must be equal for two examples to stay on one side of the split."""
        return None

    @classmethod
    def inputs(cls, recipe: Any) -> dict[str, Any]:
        """What is read besides the sources, with hashes, for the manifest."""
        return {}

    @classmethod
    def check(cls, recipe: Any) -> None:
        """Looks at those files before anything is read or trained.

        Raises:
            UserError: one is missing, or is not what it should be.
        """
        return None

    @classmethod
    @abstractmethod
    def fit(
        cls,
        recipe: Any,
        examples: Callable[[], Iterable[Any]],
        ledger: Ledger,
        log: Callable[[str], None],
    ) -> Self:
        """Learns what there is to learn, of the training split alone.

        Args:
            recipe: what the user asks for.
            examples: reads the training split, as often as it is called: `Spool.training`.
            ledger: for what has to be accounted for.
            log: is told what takes long.
        """

    @abstractmethod
    def encode(self, examples: Sequence[Example], ledger: Ledger) -> list[Row | Dropped]:
        """Each example as a row, or why it is none.

        Raises:
            UserError: an example that the recipe says to refuse.
        """

    def tally(self, example: Example, row: Row) -> dict[str, int]:
        """What the manifest sums up of a row, besides `documents`."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the processor."""
        return {"columns": {name: asdict(column) for name, column in self.columns.items()}}

    def account(self, counts: dict[str, int], ledger: Ledger) -> None:
        """Adds to the ledger what only a whole split's counts tell."""
        return None

    @classmethod
    def stored(cls, manifest: dict[str, Any]) -> dict[str, Column]:
        """The columns that a manifest says are there."""
        return {
            name: Column(entry["dtype"], tuple(entry["shape"]), entry["offsets"])
            for name, entry in manifest["columns"].items()
        }

    @abstractmethod
    def dataset(self, split: Any, *, augment: bool = False) -> Dataset:
        """The rows of an opened split."""

    @abstractmethod
    def dummy_inputs(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Inputs of the right shapes, to compare two models on or to warm one up."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Writes its files: JSON and Hugging Face's own formats, no pickle."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: Path, recipe: Any) -> Self:
        """What `save_pretrained` wrote."""
