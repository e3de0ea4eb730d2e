"""From a table that was read to numbers about it: plain data, which the page and `--json` show.

Letters: s rows of the sample.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..data.table_kinds import FEW, amounts
from ..errors import one_line
from . import relations
from .scan import Seen, Table, mix

SHOWN = 8  # most frequent values of a column
BARS = 24  # of a histogram
BINS = 64  # of a number, for what it says of the target
CLASSES = 20  # of the target, the most frequent; others are left out of scores
VALUES = 50  # of a category, the most frequent; others count as one
RELATED = 30  # columns in a map of correlations, the first
SPANS = 30  # of a time trend
ENOUGH = 5  # rows of which a mean of the target is shown
FENCE = 1.5  # interquartile ranges beyond the quartiles, as in data.clean.outliers

LEAK = 0.95  # ROC-AUC or R² of one feature alone, from which on it is suspected
CERTAIN = 0.99  # and from which on the proposed recipe leaves it out
MOSTLY = 0.5  # missing
NEARLY = 0.99  # one value
RELATED_FROM = 0.99  # Pearson's correlation of two features
OUTLYING = 0.05  # of the rows
RARE = 0.1  # a class's share

GRAVE = ("leak", "target", "broken", "copy", "mixed", "missing", "duplicates")
"""Findings that ask for a decision; the others are notes."""


def measure(table: Table, target: str | None, problem: str | None) -> dict[str, Any]:
    """What there is to say of a table.

    Args:
        table: what was read.
        target: the column to predict, if one is known.
        problem: classification or regression; None follows from the target's values.

    Returns:
        rows, sampled, duplicates, columns, target, correlations, trends, missing_map, findings.
    """
    aim = Aim(table, target, problem) if target is not None else None
    columns = {name: _column(table, name, seen, aim) for name, seen in table.columns.items()}
    found: dict[str, Any] = {
        "rows": table.rows,
        "sampled": len(table.places),
        "duplicates": table.duplicates,
        "columns": list(columns.values()),
        "target": aim.describe(table, columns) if aim else None,
        "correlations": _correlations(table, columns),
        "copies": _copies(table, target),
        "trends": [
            _trend(table, name, aim)
            for name, seen in table.columns.items()
            if seen.kind.name == "date" and seen.distinct.count > 1
        ],
        "missing_map": _missing_map(table),
    }
    found = plain(found)
    found["findings"] = sorted(_findings(found), key=lambda f: f["what"] not in GRAVE)
    return found


class Aim:
    """The target: the rows of the sample that have one, and what it is there."""

    def __init__(self, table: Table, name: str, problem: str | None):
        self.name, seen = name, table.columns[name]
        values = table.values(name) if seen.numeric else np.zeros(0)
        known = values[~np.isnan(values)]
        a_number = seen.kind.name == "number" and amounts(known, seen.distinct.count)
        self.problem = problem or ("regression" if a_number else "classification")
        if not seen.numeric:
            self.problem = "classification"
        self.labels: list[str] = []
        if self.problem == "regression":
            self.rows = np.flatnonzero(~np.isnan(values))
            self.y: np.ndarray | None = values[self.rows]
            self.codes = relations.bins(self.y, FEW)
        else:
            codes, labels = table.codes(name)
            counts = Counter(codes[codes >= 0].tolist())
            kept = sorted(code for code, _ in counts.most_common(CLASSES))
            self.labels = [labels[code] for code in kept]
            self.counts = [counts[code] for code in kept]
            self.more = len(counts) - len(kept)
            place = np.full(len(labels) + 1, -1)
            place[kept] = np.arange(len(kept))
            self.rows = np.flatnonzero(place[codes] >= 0)
            self.codes = place[codes][self.rows]
            self.y = (self.codes == 1).astype(np.float64) if len(kept) == 2 else None
        self.folds = (mix(table.places[self.rows].astype(np.uint64)) % relations.FOLDS).astype(int)

    @property
    def learnable(self) -> bool:
        """Whether it has two values."""
        return len(np.unique(self.codes)) > 1

    @property
    def words(self) -> str:
        """What `y` is the mean of."""
        share = self.problem == "classification"
        return f"share of {self.name} = {self.labels[1]}" if share else f"mean of {self.name}"

    def score(self, codes: np.ndarray, values: np.ndarray | None) -> float:
        codes = codes[self.rows]
        codes = np.where(codes < 0, codes.max(initial=-1) + 1, codes)
        if self.problem == "classification":
            return relations.class_score(codes, self.codes, self.folds)
        assert self.y is not None
        return relations.number_score(
            codes, None if values is None else values[self.rows], self.y, self.folds
        )

    def means(self, codes: np.ndarray, size: int) -> list[float | None] | None:
        """The target's mean where a code stands, None of fewer than `ENOUGH` rows; or None, where
        it has no mean."""
        if self.y is None or not self.learnable:
            return None
        own = codes[self.rows]
        some = own >= 0
        rows = np.bincount(own[some], minlength=size)
        sums = np.bincount(own[some], self.y[some], size)
        return [float(t / n) if n >= ENOUGH else None for t, n in zip(sums, rows, strict=True)]

    def describe(self, table: Table, columns: dict[str, dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": self.name,
            "problem": self.problem,
            "missing": columns[self.name]["missing"],
            "learnable": self.learnable,
            "words": self.words if self.y is not None and self.learnable else "",
            "metric": "ROC-AUC" if self.problem == "classification" else "R²",
            "threshold": LEAK,
            "features": {},
            "entropy": relations.mutual_information(self.codes, self.codes),
        }
        if self.problem == "classification":
            found["classes"] = dict(zip(self.labels, self.counts, strict=True))
            found["more_classes"] = self.more
        for name, seen in table.columns.items():
            if name == self.name or seen.kind.name == "constant" or not self.learnable:
                continue
            values = table.values(name) if seen.numeric else None
            codes = table.codes(name)[0] if values is None else relations.bins(values, BINS)
            few = codes if values is not None else _frequent(codes)
            gap = np.where(few < 0, few.max(initial=-1) + 1, few)  # which may tell something too
            found["features"][name] = {
                "mutual_information": relations.mutual_information(gap[self.rows], self.codes),
                "score": self.score(codes, values),
            }
        return found


def _frequent(codes: np.ndarray) -> np.ndarray:
    """Codes of which all but the most frequent are one."""
    counts = np.bincount(codes[codes >= 0], minlength=1)
    if len(counts) <= VALUES:
        return codes
    place = np.full(len(counts) + 1, VALUES)
    place[np.argsort(-counts, kind="stable")[:VALUES]] = np.arange(VALUES)
    place[-1] = -1
    return place[codes]


def plain(found: Any) -> Any:
    """Plain data as JSON has it: None for what is no finite number."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, list):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and not np.isfinite(found) else found


