"""`data` of the task `table`: rows of named columns, cleaned, made into features, and split."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, field_validator, model_validator

from ..errors import did_you_mean
from ..reading import describe
from .data import Data, RecordSource
from .node import Node, PositiveFloat, PositiveInt

Names = Annotated[list[str], Field(min_length=1)]
Scale = Literal["zscore", "minmax", "robust", "quantile", "none"]
Encode = Literal["index", "onehot", "ordinal", "target", "frequency", "hash"]
Missing = Literal[
    "auto", "drop", "mean", "median", "most_frequent", "constant", "knn", "iterative"
]  # fmt: skip
TOY_TABLES = ("iris", "wine", "breast_cancer", "digits", "diabetes")
MISSING_VALUES = ["", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"]


class TableSource(RecordSource):
    """A table, or several of the same columns."""

    without_path = ("sql",)

    kind: Literal[  # type: ignore[assignment]
        "csv", "jsonl", "parquet", "arrow", "excel", "sql", "hf_dataset", "sklearn"
    ]
    url: str | None = Field(
        None,
        description="sql: sqlite:///FILE, duckdb:///FILE or postgresql://USER@HOST/DATABASE; "
        "$NAME is taken from the environment each time it is read",
    )
    query: str | None = Field(None, description="sql: what to read: one SELECT")
    sheet: str | None = Field(None, description="excel: which sheet; default: the first")

    @model_validator(mode="after")
    def _database(self) -> TableSource:
        for key in ("url", "query"):
            if (getattr(self, key) is not None) != (self.kind == "sql"):
                told = "needs" if self.kind == "sql" else "does not go with"
                raise ValueError(f"kind {self.kind} {told} {'a ' * (told == 'needs')}{key}")
        if self.sheet is not None and self.kind != "excel":
            raise ValueError(f"sheet goes with kind excel; the kind is {self.kind}")
        if self.url is not None:
            check_url(self.url)
        return self

    @model_validator(mode="after")
    def _ships(self) -> TableSource:
        if self.kind == "sklearn" and self.path not in TOY_TABLES:
            near = did_you_mean(str(self.path), TOY_TABLES)
            raise ValueError(
                f"path: found {describe(self.path)}; the tables that ship with scikit-learn are "
                f"{', '.join(TOY_TABLES)}.{near}"
            )
        return self


SCHEMES = ("sqlite", "duckdb", "postgresql")


def check_url(url: str) -> None:
    """
    Raises:
        ValueError: of no database that can be read, or it holds a password, which would be in the
            run's folder for whoever reads it. No message repeats one.
    """
    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError:
        raise ValueError("url: not readable as one") from None
    if parts.scheme not in SCHEMES:
        raise ValueError(
            f"url: found the scheme {parts.scheme or 'none'}; allowed are "
            f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}"
        )
    asked = [password] if password else []
    asked += [value for key, value in parse_qsl(parts.query) if key in ("password", "passfile")]
    if any(not re.fullmatch(r"\$(\w+|\{\w+\})", value) for value in asked):
        raise ValueError(
            "url: holds a password, which would be kept in the run's folder; write $NAME there and "
            "set NAME in the environment, or leave it out and set PGPASSWORD"
        )


class TableColumns(Node):
    """What the columns are; those that are not named are inferred from the training split."""

    drop: list[str] = Field([], description="columns that are not used")
    numeric: list[str] = Field([], description="numbers")
    boolean: list[str] = Field([], description="true/false, yes/no or 1/0")
    categorical: list[str] = Field([], description="one of a number of values")
    dates: list[str] = Field([], description="ISO 8601: 2024-03-01, with or without a time")
    text: list[str] = Field([], description="free text, hashed into `features.text_size` numbers")
    thousands: Literal[",", ".", " ", "'"] | None = Field(
        None, description="what parts thousands in numbers that are text"
    )
    decimal: Literal[".", ","] = Field(".", description="the decimal mark of numbers as text")

    def stated(self) -> dict[str, str]:
        """Column -> the kind that the recipe says."""
        kinds = {
            "numeric": "number", "boolean": "boolean", "categorical": "category",
            "dates": "date", "text": "text",
        }  # fmt: skip
        return {name: kind for key, kind in kinds.items() for name in getattr(self, key)}

    @model_validator(mode="after")
    def _once(self) -> TableColumns:
        keys = ("drop", "numeric", "boolean", "categorical", "dates", "text")
        seen: dict[str, str] = {}
        for key in keys:
            for name in getattr(self, key):
                if name in seen:
                    raise ValueError(f'"{name}" is in {seen[name]} and in {key}; name it once')
                seen[name] = key
        if self.thousands == self.decimal:
            raise ValueError(f'thousands and decimal are both "{self.decimal}"')
        return self


class Outliers(Node):
    """Numbers far from the others of their column, by the training split."""

    method: Literal["iqr", "zscore", "mad", "isolation_forest"] = "iqr"
    action: Literal["clip", "drop", "flag"] = Field(
        "clip", description="drop: of the training split only; flag: a column that says so"
    )
    threshold: PositiveFloat | None = Field(
        None, description="how far: default 1.5 (iqr), 3 (zscore), 3.5 (mad)"
    )

    @model_validator(mode="after")
    def _possible(self) -> Outliers:
        if self.method == "isolation_forest" and self.action != "drop":
            raise ValueError("isolation_forest judges rows of the training split: action: drop")
        return self


class TableClean(Node):
    """What is mended and what is dropped; all of it is counted in the ledger."""

    missing: Missing = Field(
        "auto",
        description="auto: the median and an indicator column; for categories a value of its own",
    )
    fill: dict[str, Any] = Field({}, description="constant: what to put where, by column")
    indicator: bool | None = Field(
        None, description="a column that says what was missing; default: with auto alone"
    )
    missing_values: list[str] = Field(
        MISSING_VALUES, description="texts that mean that there is no value"
    )
    outliers: Outliers | None = None
    duplicates: Literal["drop", "keep"] = "drop"
    keys: Names | None = Field(
        None, description="what makes two rows duplicates; default: all columns"
    )
    case: Literal["keep", "lower"] = Field("keep", description="of categories")
    blanks: Literal["keep", "trim"] = Field(
        "trim", description="trim: none around a category, one within"
    )

    @model_validator(mode="after")
    def _fills(self) -> TableClean:
        if self.fill and self.missing != "constant":
            raise ValueError(f"fill goes with missing: constant; missing is {self.missing}")
        for name, value in self.fill.items():
            if not isinstance(value, str | int | float | bool):
                raise ValueError(
                    f"fill.{name}: found {describe(value)}; allowed are text and numbers"
                )
        return self


class Select(Node):
    """Which features to keep."""

    by: Literal["variance", "mutual_information"] = "mutual_information"
    keep: PositiveInt | None = Field(None, description="how many of the best to keep")
    above: Annotated[float, Field(ge=0)] | None = Field(
        None, description="keep those with a score above this"
    )

    @model_validator(mode="after")
    def _one(self) -> Select:
        if (self.keep is None) == (self.above is None):
            raise ValueError("give exactly one of keep and above")
        return self


class TableFeatures(Node):
    """How columns become features; all of it is fitted on the training split."""

    scale: Scale = "zscore"
    encode: Encode = Field("index", description="of categories; index: for the model's embeddings")
    encoders: dict[str, Encode] = Field({}, description="other encodings, by column")
    max_categories: PositiveInt = Field(
        1000, description="the most frequent values of a category; others count as unknown"
    )
    hash_size: PositiveInt = Field(32, description="hash: how many columns")
    text_size: PositiveInt = Field(64, description="text: how many columns")
    interactions: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        [], description="pairs of numeric columns whose product is a feature"
    )
    select: Select | None = None
    pca: PositiveInt | None = Field(None, description="how many components replace the numbers")


def _share_or_count(value: Any) -> Any:
    """
    Raises:
        ValueError: it is neither a share nor a number of rows.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and 0 <= value <= 10**12:
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return value
    raise ValueError(f"found {describe(value)}; allowed are a share below 1 and a number of rows")


