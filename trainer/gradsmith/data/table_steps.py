"""A table's columns as features: what each column learns of the training split, and how it is then
encoded. Everything learned is plain numbers and texts.

Letters: k rows of a chunk, n numeric features.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

QUANTILES = 1000
FOLDS = 5  # of target encoding
SMOOTHING = 10.0  # rows of the whole split's mean that each category's is mixed with
DATE_PARTS = ("year", "month", "day", "weekday", "hour")
PERIODS = {"month": 12, "day": 31, "weekday": 7, "hour": 24}


@dataclass
class Features:
    """What is made of a chunk, in the order of the features.

    Attributes:
        numbers: name -> float64 (k,), NaN where a value is still missing.
        categories: name -> int32 (k,).
        drop: why a row goes no further -> bool (k,).
        notes: what was done -> how many cells.
        rows: which rows of the chunk they are, where some were left out.
    """

    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    categories: dict[str, np.ndarray] = field(default_factory=dict)
    drop: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    rows: np.ndarray | None = None

    def note(self, what: str, cells: np.ndarray) -> None:
        count = int(cells.sum())
        if count:
            self.notes[what] = self.notes.get(what, 0) + count

    def lose(self, why: str, rows: np.ndarray) -> None:
        if rows.any():
            self.drop[why] = rows


# ------------------------------------------------------------------------------------ numbers


@dataclass
class Scaler:
    """(x - shift) / scale; or with quantiles the normal score of x's place among them."""

    shift: float = 0.0
    scale: float = 1.0
    quantiles: list[float] | None = None

    @classmethod
    def fit(cls, values: np.ndarray, how: str) -> Scaler:
        """Of float64 (rows,); NaNs are left out. As scikit-learn's StandardScaler, MinMaxScaler,
        RobustScaler and QuantileTransformer (to a normal) have it."""
        values = values[~np.isnan(values)]
        if how == "none" or len(values) == 0:
            return cls()
        if how == "quantile":
            count = min(QUANTILES, len(values))
            found = np.quantile(values, np.linspace(0, 1, count))
            return cls(quantiles=np.maximum.accumulate(found).tolist())
        if how == "zscore":
            shift, scale = values.mean(), values.std()
            # of a constant the deviation is rounding alone
            scale = 0.0 if scale <= 1e-12 * max(abs(shift), 1e-300) else scale
        elif how == "minmax":
            shift, scale = values.min(), np.ptp(values)
        else:
            low, shift, high = np.quantile(values, [0.25, 0.5, 0.75])
            scale = high - low
        return cls(float(shift), float(scale) or 1.0)

    def apply(self, values: np.ndarray) -> np.ndarray:
        if self.quantiles is None:
            return (values - self.shift) / self.scale
        known = np.array(self.quantiles)
        places = np.linspace(0, 1, len(known))
        up = np.interp(values, known, places)
        down = -np.interp(-values, -known[::-1], -places[::-1])
        share = np.clip((up + down) / 2, 1e-7, 1 - 1e-7)
        normal: np.ndarray = torch.special.ndtri(torch.from_numpy(np.asarray(share))).numpy()
        return np.where(np.isnan(values), np.nan, normal)


@dataclass
class Number:
    """A column of numbers: outliers, then what is missing, then the scale.

    Attributes:
        low, high: beyond them a value is an outlier; None: none is.
        outliers: clip, drop (of the training split only) or flag.
        fill: what stands for a missing value; None: it stays missing.
        indicator: whether a column says what was missing.
    """

    name: str
    scaler: Scaler
    fill: float | None = None
    filled_with: str = ""
    indicator: bool = False
    low: float | None = None
    high: float | None = None
    outliers: str = ""

    @classmethod
    def fit(cls, name: str, values: np.ndarray, settings: Any) -> Number:
        """Of the training split's float64 (rows,), NaN where missing."""
        clean = settings.clean
        missing = np.isnan(values)
        found = cls(name, Scaler())
        if clean.outliers is not None and clean.outliers.method != "isolation_forest":
            found.low, found.high = bounds(values[~missing], clean.outliers)
            found.outliers = clean.outliers.action
            if found.outliers == "clip":
                values = np.clip(values, found.low, found.high)
            elif found.outliers == "drop":
                beyond = (values < found.low) | (values > found.high)
                values, missing = values[~beyond], missing[~beyond]
        there = values[~missing]
        found.filled_with, found.fill = fill_of(name, there, clean)
        default = clean.missing == "auto"
        wanted = default if clean.indicator is None else clean.indicator
        found.indicator = bool(wanted and missing.any())
        whole = values if found.fill is None else np.where(missing, found.fill, values)
        found.scaler = Scaler.fit(whole, settings.features.scale)
        return found

    def apply(self, values: np.ndarray, into: Features, training: bool) -> None:
        missing = np.isnan(values)
        into.numbers[self.name] = values  # its place, before those that tell of it
        if self.outliers:
            beyond = (values < self.low) | (values > self.high)
            if self.outliers == "clip":
                into.note(f"{self.name}: outliers clipped", beyond)
                values = np.clip(values, self.low, self.high)
            elif self.outliers == "drop" and training:
                into.lose(f"{self.name}: outlier", beyond)
            elif self.outliers == "flag":
                into.numbers[f"{self.name} is an outlier"] = beyond.astype(np.float64)
        if self.indicator:
            into.numbers[f"{self.name} is missing"] = missing.astype(np.float64)
        if missing.any():
            if self.fill is not None:
                into.note(f"{self.name}: {self.filled_with}", missing)
                values = np.where(missing, self.fill, values)
            elif self.filled_with == "drop":
                into.lose(f"{self.name}: missing", missing)
        into.numbers[self.name] = self.scaler.apply(values)

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Number:
        return cls(**{**stored, "scaler": Scaler(**stored["scaler"])})


