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
    parts: list[str] = []  # of the document that is waiting for its end
    length = 0
    waiting: tuple[str, Document] | None = None

    def complete(name: str, document: Document) -> tuple[str, Document]:
        if len(parts) > 1:
            document.text = "".join(parts)
        ledger.add("split", name)
        return name, document

    for document in documents:
        ledger.add("split", "in")
        assert document.group is not None  # deduplicate has set it
        name = side(document.group, shares)
        if waiting is not None:
            fits = length + len(document.text) <= LONGEST_JOINED
            if document.follows and name == waiting[0] and fits:
                parts.append(document.text)
                length += len(document.text)
                ledger.add("split", "joined", reason="to the block before it in its file")
                continue
            yield complete(*waiting)
        waiting, parts, length = (name, document), [document.text], len(document.text)
    if waiting is not None:
        yield complete(*waiting)
