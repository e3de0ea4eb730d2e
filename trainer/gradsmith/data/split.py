"""Train, validation and test by content hash.

A document's side is a function of its content alone: no seed, no order, no neighbours. So it
stays where it is when documents are added or removed, and the same file is held out in every
recipe that asks for the same shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..recipe import Split
from .example import Example, Ledger

SPLITS = ("train", "validation", "test")
LONGEST_JOINED = 1 << 20  # characters; keeps one huge text from becoming one huge document


def side(group: bytes, shares: Split) -> str:
    """The split that a content hash falls into; its first 8 bytes are a number in [0, 1)."""
    position = int.from_bytes(group[:8], "big") / 2**64
    if position < shares.test:
        return "test"
    return "validation" if position < shares.test + shares.validation else "train"


def assign(
    documents: Iterable[Example], shares: Split, ledger: Ledger
) -> Iterator[tuple[str, Example]]:
    """Pairs (split, document); neighbouring blocks of one file on one side are joined again."""
    parts: list[str] = []  # of the document that is waiting for its end
    length = 0
    waiting: tuple[str, Example] | None = None

    def complete(name: str, document: Example) -> tuple[str, Example]:
        if len(parts) > 1:
            document.content = "".join(parts)
        ledger.add("split", name)
        return name, document

    for document in documents:
        ledger.add("split", "in")
        assert document.group is not None  # deduplicate has set it
        name = side(document.group, shares)
        if waiting is not None:
            joins = document.follows and name == waiting[0]
            if joins and length + len(document.text) <= LONGEST_JOINED:
                parts.append(document.text)
                length += len(document.text)
                ledger.add("split", "joined", reason="to the block before it in its file")
                continue
            yield complete(*waiting)
        waiting = name, document
        parts = [document.content] if isinstance(document.content, str) else []
        length = sum(map(len, parts))
    if waiting is not None:
        yield complete(*waiting)