def bounds(values: np.ndarray, outliers: Any) -> tuple[float, float]:
    """Between which values are none of the outliers.

    iqr: the quartiles, 1.5 ranges out. zscore: the mean, 3 deviations out. mad: the median, 3.5
    times 1.4826 median absolute deviations out (Iglewicz and Hoaglin 1993).
    """
    if len(values) == 0:
        return -np.inf, np.inf
    if outliers.method == "iqr":
        low, high = np.quantile(values, [0.25, 0.75])
        reach = (outliers.threshold or 1.5) * (high - low)
    elif outliers.method == "zscore":
        low = high = values.mean()
        reach = (outliers.threshold or 3.0) * values.std()
    else:
        low = high = np.median(values)
        reach = (outliers.threshold or 3.5) * 1.4826 * np.median(np.abs(values - low))
    return float(low - reach), float(high + reach)


def fill_of(name: str, there: np.ndarray, clean: Any) -> tuple[str, float | None]:
    """How it is called, and what stands for a missing number."""
    how = clean.missing
    if how in ("drop", "knn", "iterative"):
        return how, None
    if how == "constant":
        value = float(clean.fill.get(name, 0.0))
    elif len(there) == 0:
        value = 0.0
    elif how == "mean":
        value = float(there.mean())
    elif how == "most_frequent":
        known, counts = np.unique(there, return_counts=True)
        value = float(known[counts.argmax()])
    else:
        value = float(np.median(there))
    what = {"auto": "median", "most_frequent": "most frequent"}.get(how, how)
    return f"missing, now the {what} {value:g}", value


# --------------------------------------------------------------------------------- categories


@dataclass
class Category:
    """A column of categories.

    Attributes:
        values: those of the training split, in order; value i is i + 1, and 0 any other or none.
        encode: index, onehot, ordinal, target, frequency or hash.
        tables: float: what stands for each value, (values + 1, columns); for target encoding the
            first is of the whole split, the others of all folds but one.
        columns: the names of those columns.
        scalers: of those columns.
    """

    name: str
    values: list[str]
    encode: str
    fill: str | None = None
    indicator: bool = False
    drop: bool = False
    columns: list[str] = field(default_factory=list)
    tables: list[list[list[float]]] = field(default_factory=list)
    hash_size: int = 0

    def codes(self, array: pa.Array) -> np.ndarray:
        """int32 (k,)."""
        found = pc.index_in(array, pa.array(self.values, pa.string()))
        return (found.fill_null(-1).to_numpy(zero_copy_only=False) + 1).astype(np.int32)

    def apply(self, array: pa.Array, hashes: np.ndarray, into: Features, training: bool) -> None:
        """
        Args:
            array: text (k,).
            hashes: uint64 (k,): which fold a row of the training split is in.
            into: takes the features.
            training: whether they are of the training split.
        """
        missing = np.asarray(pc.is_null(array), bool)
        if self.drop:
            into.lose(f"{self.name}: missing", missing)
        if self.indicator:
            into.numbers[f"{self.name} is missing"] = missing.astype(np.float64)
        if self.fill is not None and missing.any():
            into.note(f'{self.name}: missing, now "{self.fill}"', missing)
            array = array.fill_null(self.fill)
        if self.encode == "hash":
            table = hash_table(array, self.hash_size)
            for place, name in enumerate(self.columns):
                into.numbers[name] = table[:, place]
            return
        codes = self.codes(array)
        unknown = (codes == 0) & ~np.asarray(pc.is_null(array), bool)
        into.note(f"{self.name}: unknown to the training split", unknown)
        if self.encode == "index":
            into.categories[self.name] = codes
        elif self.encode == "onehot":
            for place, name in enumerate(self.columns):
                into.numbers[name] = (codes == place + 1).astype(np.float64)
        else:
            tables = np.array(self.tables)
            fold = np.zeros(len(codes), np.int64)
            if self.encode == "target" and training:
                fold = 1 + fold_of(hashes)
            found = tables[fold, codes]
            for place, name in enumerate(self.columns):
                into.numbers[name] = found[:, place]

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Category:
        return cls(**stored)


