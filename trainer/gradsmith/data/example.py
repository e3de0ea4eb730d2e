"""What flows through `prepare`: examples, and the ledger of what became of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..errors import RunError

Messages = list[dict[str, str]]


@dataclass(slots=True)
class Example:
    """A text, a conversation, or a record of named fields, and where it stands.

    `group` decides on which side of the split it goes, `None` meaning by its own content.
    `follows` says that it continues the text before it, in the same file.
    """

    source: str
    content: str | Messages | dict[str, Any]
    group: bytes | None = None
    follows: bool = False

    @property
    def text(self) -> str:
        assert isinstance(self.content, str)
        return self.content

    @property
    def messages(self) -> Messages:
        assert isinstance(self.content, list)
        return self.content

    @property
    def fields(self) -> dict[str, Any]:
        assert isinstance(self.content, dict)
        return self.content

    def digest(self) -> bytes:
        return content_digest(self.content)

    def to_json(self) -> dict[str, Any]:
        key = {str: "text", list: "messages", dict: "fields"}[type(self.content)]
        return {key: self.content, "source": self.source}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Example:
        key = next(key for key in ("text", "messages", "fields") if key in row)
        return cls(row["source"], row[key])


def content_digest(content: str | Messages | dict[str, Any]) -> bytes:
    """16 bytes of SHA-256 over the text, or over the canonical JSON of anything else.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair (JSON's "\\ud83d" alone).
    """
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]


@dataclass(frozen=True)
class Dropped:
    """Why an example goes no further.

    Attributes:
        step: where it left, a step of the ledger.
        reason: why, for a person.
    """

    step: str
    reason: str


class Ledger:
    """Counts of everything that came in, left, or was changed, each with its reason.

    In each step the documents that came "in" equal those that left: "dropped", "joined" to a
    neighbour, or went on ("kept", or into one of the splits). "truncated" documents go on, so
    only their lost tokens count; "masked" and "kept" tokens of the step "targets" add up the same
    way. A step's "in" is what the step before let go on.
    """

    STEPS = (
        "read", "extract", "clean", "deduplicate", "split", "vocabulary", "render", "tokenize",
        "length", "targets", "encode",
    )  # fmt: skip
    LEAVES = frozenset({"dropped", "joined", "kept", "train", "validation", "test"})

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str, str], list[int]] = {}

    def add(
        self,
        step: str,
        what: str,
        documents: int = 1,
        *,
        tokens: int = 0,
        reason: str = "",
        source: str = "",
    ) -> None:
        count = self._counts.setdefault((step, what, reason, source), [0, 0])
        count[0] += documents
        count[1] += tokens

    def drop(self, step: str, reason: str, *, tokens: int = 0) -> Dropped:
        """Counts an example that leaves at a step, and says why it does."""
        self.add(step, "dropped", tokens=tokens, reason=reason)
        return Dropped(step, reason)

    def merge(self, other: Ledger) -> None:
        """Adds what another one counted."""
        for key, counts in other._counts.items():
            mine = self._counts.setdefault(key, [0, 0])
            mine[0] += counts[0]
            mine[1] += counts[1]

    def rows(self) -> list[dict[str, Any]]:
        """Rows with step, what, documents, and where they say something tokens, reason, source."""
        rows = []
        for (step, what, reason, source), (documents, tokens) in sorted(
            self._counts.items(), key=lambda item: self.STEPS.index(item[0][0])
        ):
            row: dict[str, Any] = {"step": step, "what": what, "documents": documents}
            row |= {"tokens": tokens} if tokens else {}
            row |= {"reason": reason} if reason else {}
            row |= {"source": source} if source else {}
            rows.append(row)
        return rows

    def check(self) -> None:
        """Raises RunError unless every step's counts add up."""
        for step in self.STEPS:
            came, left, came_tokens, left_tokens = 0, 0, 0, 0
            for (at, what, _, _), (documents, tokens) in self._counts.items():
                if at != step:
                    continue
                if what == "in":
                    came, came_tokens = came + documents, came_tokens + tokens
                elif what in self.LEAVES:
                    left, left_tokens = left + documents, left_tokens + tokens
                else:
                    left_tokens += tokens
            if came != left or (came_tokens and came_tokens != left_tokens):
                raise RunError(
                    f"the data ledger does not add up at {step}: {came} documents and "
                    f"{came_tokens} tokens came in, {left} and {left_tokens} are accounted for"
                )
