"""From documents to the fixed-length rows that a model reads.

A document of n tokens has n - 1 places where a next token can be predicted: its last token is
never an input. A row is a list of segments; a segment is a run of such places from one document,
with positions from 0, and labels never reach into the next segment. Letters: S sequence length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .processor import Batch

if TYPE_CHECKING:
    from .text import TokenSplit

IGNORED = -100  # a label that does not count in the loss


class Sequence(NamedTuple):
    """One row, three int64 arrays (S,). `labels[t]` is what to predict at t, or -100."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


class Sequences:
    """The rows of a split; `[k]` reads one from the memory-mapped shard.

    ```
    language_modeling, packed      the documents' places in one stream, cut every S
    language_modeling, unpacked    each document's places, cut every S, each piece a row
    chat, packed                   whole examples, best-fit by decreasing length, never split
    chat, unpacked                 an example a row
    ```
    In all of them each target token is the label of exactly one place. The rest of a row is
    `pad_id` with label -100, as a segment of its own (its positions start again at 0).

    Attributes:
        lengths: inputs that are no padding, for each row, int64 (rows,).
        items: labels that count, for each row, int64 (rows,).
        target_tokens: their sum.

    Raises:
        ValueError: chat with an example of more than S + 1 tokens, which `prepare` lets through
            only for a larger sequence length.
    """

    reference: np.ndarray | None = None

    def __init__(
        self, split: TokenSplit, sequence_length: int, packing: bool, task: str, pad_id: int
    ):
        self.split, self.sequence_length, self.pad_id = split, sequence_length, pad_id
        offsets = np.asarray(split.offsets).astype(np.int64)
        places = np.maximum(np.diff(offsets) - 1, 0)
        if task == "chat":
            start, length, row = _whole(offsets, places, sequence_length, packing)
        elif packing:
            start, length, row = _stream(offsets, places, sequence_length)
        else:
            start, length, row = _pieces(offsets, places, sequence_length)
        rows = int(row[-1]) + 1 if len(row) else 0
        self._start, self._length = start, length
        self._first = np.searchsorted(row, np.arange(rows + 1))  # a row's first segment
        counts = length
        if split.targets is not None:
            # a segment is a whole example here, and its first token is no target
            by_document = np.add.reduceat(split.targets, offsets[:-1], dtype=np.int64)
            counts = by_document[np.searchsorted(offsets, start, side="right") - 1]
        self.lengths, self.items = np.zeros((2, rows), np.int64)
        np.add.at(self.lengths, row, length)
        np.add.at(self.items, row, counts)
        self.target_tokens = int(self.items.sum())

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> Sequence:
        if not -len(self) <= k < len(self):
            raise IndexError(f"row {k} of {len(self)}")
        k %= len(self)
        input_ids = np.full(self.sequence_length, self.pad_id, np.int64)
        labels = np.full(self.sequence_length, IGNORED, np.int64)
        position_ids = np.empty(self.sequence_length, np.int64)
        tokens, targets, at = self.split.tokens, self.split.targets, 0
        for segment in range(self._first[k], self._first[k + 1]):
            start, length = self._start[segment], self._length[segment]
            stop = at + length
            input_ids[at:stop] = tokens[start : start + length]
            following = tokens[start + 1 : start + 1 + length]
            if targets is None:
                labels[at:stop] = following
            else:
                is_target = targets[start + 1 : start + 1 + length]
                labels[at:stop] = np.where(is_target, following.astype(np.int64), IGNORED)
            position_ids[at:stop] = np.arange(length)
            at = stop
        position_ids[at:] = np.arange(self.sequence_length - at)
        return Sequence(input_ids, labels, position_ids)

    def batch(self, rows: Iterable[int], draws: np.ndarray | None = None) -> Batch:
        """inputs `input_ids`, `position_ids` and labels `labels`, all int64 (B, S); the labels are
        shifted already, and -100 does not count."""
        S = self.sequence_length
        empty = Sequence(np.full(S, self.pad_id), np.full(S, IGNORED), np.arange(S))
        found = [self[int(k)] for k in rows] or [empty]
        ids, labels, positions = (
            torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True)
        )
        return Batch({"input_ids": ids, "position_ids": positions}, {"labels": labels})


# Each returns, for all segments in the order of the rows: first token, length, row.
_Segments = tuple[np.ndarray, np.ndarray, np.ndarray]


def _stream(offsets: np.ndarray, places: np.ndarray, S: int) -> _Segments:
    ends = np.concatenate([[0], np.cumsum(places)])
    # a segment starts where a document or a row does
    cuts = np.union1d(ends, np.arange(0, ends[-1], S))
    start, length = cuts[:-1], np.diff(cuts)
    document = np.searchsorted(ends, start, side="right") - 1
    return offsets[document] + start - ends[document], length, start // S


def _pieces(offsets: np.ndarray, places: np.ndarray, S: int) -> _Segments:
    pieces = -(-places // S)
    document = np.repeat(np.arange(len(places)), pieces)
    first = np.cumsum(pieces) - pieces
    inside = (np.arange(len(document)) - first[document]) * S
    length = np.minimum(places[document] - inside, S)
    return offsets[document] + inside, length, np.arange(len(document))


def _whole(offsets: np.ndarray, places: np.ndarray, S: int, packing: bool) -> _Segments:
    if len(places) and places.max() > S:
        raise ValueError(
            f"sequence_length: an example of {places.max() + 1} tokens does not fit into {S}; "
            f"allowed is {places.max()} and more for this data"
        )
    document = np.flatnonzero(places)
    row = best_fit(places[document], S) if packing else np.arange(len(document))
    order = np.argsort(row, kind="stable")
    document = document[order]
    return offsets[document], places[document], row[order]


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing bin packing: the bin of each item, int64, bins counted from 0.

    Items go by decreasing length into the fullest bin that has room. All items of one length
    are placed together: once one is in the tightest bin that bin stays the tightest, so it takes
    as many as fit. That makes the loop as long as there are distinct (length, room) pairs.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    opened = 0
    with_room: dict[int, list[np.ndarray]] = {}  # room left -> bins
    rooms: list[int] = []  # its keys, ascending

    def put(room: int, which: np.ndarray) -> None:
        if len(which) and room:
            if room not in with_room:
                insort(rooms, room)
            with_room.setdefault(room, []).append(which)

    starts = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    for items in np.split(order, starts[1:]) if len(order) else []:
        length = int(lengths[items[0]])
        while len(items):
            tightest = bisect_left(rooms, length)
            if tightest < len(rooms):
                room = rooms.pop(tightest)
                which = np.concatenate(with_room.pop(room))
            else:
                room = capacity
                which = opened + np.arange(-(-len(items) // (capacity // length)))
                opened += len(which)
            each = room // length
            taken = min(len(items), each * len(which))
            full, left = divmod(taken, each)
            bins[items[:taken]] = np.repeat(which, each)[:taken]
            put(room - each * length, which[:full])
            put(room - left * length, which[full : full + 1] if left else which[:0])
            put(room, which[full + (left > 0) :])
            items = items[taken:]
    return bins
