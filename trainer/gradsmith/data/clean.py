"""Drops what nothing can be learned from, and exact duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..recipe import Clean
from .example import Example, Ledger


def clean(documents: Iterable[Example], settings: Clean, ledger: Ledger) -> Iterator[Example]:
    """Drops texts shorter than `min_characters`; of a conversation, its answers are measured."""
    for document in documents:
        ledger.add("clean", "in")
        reason = _reason_to_drop(document, settings.min_characters)
        if reason:
            ledger.add("clean", "dropped", reason=reason)
        else:
            ledger.add("clean", "kept")
            yield document


def _reason_to_drop(document: Example, min_characters: int) -> str:
    if isinstance(document.content, dict):  # its own processor knows what is to be in it
        return ""
    if isinstance(document.content, str):
        length, what = len(document.content), "text"
    else:
        answers = [m["content"] for m in document.messages if m["role"] == "assistant"]
        if not any(answers):
            return "no answer in it"
        length, what = sum(map(len, answers)), "answer"
    if length < min_characters:
        return f"{what} shorter than clean.min_characters ({min_characters})"
    return ""


def deduplicate(documents: Iterable[Example], drop: bool, ledger: Ledger) -> Iterator[Example]:
    """Drops documents that occurred before; with `drop` off they follow the first one's group.

    Either way, no content stands on two sides of the split. Keeps 32 bytes of hashes a document
    in memory.
    """
    groups: dict[bytes, bytes] = {}
    for document in documents:
        ledger.add("deduplicate", "in")
        digest = document.digest()
        first = groups.get(digest)
        if first is not None and drop:
            ledger.add("deduplicate", "dropped", reason="exact duplicate")
            continue
        document.group = first or document.group or digest
        groups.setdefault(digest, document.group)
        ledger.add("deduplicate", "kept")
        yield document
