"""Every target is predicted once, from its own document only.

Token ids are unique and consecutive within a document, so an id says which token it is.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsmith.data.columns import ColumnWriter
from gradsmith.data.packing import IGNORED, Sequences, best_fit
from gradsmith.data.text import ChatProcessor, TextProcessor, TokenSplit

PAD = 999_999
VOCAB = 1_000_000


def build(lengths: list[int], chat: bool, seed: int = 0) -> TokenSplit:
    """Documents of unique ids with a gap between two; in chat some tokens are targets."""
    random, at = np.random.default_rng(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        columns = (ChatProcessor if chat else TextProcessor).stored({"vocab_size": VOCAB})
        writer = ColumnWriter(Path(folder), columns)
        for length in lengths:
            targets = random.random(length) < 0.5
            targets[0] = False
            writer.add({"tokens": np.arange(at, at + length), "targets": targets})
            at += length + 1
        writer.close()
        return TokenSplit(Path(folder), columns)  # what is mapped outlives its name


def targets_of(split: TokenSplit) -> list[int]:
    return [
        int(token)
        for i in range(len(split))
        for token, is_target in zip(*split.document(i), strict=True)
        if is_target
    ]


documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(deadline=None, max_examples=150)
@given(lengths=documents, S=st.integers(2, 45), packing=st.booleans(), chat=st.booleans())
def test_each_target_is_one_label_and_nothing_leaks(lengths, S, packing, chat):
    if chat:
        lengths = [min(length, S + 1) for length in lengths]
    split = build(lengths, chat)
    rows = Sequences(split, S, packing, "chat" if chat else "language_modeling", PAD)
    labelled = []
    for k in range(len(rows)):
        ids, labels, positions = rows[k]
        assert ids.dtype == labels.dtype == positions.dtype == np.int64
        assert ids.shape == labels.shape == positions.shape == (S,)
        count = 0
        for t in range(S):
            p = int(positions[t])
            # what attention may see, position 0 up to here, is one run of one document
            assert positions[t - p] == 0
            if ids[t] != PAD:
                assert ids[t - p] == ids[t] - p
            else:
                assert p == 0 or ids[t - p] == PAD
                assert labels[t] == IGNORED
            if labels[t] != IGNORED:
                assert labels[t] == ids[t] + 1
                labelled.append(int(labels[t]))
                count += 1
        assert count == rows.items[k]
    assert Counter(labelled) == Counter(targets_of(split))
    assert rows.target_tokens == len(labelled)


@settings(deadline=None, max_examples=50)
@given(lengths=documents, S=st.integers(2, 45))
def test_packed_and_unpacked_chat_predict_from_the_same_contexts(lengths, S):
    split = build([min(length, S + 1) for length in lengths], chat=True)

    def predictions(packing: bool) -> Counter:
        rows = Sequences(split, S, packing, "chat", PAD)
        found = Counter()
        for ids, labels, positions in (rows[k] for k in range(len(rows))):
            for t in np.flatnonzero(labels != IGNORED):
                found[tuple(ids[t - positions[t] : t + 1].tolist()), int(labels[t])] += 1
        return found

    assert predictions(True) == predictions(False)


def test_packed_text_fills_every_row_but_the_last():
    rows = Sequences(build([10, 1, 7, 23], chat=False), 8, True, "language_modeling", PAD)
    # 9 + 0 + 6 + 22 places
    assert len(rows) == 5
    assert [int((rows[k].labels != IGNORED).sum()) for k in range(5)] == [8, 8, 8, 8, 5]
    ids, labels, positions = rows[1]
    # the tenth token of the first document is never an input; ids 10 and 12 are the gaps
    assert ids.tolist() == [8, 13, 14, 15, 16, 17, 18, 21]
    assert labels.tolist() == [9, 14, 15, 16, 17, 18, 19, 22]
    assert positions.tolist() == [0, 0, 1, 2, 3, 4, 5, 0]


def test_unpacked_long_text_goes_on_in_further_rows():
    rows = Sequences(build([12], chat=False), 8, False, "language_modeling", PAD)
    assert len(rows) == 2
    ids, labels, positions = rows[1]
    assert ids.tolist() == [8, 9, 10] + [PAD] * 5
    assert labels.tolist() == [9, 10, 11] + [IGNORED] * 5
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert rows[-1].input_ids.tolist() == ids.tolist()
    with pytest.raises(IndexError, match="row 2 of 2"):
        rows[2]


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="an example of 20 tokens does not fit into 16"):
        Sequences(build([5, 20], chat=True), 16, True, "chat", PAD)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 20), max_size=60).map(lambda x: np.array(x, np.int64)),
    capacity=st.integers(20, 50),
)
def test_best_fit_is_best_fit(lengths, capacity):
    bins = best_fit(lengths, capacity)
    loads = np.bincount(bins, lengths).astype(int) if len(lengths) else np.zeros(0, int)
    assert all(0 < load <= capacity for load in loads)
    # item by item, into the fullest bin with room
    room: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [b for b in range(len(room)) if room[b] >= length]
        if fits:
            room[min(fits, key=lambda b: room[b])] -= length
        else:
            room.append(capacity - length)
    assert sorted(capacity - load for load in loads) == sorted(room)
