"""Labelled texts -> token ids and a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from ..errors import UserError, did_you_mean
from ..files import write_json
from ..reading import read_json
from ..shapes import LabelledProcessor
from .columns import Column, Columns
from .example import Dropped, Example, Ledger, content_digest
from .processor import Batch, Processor, Row
from .readers import label_of, string
from .text import check_tokenizer, fit_tokenizer, tokenizer_inputs
from .tokenizer import load_tokenizer, special_tokens_as_text

THINNED = 1  # the counter's last word: apart from an epoch's order, which has the same key and 0


class LabelledSplit(Columns):
    """`tokens` with `offsets`, and for each row the index of its class, `label`."""

    tokens: np.ndarray
    offsets: np.ndarray
    label: np.ndarray


class LabelledTextProcessor(Processor):
    """A text as its tokenizer encodes one, special tokens included, cut at `longest`.

    Args:
        tokenizer: a transformers PreTrainedTokenizerFast with PAD.
        classes: the labels of the training split, sorted, with how often each is there.
        longest: tokens of a row at most.
        recipe: its seed, and of its objective class_weights and token_dropout.
    """

    noun = "texts"
    counted: ClassVar[tuple[str, ...]] = ("tokens",)
    split_class = LabelledSplit
    columns: Mapping[str, Column] = {
        "tokens": Column("<u4", offsets="offsets"),
        "label": Column("<i4"),
    }

    def __init__(self, tokenizer: Any, classes: dict[str, int], longest: int, recipe: Any):
        self.tokenizer, self.classes, self.longest = tokenizer, classes, longest
        self.seed, self.left_out = recipe.seed, recipe.objective.token_dropout
        self.labels = list(classes)
        self.weights = class_weights(classes, recipe.objective.class_weights)
        self._index = {label: index for index, label in enumerate(self.labels)}

    @classmethod
    def reads(cls, source: Any) -> list[str]:
        return [source.text, source.label]

    @classmethod
    def example(cls, row: dict[str, Any], at: str, source: Any) -> Example:
        label = label_of(row, source.label, at)
        return Example(at, {"text": string(row, source.text, at), "label": label})

    @classmethod
    def group_of(cls, example: Example) -> bytes:
        """Equal texts stay together, whatever their labels."""
        return content_digest(example.fields["text"])

    @classmethod
    def inputs(cls, recipe: Any) -> dict[str, Any]:
        return tokenizer_inputs(recipe)

    @classmethod
    def check(cls, recipe: Any) -> None:
        check_tokenizer(recipe, needs_eos=False)

    @classmethod
    def fit(
        cls,
        recipe: Any,
        examples: Callable[[], Iterable[Example]],
        ledger: Ledger,
        log: Callable[[str], None],
    ) -> Self:
        counts = Counter(example.fields["label"] for example in examples())
        classes = classes_of(counts, log)
        tokenizer = fit_tokenizer(recipe, examples, ledger, log, needs_eos=False)
        return cls(tokenizer, classes, recipe.data.sequence_length, recipe)

    def encode(self, examples: Sequence[Example], ledger: Ledger) -> list[Row | Dropped]:
        with special_tokens_as_text(self.tokenizer) as backend:
            encodings = backend.encode_batch([example.fields["text"] for example in examples])
        rows: list[Row | Dropped] = []
        for example, encoding in zip(examples, encodings, strict=True):
            label, ids = example.fields["label"], encoding.ids
            ledger.add("tokenize", "in")
            if label not in self._index:
                reason = f'the training split has no row of the class "{label}"'
                rows.append(ledger.drop("tokenize", reason))
                continue
            if len(ids) > self.longest:
                reason = f"longer than {self.longest} tokens"
                ledger.add("tokenize", "truncated", tokens=len(ids) - self.longest, reason=reason)
                ids = self._cut(encoding)
            ledger.add("tokenize", "kept", tokens=len(ids))
            rows.append({"tokens": np.array(ids), "label": np.array(self._index[label])})
        return rows

    def _cut(self, encoding: Any) -> list[int]:
        """The first `longest` tokens; the special ones that end the text stay."""
        ids, special = list(encoding.ids), list(encoding.special_tokens_mask)
        ending = 0
        while ending < len(ids) and special[-1 - ending]:
            ending += 1
        return ids[: self.longest - ending] + ids[len(ids) - ending :]

    def tally(self, example: Example, row: Row) -> dict[str, int]:
        return {"tokens": len(row["tokens"])}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "classes": self.classes}

    def dataset(self, split: LabelledSplit, *, augment: bool = False) -> LabelledTexts:
        return LabelledTexts(self, split)

    def thinned(self, tokens: np.ndarray, draw: np.uint64) -> np.ndarray:
        """A text without the share `token_dropout` of its tokens, which follow from the draw; the
        special ones stay, and a text of which nothing else were left stays whole."""
        numbers = np.random.Philox(
            key=np.array([self.seed, draw], np.uint64), counter=[0, 0, 0, THINNED]
        ).random_raw(len(tokens))
        special = np.isin(tokens, self.tokenizer.all_special_ids)
        stays = (numbers >> np.uint64(11)) * 2.0**-53 >= self.left_out
        return tokens[stays | special] if (stays & ~special).any() else tokens

    def padded(self, texts: Sequence[np.ndarray]) -> Batch:
        """inputs input_ids and attention_mask, int64 (B, S), S the longest of these rows."""
        longest = max(len(text) for text in texts)
        ids = np.full((len(texts), longest), self.tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, is_token, text in zip(ids, mask, texts, strict=True):
            row[: len(text)], is_token[: len(text)] = text, 1
        return Batch(
            {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}, {}
        )

    def dummy_inputs(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(len(self.tokenizer), (rows, min(16, self.longest)), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        settings = {"classes": self.classes, "longest": self.longest}
        write_json(folder / "processor.json", settings)

    @classmethod
    def from_pretrained(cls, folder: Path, recipe: Any) -> Self:
        settings = read_json(folder / "processor.json", LabelledProcessor)
        tokenizer = load_tokenizer(str(folder), "data", needs_eos=False)
        return cls(tokenizer, settings["classes"], settings["longest"], recipe)


class LabelledTexts:
    """The rows of a split, a text each."""

    reference: np.ndarray | None = None

    def __init__(self, processor: LabelledTextProcessor, split: LabelledSplit):
        self.processor, self.split = processor, split
        self.lengths = np.ones(len(split), np.int64)
        self.items: np.ndarray = processor.weights[np.asarray(split.label)]

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, rows: Iterable[int], draws: np.ndarray | None = None) -> Batch:
        """labels `target`, int64 (B,), and `weight`, float32 (B,)."""
        found = [self.split.row(int(k)) for k in rows]
        texts = [np.asarray(row["tokens"], np.int64) for row in found]
        if draws is not None and self.processor.left_out:
            texts = [self.processor.thinned(*pair) for pair in zip(texts, draws, strict=True)]
        targets, weights = [int(row["label"]) for row in found], [self.items[int(k)] for k in rows]
        if not found:
            texts, targets, weights = [np.full(1, self.processor.tokenizer.pad_token_id)], [0], [0]
        return Batch(
            self.processor.padded(texts).inputs,
            {"target": torch.tensor(targets), "weight": torch.tensor(weights, dtype=torch.float32)},
        )


def classes_of(counts: Mapping[str, int], log: Callable[[str], None]) -> dict[str, int]:
    """The classes of the training split, sorted, with how often each is there.

    Raises:
        UserError: there are fewer than two.
    """
    if len(counts) < 2:
        found = ", ".join(f'"{label}"' for label in counts) or "none"
        raise UserError(
            f"data.sources: the training split has one class only ({found}); a classifier "
            "needs two and more"
        )
    classes = {label: counts[label] for label in sorted(counts)}
    log("classes: " + ", ".join(f"{label} {count:,}" for label, count in classes.items()))
    return classes


def class_weights(classes: dict[str, int], asked: str | dict[str, float] | None) -> np.ndarray:
    """What a row of each class counts: 1, or for "balanced" n / (k · its rows), as scikit-learn
    has it, or what the recipe says of it.

    Raises:
        UserError: the recipe names a class that the training split does not have.
    """
    if asked is None:
        return np.ones(len(classes))
    if isinstance(asked, str):
        rows = sum(classes.values())
        return np.array([rows / (len(classes) * count) for count in classes.values()])
    for label in asked:
        if label not in classes:
            raise UserError(
                f'objective.class_weights: the training split has no class "{label}"; there are '
                f"{', '.join(classes)}.{did_you_mean(label, list(classes))}"
            )
    return np.array([asked.get(label, 1.0) for label in classes])
