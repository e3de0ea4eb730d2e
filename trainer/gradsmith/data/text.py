"""Texts and conversations -> tokens -> rows that a language model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ..errors import UserError
from ..files import file_entry, files_in
from ..shapes import TextManifest
from .chat import CHATML, prompt_of, render
from .columns import Column, Columns
from .example import Dropped, Example, Ledger, Messages, content_digest
from .files import decode
from .packing import Sequences
from .processor import Processor, Row
from .readers import messages_of, string
from .tokenizer import (
    TOKENIZER_FILES,
    find_tokenizer,
    load_tokenizer,
    special_tokens_as_text,
    token_bytes,
    train_tokenizer,
)

SPECIAL = "has the text of a special token in it"  # why an example is dropped


class TokenSplit(Columns):
    """A split of documents: `tokens`, `offsets` and, for chat, `targets`."""

    tokens: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray | None = None

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether each counts in the loss); in language modelling all but the first do."""
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        if self.targets is not None:
            return self.tokens[start:stop], self.targets[start:stop]
        is_target = np.ones(stop - start, np.bool_)
        is_target[:1] = False
        return self.tokens[start:stop], is_target


class TextProcessor(Processor):
    """BOS + text + EOS; every token but BOS is a target.

    Args:
        tokenizer: a transformers PreTrainedTokenizerFast with EOS and PAD.
        recipe: gives the length of a row, and packing.
    """

    folder = "tokenizer"
    manifest_shape = TextManifest
    split_class = TokenSplit
    noun = "documents"
    counted = ("tokens", "target_tokens", "bytes", "eos_targets")

    def __init__(self, tokenizer: Any, recipe: Any):
        self.tokenizer, self.data = tokenizer, recipe.data
        self.columns = self.stored({"vocab_size": len(tokenizer)})

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 (V,); special tokens 0."""
        return token_bytes(self.tokenizer)

    @classmethod
    def check_source(cls, source: Any, where: str) -> None:
        for key in ("prompt", "messages"):
            if getattr(source, key) is not None:
                raise UserError(
                    f"{where}.{key}: goes with data.task chat; the task is language_modeling, "
                    "which reads the key that `text` names"
                )

    @classmethod
    def reads(cls, source: Any) -> list[str]:
        return [source.text]

    @classmethod
    def example(cls, row: dict[str, Any], at: str, source: Any) -> Example:
        return Example(at, string(row, source.text, at))

    @classmethod
    def inputs(cls, recipe: Any) -> dict[str, Any]:
        template = recipe.data.chat.template
        entry = file_entry(_template_file(template)) if template else None
        return {**tokenizer_inputs(recipe), "template_from": entry}

    @classmethod
    def check(cls, recipe: Any) -> None:
        template = recipe.data.chat.template
        check_tokenizer(recipe)
        if template is not None and not Path(template).is_file():
            raise UserError(f"data.chat.template: {template}: no such file")

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
        return cls(tokenizer, recipe)

    @classmethod
    def stored(cls, manifest: dict[str, Any]) -> dict[str, Column]:
        ids = "<u2" if manifest["vocab_size"] <= 1 << 16 else "<u4"
        return {"tokens": Column(ids, offsets="offsets")}

    def encode(self, examples: Sequence[Example], ledger: Ledger) -> list[Row | Dropped]:
        bos, eos = bos_id(self.tokenizer), self.tokenizer.eos_token_id
        with special_tokens_as_text(self.tokenizer) as backend:
            encodings = backend.encode_batch_fast(
                [example.text for example in examples], add_special_tokens=False
            )
        rows: list[Row | Dropped] = []
        for encoding in encodings:
            ids = np.array([bos, *encoding.ids, eos])
            ledger.add("tokenize", "in")
            ledger.add("tokenize", "kept", tokens=len(ids))
            self._check_eos(ids[1:], ledger)
            rows.append({"tokens": ids})
        return rows

    def _check_eos(self, in_loss: np.ndarray, ledger: Ledger) -> None:
        if not (in_loss == self.tokenizer.eos_token_id).any():
            reason = "no EOS in the loss: nothing teaches the model to stop"
            ledger.add("targets", "without EOS", reason=reason)

    def tally(self, example: Example, row: Row) -> dict[str, int]:
        in_loss = row["tokens"][1:]
        return self._counts(row["tokens"], in_loss, len(example.text.encode()))

    def _counts(self, ids: np.ndarray, in_loss: np.ndarray, size: int) -> dict[str, int]:
        """What the manifest sums; `size` is the UTF-8 bytes that the targets stand for."""
        return {
            "tokens": len(ids),
            "target_tokens": len(in_loss),
            "bytes": size,
            "eos_targets": int((in_loss == self.tokenizer.eos_token_id).sum()),
        }

    masked = "BOS, which nothing comes before"

    def account(self, counts: dict[str, int], ledger: Ledger) -> None:
        tokens, targets = counts["tokens"], counts["target_tokens"]
        ledger.add("targets", "in", counts["documents"], tokens=tokens)
        ledger.add("targets", "kept", counts["documents"], tokens=targets)
        ledger.add("targets", "masked", 0, tokens=tokens - targets, reason=self.masked)

    def describe(self) -> dict[str, Any]:
        return {
            "vocab_size": len(self.tokenizer),
            "bos_id": bos_id(self.tokenizer),
            "eos_id": self.tokenizer.eos_token_id,
            "pad_id": self.tokenizer.pad_token_id,
            "sequence_length": self.data.sequence_length,
        }

    def dataset(self, split: TokenSplit, *, augment: bool = False) -> Sequences:
        length, packing = self.data.sequence_length, self.data.packing
        return Sequences(split, length, packing, self.data.task, self.tokenizer.pad_token_id)

    def dummy_inputs(self, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(len(self.tokenizer), (rows, 64), generator=generator)
        return {"input_ids": ids}

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path, recipe: Any) -> Self:
        return cls(load_tokenizer(str(folder), "data"), recipe)


class ChatProcessor(TextProcessor):
    """A conversation in the chat template; the answers' tokens are the targets."""

    noun = "conversations"
    masked = "prompt and template"

    def __init__(self, tokenizer: Any, recipe: Any):
        super().__init__(tokenizer, recipe)
        self._special = special_tokens(tokenizer)

    @classmethod
    def check_source(cls, source: Any, where: str) -> None:
        if source.kind == "text":
            raise UserError(
                f"{where}.kind: text has no questions and answers; task chat takes jsonl, parquet "
                "and hf_dataset (with prompt and response, or messages) and python_stdlib"
            )

    @classmethod
    def reads(cls, source: Any) -> list[str]:
        if source.prompt is not None and source.response is not None:
            return [source.prompt, source.response]
        return [source.messages or "messages"]

    @classmethod
    def example(cls, row: dict[str, Any], at: str, source: Any) -> Example:
        if source.prompt is None or source.response is None:
            return Example(at, messages_of(row, source.messages or "messages", at))
        return Example(
            at,
            [
                {"role": "user", "content": string(row, source.prompt, at)},
                {"role": "assistant", "content": string(row, source.response, at)},
            ],
        )

    @classmethod
    def group_of(cls, example: Example) -> bytes:
        """Conversations with one prompt stay together: no question is on two sides."""
        return content_digest(prompt_of(example.messages))

    @classmethod
    def stored(cls, manifest: dict[str, Any]) -> dict[str, Column]:
        return super().stored(manifest) | {"targets": Column("|b1", offsets="offsets")}

    def encode(self, examples: Sequence[Example], ledger: Ledger) -> list[Row | Dropped]:
        rendered = [self._render(example, ledger) for example in examples]
        texts = [found[0] for found in rendered if not isinstance(found, Dropped)]
        encodings = iter(
            self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        )
        rows: list[Row | Dropped] = []
        for example, found in zip(examples, rendered, strict=True):
            if isinstance(found, Dropped):
                rows.append(found)
                continue
            encoding = next(encodings)
            ids = np.array(encoding.ids, np.int64)
            first, last = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            targets = np.zeros(len(ids), np.bool_)
            for start, end in found[1]:  # a token over the edge, as " word" may be, counts
                targets |= (first < end) & (last > start)
            targets[:1] = False  # nothing comes before the first token
            ledger.add("tokenize", "in")
            ledger.add("tokenize", "kept", tokens=len(ids))
            kept = self._fit(len(ids), targets, example.source, ledger)
            if isinstance(kept, Dropped):
                rows.append(kept)
            else:
                ids, targets = ids[:kept], targets[:kept]
                self._check_eos(ids[targets], ledger)
                rows.append({"tokens": ids, "targets": targets})
        return rows

    def _render(
        self, example: Example, ledger: Ledger
    ) -> tuple[str, list[tuple[int, int]]] | Dropped:
        """The conversation's text with the recipe's system message, and its answers' places."""
        messages, system = example.messages, self.data.chat.system
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        ledger.add("render", "in")
        if holds_special(self._special, messages):
            return ledger.drop("render", SPECIAL)
        ledger.add("render", "kept")
        return render(self.tokenizer, messages, example.source)

    def _fit(self, length: int, targets: np.ndarray, source: str, ledger: Ledger) -> int | Dropped:
        """How many of an example's tokens are kept.

        Its last token is only ever a label, so sequence_length + 1 tokens fit.

        Raises:
            UserError: it is over length and the recipe says refuse.
        """
        room, over_length = self.data.sequence_length + 1, self.data.chat.over_length
        ledger.add("length", "in", tokens=length)
        kept, reason = length, "no answer's token in it"
        if length > room:
            if over_length == "refuse":
                raise UserError(
                    f"data.chat.over_length: {source} has {length} tokens, and "
                    f"data.sequence_length {self.data.sequence_length} takes {room}; "
                    "allowed are a larger sequence_length, or drop or truncate here"
                )
            kept, reason = room, f"longer than {room} tokens"
            if over_length == "drop":
                return ledger.drop("length", reason, tokens=length)
            ledger.add("length", "truncated", tokens=length - kept, reason=reason)
            reason = "no answer's token left after truncation"
        if not targets[:kept].any():
            return ledger.drop("length", reason, tokens=kept)
        ledger.add("length", "kept", tokens=kept)
        return kept

    def tally(self, example: Example, row: Row) -> dict[str, int]:
        in_loss = row["tokens"][row["targets"]]
        return self._counts(row["tokens"], in_loss, int(self.token_bytes[in_loss].sum()))


