"""What the JSON files that gradsmith reads look like, for `gradsmith.reading`.

A shape names the keys that are used and the types that they must have; further keys may stand
beside them. The files are ours, but whoever hands a run's folder on may have changed them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .blocks import Block, Definition, Number, Result

Count = Annotated[int, Field(ge=0, lt=2**63)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class File(Shape):
    bytes: Count
    sha256: str


# ------------------------------------------------------------------------------------- data/


class LedgerRow(Shape):
    step: str
    what: str
    documents: Count
    tokens: Count = 0
    reason: str = ""
    source: str = ""


class SourceEntry(Shape):
    kind: str = ""
    path: str | None = None
    files: Count | None = None
    bytes: Count | None = None


class FilesEntry(Shape):
    files: dict[str, File]


class SplitCounts(Shape):
    documents: Count


class SplitEntry(SplitCounts):
    files: dict[str, File]


class TextCounts(SplitCounts):
    tokens: Count
    target_tokens: Count
    bytes: Count


class TextSplitEntry(TextCounts):
    eos_targets: Count
    files: dict[str, File]


Split = Literal["train", "validation", "test"]


class SplitSummary(SplitCounts):
    tokens: Count | None = None
    target_tokens: Count | None = None
    bytes: Count | None = None


class DataSummary(Shape):
    """What a report shows of data/manifest.json"""

    data_hash: str = ""
    ledger: list[LedgerRow] = []
    sources: list[SourceEntry] = []
    splits: dict[Split, SplitSummary] = {}


class DataManifest(Shape):
    """data/manifest.json, of any task"""

    format: str
    task: str
    data_hash: str
    sources: list[SourceEntry]
    splits: dict[Split, SplitEntry]


class StoredColumn(Shape):
    dtype: str
    shape: list[Count]
    offsets: str | None


class ProcessorManifest(DataManifest):
    """data/manifest.json of a task that says there what its columns are"""

    processor: FilesEntry
    columns: dict[str, StoredColumn]


class LabelledProcessor(Shape):
    """processor.json of labelled texts"""

    classes: Annotated[dict[str, Count], Field(min_length=2)]
    longest: Annotated[int, Field(ge=1)]


class TableKind(Shape):
    name: str
    why: str


class TableSettings(Shape):
    """processor.json of tables"""

    problem: Literal["classification", "regression"]
    classes: dict[str, Count]
    target_mean: float
    target_scale: float
    kinds: dict[str, TableKind]
    steps: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    numbers: list[str]
    categories: dict[str, Count]


class ImageSight(Shape):
    size: Annotated[int, Field(ge=1)]
    edge: Annotated[int, Field(ge=1)] | None
    mean: Annotated[list[Number], Field(min_length=3, max_length=3)]
    std: Annotated[list[Number], Field(min_length=3, max_length=3)]
    interpolation: Literal["nearest", "bilinear", "bicubic"]


class ImageSettings(Shape):
    """processor.json of pictures"""

    classes: Annotated[dict[str, Count], Field(min_length=2)]
    sight: ImageSight


class PairSettings(Shape):
    """processor.json of preferences"""

    longest: Annotated[int, Field(ge=1)]
    system: str | None = None


class TextManifest(DataManifest):
    """data/manifest.json of texts and conversations"""

    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    bos_id: Count
    eos_id: Count
    pad_id: Count
    sequence_length: Count
    tokenizer: FilesEntry
    splits: dict[Split, TextSplitEntry]  # type: ignore[assignment]


# ------------------------------------------------------------------------- what a run reports


class BestSoFar(Shape):
    metric: str
    value: Number | None
    step: Count
    since: Count


class State(Shape):
    """state.json of a checkpoint"""

    step: Count
    best: BestSoFar | None = None


class MetricsRow(Shape):
    """A line of metrics.jsonl"""

    kind: str
    step: Count
    tokens: Count = 0
    loss: Number | None = None
    lr: Number | None = None
    grad_norm: Number | None = None
    tokens_per_second: Number | None = None
    bits_per_byte: Number | None = None
    accuracy: Number | None = None
    waiting: Number | None = None
    time: Number | None = None


class Evaluation(Shape):
    """evaluation.json; a version before had neither definitions, results nor blocks"""

    split: str
    step: Count | None = None
    task: str = ""
    definitions: list[Definition] = []
    results: list[Result] = []
    blocks: list[Block] = []
    lead: str = ""
    note: str = ""


class Git(Shape):
    commit: str = ""
    dirty: bool = False


class Accelerated(Shape):
    replaced: dict[str, Pair] | None = None
    left_alone: dict[str, str] | None = None


class Provenance(Shape):
    """provenance.json"""

    created: str = ""
    command: list[str] = []
    python: str = ""
    platform: str = ""
    cpu: str | None = None
    cores: Count | None = None
    threads: Count = 1
    world: Count = 1
    parameters: Count = 0
    trainable_parameters: Count = 0
    seconds: Number = 0.0
    unit: str = "tokens"
    metrics: list[Definition] = []
    versions: dict[str, str] = {}
    git: Git | None = None
    zero: dict[str, Any] | None = None
    backends: dict[str, Any] | None = None
    accelerate: Accelerated | None = None


# ----------------------------------------------------------------------------- models' folders


class ModelConfig(Shape):
    """config.json of a model"""

    model_type: str
    quantization_config: dict[str, Any] | None = None


class AdapterConfig(Shape):
    """adapter_config.json of peft"""

    peft_type: str
    base_model_name_or_path: str


class GenerationConfig(Shape):
    """generation_config.json"""

    eos_token_id: Count | list[Count] | None = None


class WeightsIndex(Shape):
    """model.safetensors.index.json"""

    weight_map: dict[str, str]
