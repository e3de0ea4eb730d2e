"""What an evaluation says, as plain data: a task writes it, the report and the terminal draw it.

    evaluation.json = {task, split, step, sums, metrics, definitions, results, blocks, lead, note}

`sums` are the split's metric sums, `metrics` the values that follow from them, `definitions` how
they are named and written. A block is one figure of six kinds. What writes blocks knows no page,
and what draws them knows no task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

Number = float  # or a whole number; NaN and infinity are what a run that diverged says
Format = Annotated[str, Field(pattern=r"^,?(\.\d{1,2})?[efg%]$")]
"""How a number is written, as Python's `format` has it: ".4f", ".1%", ",.0f"."""


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    Attributes:
        name: its key in metrics.jsonl and evaluation.json.
        title: what people call it.
        unit: what it is counted in, "nats per target token".
        greater_is_better: its direction.
        format: how its values are written.
    """

    name: str
    title: str
    unit: str = ""
    greater_is_better: bool = False
    format: str = ".4f"

    @property
    def words(self) -> str:
        """The title within a sentence: "bits per byte", but "ROUGE-L" and "F1"."""
        is_word = self.title[1:2].islower()
        return self.title[0].lower() + self.title[1:] if is_word else self.title

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Metric:
        """One that was written with `dataclasses.asdict`."""
        return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})


class Definition(TypedDict):
    """A `Metric` as it is stored."""

    name: str
    title: Annotated[str, Field(min_length=1)]
    unit: NotRequired[str]
    greater_is_better: NotRequired[bool]
    format: NotRequired[Format]


class Result(TypedDict):
    """How one model or baseline did: a row of the results table.

    `values` are by the metrics' names; those that no definition has are kept and not shown.
    """

    name: str
    values: dict[str, Number]
    ours: NotRequired[bool]
    note: NotRequired[str]


OURS, BASE = "this model", "its base"
"""The names of the results of a run's model, and of what it was fine-tuned from."""


# ------------------------------------------------------------------------------------- blocks


class Part(TypedDict):
    """One text of a sample: a prompt, an answer, a reference."""

    name: str
    text: str
    ours: NotRequired[bool]


class Samples(TypedDict):
    """Texts side by side. The first part of a sample is what was asked, the others answer it."""

    kind: Literal["samples"]
    title: str
    note: NotRequired[str]
    samples: list[Annotated[list[Part], Field(min_length=1)]]
    settings: NotRequired[dict[str, Number]]


class Matrix(TypedDict):
    """Numbers of two sides, shaded by their share of the row; `values` is (rows, columns).

    Where both sides have the same labels the diagonal is what is right, the rest mistakes.
    """

    kind: Literal["matrix"]
    title: str
    note: NotRequired[str]
    rows: list[str]
    columns: list[str]
    row_title: str
    column_title: str
    values: list[list[Number]]


class Bar(TypedDict):
    """A value, and where it is known the interval [low, high] around it."""

    name: str
    value: Number
    low: NotRequired[Number]
    high: NotRequired[Number]
    ours: NotRequired[bool]
    note: NotRequired[str]


class Bars(TypedDict):
    """Horizontal bars from zero, in the order given."""

    kind: Literal["bars"]
    title: str
    note: NotRequired[str]
    unit: NotRequired[str]
    format: NotRequired[Format]
    bars: list[Bar]


class Line(TypedDict):
    """Points (x, y) with x rising; around them, if given, a band of (x, low, high)."""

    name: str
    points: list[Annotated[list[Number], Field(min_length=2, max_length=2)]]
    band: NotRequired[list[Annotated[list[Number], Field(min_length=3, max_length=3)]]]
    dots: NotRequired[bool]
    dashed: NotRequired[bool]


class Reference(TypedDict):
    """A level to compare lines with."""

    name: str
    value: Number


class Chart(TypedDict):
    """Lines over a common x."""

    kind: Literal["chart"]
    title: str
    note: NotRequired[str]
    x: str
    y: str
    lines: list[Line]
    references: NotRequired[list[Reference]]


class Column(TypedDict):
    """A column of a table; one with a format holds numbers."""

    name: str
    format: NotRequired[Format]


class Table(TypedDict):
    """Rows of texts and numbers; None is an empty cell."""

    kind: Literal["table"]
    title: str
    note: NotRequired[str]
    columns: list[Column]
    rows: list[list[str | Number | None]]


class Image(TypedDict):
    """A picture: a PNG file in base64, and what it shows."""

    png: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
    caption: str
    note: NotRequired[str]


class Images(TypedDict):
    """Small pictures in a grid."""

    kind: Literal["images"]
    title: str
    note: NotRequired[str]
    images: list[Image]


Block = Annotated[
    Samples | Matrix | Bars | Chart | Table | Images,
    Field(discriminator="kind"),
]


@dataclass
class Examination:
    """What a task finds out about a model on a held-out split.

    Attributes:
        results: a row for the model (`ours`), for its base and for each baseline: the simplest
            baseline first, the strongest last.
        definitions: the columns of the results, the headline first; () takes the task's metrics.
        blocks: figures.
        lead: one sentence that sums it up, or "".
        note: what the results were measured on, and what the baselines are.
    """

    results: list[Result]
    definitions: tuple[Metric, ...] = ()
    blocks: list[Block] = field(default_factory=list)
    lead: str = ""
    note: str = ""