# -------------------------------------------------------------------------------------- columns


def _column(table: Table, name: str, seen: Seen, aim: Aim | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name,
        "kind": seen.kind.name,
        "why": seen.kind.why,
        "missing": seen.missing,
        "bad": seen.bad,
        "distinct": seen.distinct.count,
        "distinct_exact": seen.distinct.exact,
        "numeric": seen.numeric,
    }
    there = table.rows - seen.missing - seen.bad
    own = None if aim is None or aim.name == name else aim
    if not seen.numeric:
        codes, labels = table.codes(name)
        counts, of = seen.counts, there
        if counts is None:
            counts = Counter({labels[c]: n for c, n in Counter(codes[codes >= 0].tolist()).items()})
            of = int((codes >= 0).sum())
        top = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN]
        found |= {"top": [[one_line(v, 200), n] for v, n in top], "top_of": of}
        found["top_share"] = top[0][1] / of if top and of else 0.0
        if own:
            places = {label: code for code, label in enumerate(labels)}
            wanted = [places.get(value, -1) for value, _ in top]
            means = own.means(codes, len(labels) + 1)
            found["means"] = means and [means[code] for code in wanted]
        return found
    values = table.values(name)
    known = values[~np.isnan(values)]
    if not len(known):
        return found | {"histogram": None, "outliers": 0, "outlier_share": 0.0, "top_share": 0.0}
    q1, median, q3 = (float(q) for q in np.quantile(known, [0.25, 0.5, 0.75]))
    low, high = q1 - FENCE * (q3 - q1), q3 + FENCE * (q3 - q1)
    outliers = 0
    if seen.kind.name == "number" and q3 > q1:
        outliers = int(((known < low) | (known > high)).sum())
    most = int(np.unique(known, return_counts=True)[1].max())
    with np.errstate(over="ignore"):
        spread = float(known.std())
    found |= {
        "least": seen.least, "q1": q1, "median": median, "q3": q3, "most": seen.most,
        "mean": seen.total / there, "deviation": spread, "outliers": outliers,
        "outlier_share": outliers / len(known), "top_share": most / len(known),
    }  # fmt: skip
    found["histogram"] = _histogram(values, known, q3 - q1, own)
    return found