# -------------------------------------------------------------------------------- the tokenizer


def tokenizer_place(recipe: Any) -> tuple[str, str] | None:
    """(folder or hub name, the recipe's key) of a tokenizer that is taken and not trained."""
    settings = recipe.data.tokenizer
    if settings is not None and settings.train is not None:
        return None
    key, path = "model.from", recipe.model.from_
    if settings is not None:
        key, path = "data.tokenizer.from", settings.from_
    assert path is not None  # the recipe has one of them
    return find_tokenizer(path, key), key


def fit_tokenizer(
    recipe: Any,
    examples: Callable[[], Iterable[Example]],
    ledger: Ledger,
    log: Callable[[str], None],
    *,
    needs_eos: bool = True,
) -> Any:
    """The tokenizer that the recipe names, or one trained on the examples' texts."""
    place = tokenizer_place(recipe)
    if place is not None:
        return load_tokenizer(*place, needs_eos=needs_eos)
    assert recipe.data.tokenizer is not None
    assert recipe.data.tokenizer.train is not None
    asked = recipe.data.tokenizer.train.vocab_size
    log(f"training a tokenizer of {asked:,} tokens on the training split")
    tokenizer = train_tokenizer(_texts(examples()), asked)
    if len(tokenizer) < asked:
        reason = f"asked for {asked}; the training split has no more pairs to merge"
        ledger.add("vocabulary", "smaller", 0, tokens=len(tokenizer), reason=reason)
        log(f"the vocabulary has {len(tokenizer):,} tokens: {reason}")
    return tokenizer


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    for example in examples:
        content = example.content
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (message["content"] for message in content)
        else:
            yield from (value for value in content.values() if isinstance(value, str))


