"""Which rows of a table are duplicates, and which split each goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .example import Ledger

DROPPED = -1
TRAIN, VALIDATION, TEST = range(3)  # places in SPLITS


@dataclass
class Keys:
    """What rows are told apart by; all are (rows,).

    Attributes:
        features: uint64: a hash of what a model may read.
        whole: uint64: of what makes two rows duplicates.
        target, group, time: text, null where there is none.
    """

    features: np.ndarray
    whole: np.ndarray
    target: pa.ChunkedArray
    group: pa.ChunkedArray | None = None
    time: pa.ChunkedArray | None = None


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
        again = _repeats(np.where(none, keys.whole + np.arange(rows, dtype=np.uint64), keys.whole))
        again &= ~none
        if again.any():
            what = "exact duplicate" if clean.keys is None else f"the {', '.join(clean.keys)} again"
            ledger.add("deduplicate", "dropped", int(again.sum()), reason=what)
        dropped = none | again
    ledger.add("deduplicate", "kept", int((~dropped).sum()))
    return dropped


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

    Raises:
        UserError: the split cannot be made, or held-out rows are in the training split as well.
    """
    rows = np.flatnonzero(~dropped)
    side = np.full(len(dropped), DROPPED, np.int8)
    if len(rows) == 0:
        return side
    by = data.split_by()
    units = np.unique(keys.features[rows], return_inverse=True)[1]
    position = keys.features[rows]
    side[rows] = _random(position, units, data.split)
    assert by == "random"
    for place, name in enumerate(("train", "validation", "test")):
        ledger.add("split", name, int((side == place).sum()))
    ledger.add("split", "in", len(rows))
    return side


def _random(position: np.ndarray, units: np.ndarray, split: Any) -> np.ndarray:
    """By the content's hash, read as a number in [0, 1)."""
    place = position.astype(np.float64) / 2.0**64
    side = np.where(place < split.test, TEST, TRAIN)
    held = (place >= split.test) & (place < split.test + split.validation)
    return np.where(held, VALIDATION, side).astype(np.int8)