def _histogram(
    values: np.ndarray, known: np.ndarray, iqr: float, aim: Aim | None
) -> dict[str, Any]:
    """Bars between `edges`, the few values beyond them counted; or a bar for each of `values`."""
    single = np.unique(known)
    if len(single) <= BARS // 2 and (single == np.floor(single)).all():
        codes = np.where(np.isnan(values), -1, np.searchsorted(single, values))
        found: dict[str, Any] = {"values": single.tolist(), "beyond": 0}
        size = len(single)
    else:
        low, high = float(known.min()), float(known.max())
        near = np.quantile(known, [0.005, 0.995])
        if iqr > 0 and high - low > 3 * (near[1] - near[0]):  # else one bar would hold it all
            low, high = map(float, near)
        edges = np.linspace(low, high, BARS + 1)
        size = BARS
        with np.errstate(invalid="ignore"):
            codes = np.clip(np.searchsorted(edges, values, "right") - 1, -1, BARS)
            codes = np.where(values == high, BARS - 1, codes)
            codes = np.where((codes >= BARS) | np.isnan(values), -1, codes)
        beyond = int(((known < low) | (known > high)).sum())
        found = {"edges": edges.tolist(), "beyond": beyond}
    found["counts"] = np.bincount(codes[codes >= 0], minlength=size).tolist()
    found["means"] = aim.means(codes, size) if aim else None
    return found


def _missing_map(table: Table, slabs: int = 60) -> dict[str, list[float]]:
    """The share of missing values in stretches of the rows, for each column that has any."""
    found = {}
    place = table.places * min(slabs, max(table.rows, 1)) // max(table.rows, 1)
    count = np.bincount(place)
    for name, seen in table.columns.items():
        if seen.missing + seen.bad == 0:
            continue
        gone = np.isnan(table.values(name)) if seen.numeric else table.codes(name)[0] < 0
        shares = np.bincount(place, gone, len(count)) / np.maximum(count, 1)
        found[name] = [round(float(share), 4) for share in shares]
    return found


def _trend(table: Table, name: str, aim: Aim | None) -> dict[str, Any]:
    values = table.values(name)
    known = values[~np.isnan(values)]
    edges = np.linspace(known.min(), known.max(), SPANS + 1)
    codes = np.full(len(values), -1)
    there = ~np.isnan(values)
    codes[there] = np.clip(np.searchsorted(edges, known, "right") - 1, 0, SPANS - 1)
    rows = np.bincount(codes[there], minlength=SPANS) * table.rows / len(values)
    found: dict[str, Any] = {
        "column": name,
        "edges": [day(edge) for edge in edges],
        "rows": [round(float(count)) for count in rows],
        "means": None,
        "spearman": None,
    }
    if aim is not None and aim.name != name and aim.y is not None:
        found["means"] = aim.means(codes, SPANS)
        pair = np.stack([values[aim.rows], aim.y], 1)
        pair = pair[~np.isnan(pair).any(1)]
        found["spearman"] = float(relations.spearman(pair)[0, 1]) if len(pair) > 2 else None
    return found


def day(seconds: float) -> str:
    """2024-03-01, of seconds since 1970."""
    try:
        return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%d")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.4g} s"


# ------------------------------------------------------------------------------------ relations


def _correlations(table: Table, columns: dict[str, dict[str, Any]]) -> dict[str, Any]:
    numbers = [n for n, c in columns.items() if c["kind"] == "number" and c["distinct"] > 1]
    coded = {}
    for name, column in columns.items():
        if column["kind"] in ("category", "boolean") and 1 < column["distinct"] <= VALUES:
            coded[name] = table.codes(name)[0]
        elif column["kind"] == "number" and 1 < column["distinct"] <= FEW:
            coded[name] = relations.bins(table.values(name), FEW)
    found: dict[str, Any] = {"left_out": {"numbers": numbers[RELATED:],
                                          "categories": list(coded)[RELATED:]}}  # fmt: skip
    numbers = numbers[:RELATED]
    if len(numbers) > 1:
        matrix = np.stack([table.values(name) for name in numbers], 1)
        found["pearson"] = {"names": numbers, "values": relations.pearson(matrix).tolist()}
        found["spearman"] = {"names": numbers, "values": relations.spearman(matrix).tolist()}
    names = list(coded)[:RELATED]
    if len(names) > 1:
        v = np.ones((len(names), len(names)))
        for i, one in enumerate(names):
            for j in range(i):
                v[i, j] = v[j, i] = relations.cramers_v(coded[one], coded[names[j]])
        found["cramers_v"] = {"names": names, "values": v.tolist()}
    return found