def bos_id(tokenizer: Any) -> int:
    """What a document starts with: BOS, or in a vocabulary without one EOS, as in GPT-2."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def add_template(tokenizer: Any, recipe: Any) -> None:
    """Gives a tokenizer the recipe's chat template; else it keeps its own, or gets ChatML."""
    template = recipe.data.chat.template
    if template is not None:
        file = _template_file(template)
        tokenizer.chat_template = decode(file.read_bytes(), file)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of the special tokens."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special]


def holds_special(special: Sequence[str], messages: Messages) -> bool:
    """Whether a message has the text of a special token in it: once rendered it would be the
    token, and could end or begin a turn."""
    return any(token in message["content"] for message in messages for token in special)


def check_tokenizer(recipe: Any, *, needs_eos: bool = True) -> None:
    """
    Raises:
        UserError: the recipe takes a tokenizer that is here, and cannot be loaded.
    """
    place = tokenizer_place(recipe)
    if place is not None and Path(place[0]).is_dir():
        load_tokenizer(*place, needs_eos=needs_eos)


def tokenizer_inputs(recipe: Any) -> dict[str, Any]:
    """The files of a tokenizer that is taken, with hashes."""
    place = tokenizer_place(recipe)
    return {"tokenizer_from": files_in(Path(place[0]), TOKENIZER_FILES) if place else None}


def _template_file(template: str) -> Path:
    path = Path(template)
    if not path.is_file():
        raise UserError(f"data.chat.template: no file {template} (from {Path.cwd()})")
    return path