class TableSplit(Node):
    """What is held out; equal rows never stand on two sides."""

    validation: float | int = Field(0.15, description="a share below 1, or how many rows")
    test: float | int = Field(0.15, description="a share below 1, or how many rows")
    by: Literal["random", "stratified", "group", "time"] | None = Field(
        None, description="default: time or group where data.time or data.group is given"
    )
    on_leak: Literal["stop", "drop"] = Field(
        "stop", description="held-out rows that equal a training row: stop, or drop them"
    )

    _sized = field_validator("validation", "test", mode="before")(_share_or_count)

    @model_validator(mode="after")
    def _some_left(self) -> TableSplit:
        shares = [part for part in (self.validation, self.test) if isinstance(part, float)]
        if sum(shares) >= 1:
            raise ValueError(f"validation + test is {sum(shares):g}; it must stay below 1")
        return self


class TableData(Data):
    task: Literal["table"]
    sources: Annotated[list[TableSource], Field(min_length=1)]
    target: str = Field(description="the column to predict")
    problem: Literal["classification", "regression"] | None = Field(
        None,
        description="default: regression where the target is a number of more than 20 values or "
        "with fractions, else classification",
    )
    columns: TableColumns = TableColumns()
    group: str | None = Field(None, description="rows that are equal in it stay on one side")
    time: str | None = Field(None, description="train on the past of it, test on its future")
    weight: str | None = Field(None, description="what a row counts in the loss")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="at a row that is broken, or a value of another type than its column"
    )
    clean: TableClean = TableClean()  # type: ignore[assignment]
    features: TableFeatures = TableFeatures()
    split: TableSplit = TableSplit()  # type: ignore[assignment]

    @model_validator(mode="after")
    def _roles(self) -> TableData:
        by = self.split.by
        for key, name in (("group", self.group), ("time", self.time)):
            if by == key and name is None:
                raise ValueError(f"split.by: {key} needs data.{key}, the column to split by")
        if self.group is not None and by == "time":
            raise ValueError("split.by: time keeps no group together; leave data.group out")
        if self.group is not None and self.time is not None and by is None:
            raise ValueError("both group and time are given: say split.by: group or time")
        if self.group is not None and by in ("random", "stratified"):
            raise ValueError(f"split.by: {by} would part groups; leave it or data.group out")
        roles: dict[str, str] = {}
        for key in ("target", "group", "time", "weight"):
            name = getattr(self, key)
            if name is not None and name in roles:
                raise ValueError(f'{key}: "{name}" is the {roles[name]} already')
            if name is not None:
                roles[name] = key
        for name in self.columns.drop:
            if name in roles:
                raise ValueError(f'columns.drop: "{name}" is the {roles[name]}')
        return self

    def split_by(self) -> str:
        """How rows are split, the default worked out."""
        named = "time" if self.time is not None else "group" if self.group is not None else None
        return self.split.by or named or "random"
