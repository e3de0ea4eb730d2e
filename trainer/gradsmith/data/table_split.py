"""Which rows of a table are duplicates, and which split each goes to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .example import Ledger
from .table_kinds import BREAKS, Reading, amounts

DROPPED = -1
TRAIN, VALIDATION, TEST = range(3)  # places in SPLITS


@dataclass
class Keys:
    """What rows are told apart by; all but the names are (rows,).

    Attributes:
        names: the columns that a model may read.
        features: uint64: a hash of what a model may read.
        target, group, time, weight: text, null where there is none.
        keys: uint64: a hash of `clean.keys`.
    """

    names: list[str]
    features: np.ndarray
    target: pa.ChunkedArray
    group: pa.ChunkedArray | None = None
    time: pa.ChunkedArray | None = None
    weight: pa.ChunkedArray | None = None
    keys: np.ndarray | None = None


def duplicates(keys: Keys, clean: Any, ledger: Ledger) -> np.ndarray:
    """Rows that go no further, bool (rows,): without a target, or there before."""
    none = np.asarray(pc.is_null(keys.target))
    rows = len(none)
    ledger.add("clean", "in", rows)
    if none.any():
        ledger.add("clean", "dropped", int(none.sum()), reason="no target")
    ledger.add("clean", "kept", rows - int(none.sum()))
    ledger.add("deduplicate", "in", rows - int(none.sum()))
    dropped = none
    if clean.duplicates == "drop":
        there = np.flatnonzero(~none)
        again = np.zeros(rows, bool)
        again[there] = _repeats(_whole(keys, there))
        if again.any():
            what = "exact duplicate" if clean.keys is None else f"the {', '.join(clean.keys)} again"
            ledger.add("deduplicate", "dropped", int(again.sum()), reason=what)
        dropped = none | again
    ledger.add("deduplicate", "kept", int((~dropped).sum()))
    return dropped


def _whole(keys: Keys, rows: np.ndarray) -> np.ndarray:
    """A hash of what makes two rows duplicates, uint64 (rows,); of rows whose features come once
    that of the features will do."""
    if keys.keys is not None:
        return keys.keys[rows]
    whole = keys.features[rows]
    order = np.argsort(whole, kind="stable")
    same = whole[order[1:]] == whole[order[:-1]]
    several = order[np.append(same, False) | np.insert(same, 0, False)]
    taken = pa.array(rows[several])
    columns = (keys.target, keys.group, keys.time, keys.weight)
    others = [column.take(taken).to_pylist() for column in columns if column is not None]
    for place, cells in zip(several.tolist(), zip(*others, strict=True), strict=True):
        text = "\x1f".join(cell or "" for cell in cells)
        other = hashlib.blake2b(text.encode(), digest_size=8).digest()
        whole[place] ^= np.uint64(int.from_bytes(other, "big"))
    return whole


def _repeats(hashes: np.ndarray) -> np.ndarray:
    """Where a hash stands that stood before, bool (rows,)."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.zeros(len(hashes), bool)
    again[order[1:]] = ordered[1:] == ordered[:-1]
    return again


def sides(
    keys: Keys,
    dropped: np.ndarray,
    data: Any,
    shown: Callable[[Sequence[int]], list[str]],
    ledger: Ledger,
) -> np.ndarray:
    """Each row's place in SPLITS, or DROPPED, int8 (rows,).

    Args:
        keys: of all rows.
        dropped: those that go no further, bool (rows,).
        data: the recipe's.
        shown: rows, for messages.
        ledger: for what becomes of them.

    Raises:
        UserError: a row's time is no time.
    """
    side = np.full(len(dropped), DROPPED, np.int8)
    rows = np.flatnonzero(~dropped)
    if len(rows) == 0:
        return side
    by, split = data.split_by(), data.split
    features = keys.features[rows]
    ledger.add("split", "in", len(rows))
    if by == "time":
        assert keys.time is not None
        when = _times(keys.time.take(pa.array(rows)), rows, data, shown)
        side[rows] = _by_time(when, split)
        lost = int(np.isnan(when).sum())
        if lost:
            ledger.add("split", "dropped", lost, reason=f"{data.time}: no time")
    elif by == "stratified":
        strata = _strata(keys.target.take(pa.array(rows)), data)
        side[rows] = _stratified(features, strata, split)
    else:
        position, units = features, np.unique(features, return_inverse=True)[1]
        if by == "group":
            assert keys.group is not None
            position, units = _groups(keys.group.take(pa.array(rows)), features, units)
        side[rows] = _by_position(position, units, split)
    counts = [int((side == place).sum()) for place in (TRAIN, VALIDATION, TEST)]
    for name, count in zip(("train", "validation", "test"), counts, strict=True):
        ledger.add("split", name, count)
    if by != "time" and not all(counts) and (split.validation and split.test):
        different = len(np.unique(features))
        if different < len(features) / 2:
            raise UserError(
                f"data.split: the {len(rows):,} rows are {different:,} different ones, and equal "
                f"ones stay together: train {counts[0]:,}, validation {counts[1]:,}, test "
                f"{counts[2]:,}. Keep columns that tell rows apart, or choose other shares"
            )
    return side


