"""Train, validation and test by content hash.

A document's side is a function of its content alone: no seed, no order, no neighbours. So it
stays where it is when documents are added or removed, and the same file is held out in every
recipe that asks for the same shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..recipe import Split
from .document import Document, Ledger

SPLITS = ("train", "validation", "test")
LONGEST_JOINED = 1 << 20  # characters; keeps one huge text from becoming one huge document


def side(group: bytes, shares: Split) -> str:
    """The split that a content hash falls into; its first 8 bytes are a number in [0, 1)."""
    position = int.from_bytes(group[:8], "big") / 2**64
    if position < shares.test:
        return "test"
    return "validation" if position < shares.test + shares.validation else "train"


def assign(
    documents: Iterable[Document], shares: Split, ledger: Ledger
) -> Iterator[tuple[str, Document]]:
    """Pairs (split, document); neighbouring blocks of one file on one side are joined again."""
    waiting: tuple[str, Document] | None = None
    for document in documents:
        ledger.add("split", "in")
        assert document.group is not None  # deduplicate has set it
        name = side(document.group, shares)
        if waiting is not None:
            last_name, last = waiting
            room = LONGEST_JOINED - len(last.text) - len(document.text)
            if document.follows and last_name == name and room >= 0:
                last.text += document.text
                ledger.add("split", "joined", reason="to the block before it in its file")
                continue
            ledger.add("split", last_name)
            yield waiting
        waiting = (name, document)
    if waiting is not None:
        ledger.add("split", waiting[0])
        yield waiting
