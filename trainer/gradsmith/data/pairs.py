"""Preferences -> the token ids of a prompt with each of its two answers.

Letters: B pairs of a batch, P sequences of a pair (its two sides, and for KTO a third), S the
longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from ..errors import UserError
from ..files import write_json
from ..reading import read_json
from ..shapes import PairSettings
from .chat import render
from .columns import Column, Columns
from .example import Dropped, Example, Ledger, Messages, content_digest
from .packing import IGNORED
from .processor import Batch, Processor, Row
from .readers import messages_of, value_of
from .text import (
    SPECIAL,
    TextProcessor,
    add_template,
    fit_tokenizer,
    holds_special,
    special_tokens,
)
from .tokenizer import load_tokenizer

SIDES = ("chosen", "rejected")


class PairSplit(Columns):
    """The token ids of both sides, each with its prompt, and where its answer starts."""

    chosen: np.ndarray
    chosen_offsets: np.ndarray
    chosen_start: np.ndarray
    rejected: np.ndarray
    rejected_offsets: np.ndarray
    rejected_start: np.ndarray


class PairProcessor(Processor):
    """Prompt and answer in the chat template; an answer's tokens are its targets.

    Args:
        tokenizer: a transformers PreTrainedTokenizerFast with EOS and PAD.
        longest: tokens of a sequence at most.
        system: what the prompts begin with that have no system message.
        over_length: what happens to a pair with a longer side: drop, truncate or refuse.
        unpaired: whether a batch has, as a third sequence, each prompt with an answer to another:
            what KTO estimates its divergence on.
    """

    noun = "pairs"
    counted: ClassVar[tuple[str, ...]] = ("tokens", "target_tokens")
    split_class = PairSplit
    columns: Mapping[str, Column] = {
        "chosen": Column("<u4", offsets="chosen_offsets"),
        "chosen_start": Column("<i4"),
        "rejected": Column("<u4", offsets="rejected_offsets"),
        "rejected_start": Column("<i4"),
    }

    def __init__(
        self,
        tokenizer: Any,
        longest: int,
        system: str | None = None,
        over_length: str = "drop",
        *,
        unpaired: bool = False,
    ):
        self.tokenizer, self.longest, self.system = tokenizer, longest, system
        self.over_length, self.unpaired = over_length, unpaired
        self._special = special_tokens(tokenizer)

    @classmethod
    def reads(cls, source: Any) -> list[str]:
        return [source.prompt, source.chosen, source.rejected]

    @classmethod
    def example(cls, row: dict[str, Any], at: str, source: Any) -> Example:
        """The prompt is text or messages; an answer text, or messages of which it is the last."""
        prompt = value_of(row, source.prompt, at)
        if not isinstance(prompt, str):
            prompt = messages_of(row, source.prompt, at)
        fields: dict[str, Any] = {"prompt": prompt}
        for name, key in zip(SIDES, (source.chosen, source.rejected), strict=True):
            answer = value_of(row, key, at)
            if not isinstance(answer, str):
                answer = messages_of(row, key, at)[-1]["content"]
            fields[name] = answer
        return Example(at, fields)

    @classmethod
    def group_of(cls, example: Example) -> bytes:
        """Pairs of one prompt stay together: no question is on two sides."""
        return content_digest(example.fields["prompt"])

    @classmethod
    def inputs(cls, recipe: Any) -> dict[str, Any]:
        return TextProcessor.inputs(recipe)

    @classmethod
    def check(cls, recipe: Any) -> None:
        TextProcessor.check(recipe)

    @classmethod
    def _of(cls, tokenizer: Any, recipe: Any, longest: int, system: str | None) -> Self:
        unpaired = recipe.objective.name == "kto"
        return cls(tokenizer, longest, system, recipe.data.chat.over_length, unpaired=unpaired)

    @classmethod
    def fit(
        cls,
        recipe: Any,
        examples: Callable[[], Iterable[Example]],
        ledger: Ledger,
        log: Callable[[str], None],
    ) -> Self:
        tokenizer = fit_tokenizer(recipe, examples, ledger, log)
        add_template(tokenizer, recipe)
        return cls._of(tokenizer, recipe, recipe.data.sequence_length, recipe.data.chat.system)

    def encode(self, examples: Sequence[Example], ledger: Ledger) -> list[Row | Dropped]:
        return [self._encode(example, ledger) for example in examples]

    def _encode(self, example: Example, ledger: Ledger) -> Row | Dropped:
        prompt, sides = self.conversation(example.fields)
        ledger.add("render", "in")
        if sides[0] == sides[1]:
            return ledger.drop("render", "both answers are the same")
        if holds_special(self._special, [*prompt, *sides]):
            return ledger.drop("render", SPECIAL)
        ledger.add("render", "kept")
        row: Row = {}
        size = 0
        for name, answer in zip(SIDES, sides, strict=True):
            text, spans = render(self.tokenizer, [*prompt, answer], example.source)
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            _, last = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            # a token over the edge, as " word" may be, is the answer's; nothing is before the first
            start = max(1, int(np.searchsorted(last, spans[-1][0], side="right")))
            row |= {name: np.array(encoding.ids, np.int64), f"{name}_start": np.array(start)}
            size += len(encoding.ids)
        ledger.add("tokenize", "in")
        ledger.add("tokenize", "kept", tokens=size)
        ledger.add("length", "in", tokens=size)
        if max(len(row[name]) for name in SIDES) > self.longest:
            reason = f"a side is longer than {self.longest} tokens"
            if self.over_length == "refuse":
                raise UserError(
                    f"data.chat.over_length: {example.source}: {reason}; allowed are a larger "
                    "data.sequence_length, or drop or truncate here"
                )
            if max(int(row[f"{name}_start"]) for name in SIDES) >= self.longest:
                reason = "its prompt alone fills data.sequence_length"
                return ledger.drop("length", reason, tokens=size)
            if self.over_length == "drop":
                return ledger.drop("length", reason, tokens=size)
            row |= {name: row[name][: self.longest] for name in SIDES}
            kept = sum(len(row[name]) for name in SIDES)
            ledger.add("length", "truncated", tokens=size - kept, reason=reason)
            size = kept
        ledger.add("length", "kept", tokens=size)
        return row

    def conversation(self, fields: dict[str, Any]) -> tuple[Messages, list[dict[str, str]]]:
        """The prompt's messages, and the message of each side."""
        prompt = fields["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return messages, [{"role": "assistant", "content": fields[name]} for name in SIDES]

    def tally(self, example: Example, row: Row) -> dict[str, int]:
        tokens = sum(len(row[name]) for name in SIDES)
        prompts = sum(int(row[f"{name}_start"]) for name in SIDES)
        return {"tokens": tokens, "target_tokens": tokens - prompts}

    def dataset(self, split: PairSplit, *, augment: bool = False) -> Pairs:
        return Pairs(self, split)

    def padded(self, pairs: Sequence[Sequence[tuple[np.ndarray, int]]]) -> Batch:
        """input_ids and the labels `targets`, int64 (B, P, S): what follows a place in an answer,
        -100 elsewhere. Padding stands behind the answers, where no place of theirs sees it."""
        longest = max(len(ids) for pair in pairs for ids, _ in pair)
        shape = len(pairs), len(pairs[0]), longest
        ids = np.full(shape, self.tokenizer.pad_token_id, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        for b, pair in enumerate(pairs):
            for p, (tokens, start) in enumerate(pair):
                ids[b, p, : len(tokens)] = tokens
                targets[b, p, start - 1 : len(tokens) - 1] = tokens[start:]
        return Batch({"input_ids": torch.from_numpy(ids)}, {"targets": torch.from_numpy(targets)})

    def dummy_inputs(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(
            len(self.tokenizer), (rows, 2, min(16, self.longest)), generator=generator
        )
        return {"input_ids": ids}

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        settings = {"longest": self.longest, "system": self.system}
        write_json(folder / "processor.json", settings)

    @classmethod
    def from_pretrained(cls, folder: Path, recipe: Any) -> Self:
        settings = read_json(folder / "processor.json", PairSettings)
        tokenizer = load_tokenizer(str(folder), "data")
        return cls._of(tokenizer, recipe, settings["longest"], settings["system"])


class Pairs:
    """The pairs of a split.

    Attributes:
        reference: float32 (rows, P), the log-probability of each answer under the model that
            training began with; None until it is known.
    """

    reference: np.ndarray | None = None

    def __init__(self, processor: PairProcessor, split: PairSplit):
        self.processor, self.split = processor, split
        self.lengths = np.ones(len(split), np.int64)
        self.items = np.ones(len(split))

    def __len__(self) -> int:
        return len(self.items)

    def _pair(self, k: int) -> list[tuple[np.ndarray, int]]:
        row = self.split.row(k)
        pair = [(np.asarray(row[name], np.int64), int(row[f"{name}_start"])) for name in SIDES]
        if self.processor.unpaired:
            (ids, start), other = pair[0], self.split.row((k + 1) % len(self))
            answer = np.asarray(other["chosen"], np.int64)[int(other["chosen_start"]) :]
            pair.append((np.concatenate([ids[:start], answer])[: self.processor.longest], start))
        return pair

    def batch(self, rows: Iterable[int], draws: np.ndarray | None = None) -> Batch:
        """labels `targets`, int64 (B, P, S), `counts`, float32 (B,), 1 or for a batch that counts
        for nothing 0, and, once it is known, `reference`, float32 (B, P)."""
        places = [int(k) for k in rows]
        batch = self.processor.padded([self._pair(k) for k in places or [0]])
        batch.labels["counts"] = torch.full((max(1, len(places)),), float(bool(places)))
        if self.reference is not None:
            batch.labels["reference"] = torch.from_numpy(self.reference[places or [0]])
        return batch