def _copies(table: Table, target: str | None) -> list[list[str]]:
    """[column, an earlier one that says the same]: each value of one goes with one of the other,
    missing values too."""
    seen: dict[bytes, str] = {}
    found = []
    for name, column in table.columns.items():
        if name == target or column.kind.name == "constant" or column.distinct.count < 2:
            continue
        values = table.values(name) if column.numeric else table.codes(name)[0]
        values = np.where(np.isnan(values), -np.inf, values) if column.numeric else values
        _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        # named by where each value stands first, two that say the same are equal
        key = np.asarray(first[inverse], np.int64).tobytes()
        if len(first) == len(values):
            continue  # all different: any two such columns would be the same
        if key in seen:
            found.append([name, seen[key]])
        else:
            seen[key] = name
    return found


# ------------------------------------------------------------------------------------- findings


def share(value: float) -> str:
    """12.3 %, or "under 0.1 %" where it would read as none."""
    return "under 0.1 %" if 0 < value < 0.001 else f"{100 * value:.1f} %"


def _findings(p: dict[str, Any]) -> Any:
    """What a person should know, the gravest first: {what, columns, text}."""

    def finding(what: str, names: list[str], text: str) -> dict[str, Any]:
        return {"what": what, "columns": names, "text": text}

    rows, target = p["rows"], p["target"]
    of_columns = {column["name"]: column for column in p["columns"]}
    if target:
        yield from _of_target(target, rows, finding)
    for name, other in p["copies"]:
        yield finding("copy", [name, other], f"{name} says the same as {other}, value by value")
    if p["duplicates"]:
        told = f"rows that equal an earlier one in every column: {p['duplicates']:,}"
        yield finding("duplicates", [], f"{told} ({share(p['duplicates'] / rows)})")
    for name, c in of_columns.items():
        if c["bad"]:
            yield finding("mixed", [name], f"{name} has {c['bad']:,} cells that are no {c['kind']}")
        if c["kind"] == "constant":
            yield finding("constant", [name], f"{name} never changes: {c['why']}")
        elif c["top_share"] >= NEARLY:
            told = f"{name} is one value in {share(c['top_share'])} of its rows"
            yield finding("near-constant", [name], told)
        if c["kind"] == "id":
            yield finding("id", [name], f"{name} looks like an id: {c['why']}")
        elif c["kind"] == "category" and c["distinct"] > 0.9 * (rows - c["missing"]) > FEW:
            told = f"{name} looks like an id: {c['distinct']:,} values in {rows:,} rows"
            yield finding("id", [name], told)
        if c["missing"] > MOSTLY * rows and c["kind"] != "constant":
            yield finding("missing", [name], f"{name} is missing in {share(c['missing'] / rows)}")
        if c.get("outlier_share", 0) > OUTLYING:
            told = f"{name}: {share(c['outlier_share'])} lie beyond {FENCE} interquartile ranges"
            yield finding("outliers", [name], told)
    found = p["correlations"].get("pearson", {"names": [], "values": []})
    for i, name in enumerate(found["names"]):
        for other, r in zip(found["names"][:i], found["values"][i], strict=False):
            known = r is not None and abs(r) >= RELATED_FROM and [name, other] not in p["copies"]
            if known and not (target and target["name"] in (name, other)):
                yield finding("related", [name, other], f"{name} and {other}: Pearson {r:.4f}")
    for trend in p["trends"]:
        if trend["spearman"] is not None and abs(trend["spearman"]) > 0.2:
            way = "rises" if trend["spearman"] > 0 else "falls"
            told = f"{target['name']} {way} with {trend['column']} (Spearman"
            yield finding("trend", [trend["column"]], f"{told} {trend['spearman']:.2f})")


def _of_target(target: dict[str, Any], rows: int, finding: Any) -> Any:
    name = target["name"]
    if not target["learnable"]:
        yield finding("target", [name], f"{name}, the target, has one value: nothing to learn")
    for feature, found in target["features"].items():
        if (found["score"] or 0) >= LEAK:
            yield finding(
                "leak",
                [feature],
                f"{feature} alone predicts {name}: {target['metric']} {found['score']:.3f} "
                f"(suspect from {LEAK} on). Is it known before {name} is?",
            )
    if target["missing"]:
        told = f"{name}, the target, is missing in {share(target['missing'] / rows)} of the rows"
        yield finding("target", [name], told)
    classes = target.get("classes")
    if classes and len(classes) > 1 and min(classes.values()) < RARE * sum(classes.values()):
        label = min(classes, key=classes.__getitem__)
        part = share(classes[label] / sum(classes.values()))
        yield finding("imbalance", [name], f"{name}: the class {label} is {part} of the rows")