def fold_of(hashes: np.ndarray) -> np.ndarray:
    """The fold of target encoding that a row is in, by its content: int64 (k,)."""
    return (hashes >> np.uint64(7)).astype(np.int64) % FOLDS


def hash_table(array: pa.Array, size: int) -> np.ndarray:
    """±1 in one of `size` columns, by the text's hash; zeros where there is none: (k, size)."""
    pairs = array.dictionary_encode()
    known = pairs.dictionary.to_pylist()
    table = np.zeros((len(known) + 1, size))
    for row, text in enumerate(known):
        place, sign = hashed(text, size)
        table[row, place] = sign
    at = pairs.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
    return table[at]


def hashed(text: str, size: int) -> tuple[int, float]:
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return number % size, 1.0 if number >> 63 else -1.0


# -------------------------------------------------------------------------------- dates, texts


@dataclass
class Date:
    """Year, month, day, weekday and hour, those that differ; and where they lie on their circle."""

    name: str
    parts: list[Number]
    cyclic: list[str]

    @staticmethod
    def part(seconds: np.ndarray, part: str) -> np.ndarray:
        """float64 (k,), NaN where the date is missing."""
        missing = np.isnan(seconds)
        whole = np.where(missing, 0, seconds).astype("int64").astype("datetime64[s]")
        days = whole.astype("datetime64[D]")
        found = {
            "year": lambda: whole.astype("datetime64[Y]").astype(np.int64) + 1970,
            "month": lambda: whole.astype("datetime64[M]").astype(np.int64) % 12 + 1,
            "day": lambda: (days - whole.astype("datetime64[M]")).astype(np.int64) + 1,
            "weekday": lambda: (days.astype(np.int64) + 3) % 7,
            "hour": lambda: (whole - days).astype(np.int64) // 3600,
        }[part]()
        return np.where(missing, np.nan, found)

    @classmethod
    def fit(cls, name: str, seconds: np.ndarray, settings: Any) -> Date:
        parts: list[Number] = []
        cyclic: list[str] = []
        for part in DATE_PARTS:
            values = cls.part(seconds, part)
            there = values[~np.isnan(values)]
            if len(there) and there.min() < there.max():
                number = Number.fit(f"{name}.{part}", values, settings)
                number.indicator = number.indicator and not parts  # one says it
                parts.append(number)
                cyclic += [part] if part in PERIODS else []
        return cls(name, parts, cyclic)

    def apply(self, seconds: np.ndarray, into: Features, training: bool) -> None:
        for number in self.parts:
            part = number.name.rpartition(".")[2]
            values = self.part(seconds, part)
            number.apply(values, into, training)
            if part in self.cyclic:
                angle = np.nan_to_num(values) * (2 * np.pi / PERIODS[part])
                there = ~np.isnan(values)
                into.numbers[f"{number.name}.sin"] = np.where(there, np.sin(angle), 0.0)
                into.numbers[f"{number.name}.cos"] = np.where(there, np.cos(angle), 0.0)

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Date:
        return cls(stored["name"], [Number.read(n) for n in stored["parts"]], stored["cyclic"])


@dataclass
class Text:
    """Words and pairs of words, hashed into `size` numbers of length 1 in all."""

    name: str
    size: int

    def apply(self, array: pa.Array, into: Features) -> None:
        found = np.zeros((len(array), self.size))
        for row, text in enumerate(array.to_pylist()):
            words = (text or "").lower().split()
            for gram in [*words, *map(" ".join, pairwise(words))]:
                place, sign = hashed(gram, self.size)
                found[row, place] += sign
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        for place in range(self.size):
            into.numbers[f"{self.name}#{place}"] = found[:, place]

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Text:
        return cls(**stored)


Step = Number | Category | Date | Text
STEPS: dict[str, type[Step]] = {"number": Number, "boolean": Number, "category": Category,
                                "date": Date, "text": Text}  # fmt: skip


def dump(step: Step) -> dict[str, Any]:
    return asdict(step)