def _by_position(position: np.ndarray, units: np.ndarray, split: Any) -> np.ndarray:
    """By a hash, read as a number in [0, 1): below `test` a row is tested on, below
    `test + validation` it validates. So a row keeps its side when others come. Where numbers of
    rows are asked for, it is those with the smallest hashes."""
    if isinstance(split.test, int) or isinstance(split.validation, int):
        return _ranked(position, units, len(position), split)
    place = position.astype(np.float64) / 2.0**64
    held = np.where(place < split.test + split.validation, VALIDATION, TRAIN)
    return np.where(place < split.test, TEST, held).astype(np.int8)


def _ranked(position: np.ndarray, units: np.ndarray, total: int, split: Any) -> np.ndarray:
    """Whole units in the order of their hashes, until each side has its share or count.

    Args:
        position: uint64 (rows,), the same for all rows of a unit.
        units: int (rows,).
        total: rows that a count is of; for a part of them it asks for a part.
        split: the recipe's.
    """
    unit, first, inverse, sizes = np.unique(
        units, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.lexsort((unit, position[first]))
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    rows = len(position)
    test, validation = (
        part * (rows / total if isinstance(part, int) else rows)
        for part in (split.test, split.validation)
    )
    side = np.empty(len(unit), np.int8)
    held = np.where(middle <= test + validation, VALIDATION, TRAIN)
    side[order] = np.where(middle <= test, TEST, held)
    return side[inverse]


def _stratified(features: np.ndarray, strata: np.ndarray, split: Any) -> np.ndarray:
    """The shares of each stratum; rows of equal features are in that of the first of them."""
    first, units = np.unique(features, return_index=True, return_inverse=True)[1:]
    own = strata[first][units]
    side = np.empty(len(features), np.int8)
    for stratum in np.unique(own):
        rows = np.flatnonzero(own == stratum)
        side[rows] = _ranked(features[rows], units[rows], len(features), split)
    return side


def _strata(target: pa.ChunkedArray, data: Any) -> np.ndarray:
    """The classes; of numbers of more than 20 values, the tenths that they are in."""
    codes = target.combine_chunks().dictionary_encode()
    strata = codes.indices.to_numpy()
    known = codes.dictionary.to_pylist()
    try:
        numbers = np.array([float(text) for text in known])
    except ValueError:
        return strata
    follows = "regression" if amounts(numbers, len(known)) else "classification"
    if (data.problem or follows) == "classification":
        return strata
    values = numbers[strata]
    return np.searchsorted(np.quantile(values, np.arange(0.1, 1, 0.1)), values, side="right")


def _groups(
    group: pa.ChunkedArray, features: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(a hash, a number) of each row's group; groups that share a row are one, and a row that
    names none is its own."""
    codes = group.combine_chunks().dictionary_encode()
    names = codes.dictionary.to_pylist()
    hashes = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    named = np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)
    first = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    none = first < 0
    own = np.where(none, len(names) + units, first)
    linked = _linked(own, units)
    position = np.where(none, features, named[np.where(none, 0, first)] if names else features)
    least = np.full(int(linked.max()) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, linked, position)
    return least[linked], linked


def _linked(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rows that are equal in either are linked: the least of `one` that each is linked to."""
    label = one
    while True:
        found = label
        for codes in (other, one):
            least = np.full(int(codes.max()) + 1, np.iinfo(np.int64).max)
            np.minimum.at(least, codes, found)
            found = least[codes]
        if np.array_equal(found, label):
            return label
        label = found


def _times(
    time: pa.ChunkedArray,
    rows: np.ndarray,
    data: Any,
    shown: Callable[[Sequence[int]], list[str]],
) -> np.ndarray:
    """float64 (rows,): numbers, or seconds since 1970; NaN for a row that is to be dropped."""
    reader = Reading([])
    whole = time.combine_chunks()
    found, bad = reader.numbers(whole)
    if bad.sum() > BREAKS * len(bad):
        found, bad = reader.dates(whole)
    lost = np.flatnonzero(np.isnan(found))
    if len(lost) and data.on_error == "stop":
        raise UserError(
            f'data.time: "{data.time}" is no number and no date of ISO 8601 in '
            f"{shown([int(rows[lost[0]])])[0]}; data.on_error: skip would drop such rows"
        )
    return np.where(bad, np.nan, found)


def _by_time(when: np.ndarray, split: Any) -> np.ndarray:
    """The past trains, the future tests; rows of one time are on one side."""
    known = np.sort(when[~np.isnan(when)])
    side = np.where(np.isnan(when), DROPPED, TRAIN).astype(np.int8)
    held = 0
    for place, part in ((TEST, split.test), (VALIDATION, split.validation)):
        held += part if isinstance(part, int) else round(part * len(known))
        if part and 0 < held < len(known):
            later = when >= known[len(known) - held]
            side[later & (side == TRAIN)] = place
    return side


def leaks(content: np.ndarray, side: np.ndarray) -> list[tuple[int, int]]:
    """(a held-out row, the first row equal to it in a split before its own), in their order.

    Args:
        content: uint64 (rows,): a hash of what a model reads of each row.
        side: int8 (rows,).
    """
    order = np.lexsort((side, content))
    order = order[side[order] != DROPPED]
    starts = np.flatnonzero(np.diff(content[order], prepend=content[order][:1] ^ np.uint64(1)))
    first = np.repeat(order[starts], np.diff(starts, append=len(order)))
    held = side[order] > side[first]
    pairs = np.stack([order[held], first[held]], axis=1)
    return [(int(row), int(other)) for row, other in pairs[np.argsort(pairs[:, 0])]]
