"""`data`: where examples come from, what is held out, and how they become rows."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .node import Fraction, Node, PathText, PositiveInt

Channels = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)
]
RecordKind = Literal["jsonl", "csv", "parquet", "hf_dataset"]


class Source(Node):
    """Where examples come from: what the sources of all tasks have."""

    without_path: ClassVar[tuple[str, ...]] = ("python_stdlib", "digits")  # kinds

    kind: str
    path: PathText | None = Field(
        None, description="file, folder or glob; for hf_dataset a hub name or a local folder"
    )
    split: str = Field("train", description="hf_dataset: which of its splits to read")
    limit: PositiveInt | None = Field(None, description="read at most this many examples")

    @model_validator(mode="after")
    def _path_given(self) -> Source:
        if self.kind in self.without_path:
            if self.path is not None:
                raise ValueError(f"path does not go with kind {self.kind}; leave it out")
        elif self.path is None:
            raise ValueError(f"kind {self.kind} needs a path")
        return self


class TextSource(Source):
    """Texts, or conversations."""

    kind: Literal["text", "jsonl", "parquet", "python_stdlib", "hf_dataset"]
    text: str = Field("text", description="the column or key that holds a document's text")
    prompt: str | None = Field(None, description="chat: the column or key of the question")
    response: str | None = Field(None, description="chat: the column or key of the answer")
    messages: str | None = Field(None, description="chat: the column or key of a message list")

    @model_validator(mode="after")
    def _consistent(self) -> TextSource:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response go together: name both or neither")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("name either messages or prompt and response, not both")
        return self


class RecordSource(Source):
    """Records of named fields."""

    kind: RecordKind
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="csv: what parts its columns; default: a tab in *.tsv, else a comma"
    )
    columns: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="csv: the columns' names, where the file's first line does not say them"
    )

    @model_validator(mode="after")
    def _csv_alone(self) -> RecordSource:
        for key in ("delimiter", "columns"):
            if self.kind != "csv" and getattr(self, key) is not None:
                raise ValueError(f"{key} goes with kind csv; the kind is {self.kind}")
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns: {', '.join(self.columns)}: a name is there twice")
        return self


class LabelledSource(RecordSource):
    """Texts with the class of each."""

    text: str = Field("text", description="the column or key of the text")
    label: str = Field("label", description="the column or key of its class: text or a number")


class ImageSource(Source):
    """Pictures with the class of each."""

    kind: Literal["image_folder", "tar", "parquet", "hf_dataset", "digits"]
    image: str = Field("image", description="the column of the picture: its file's bytes")
    label: str = Field("label", description="the column of its class: text or a number")


class PairSource(RecordSource):
    """A prompt with two answers, of which one is preferred."""

    prompt: str = Field("prompt", description="the column or key of the question")
    chosen: str = Field("chosen", description="the column or key of the better answer")
    rejected: str = Field("rejected", description="the column or key of the worse answer")


class Split(Node):
    """Shares held out, by content hash: a document never changes sides when others are added."""

    validation: Fraction = 0.05
    test: Fraction = 0.05

    @model_validator(mode="after")
    def _some_left(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation + test is {self.validation + self.test:g}; it must stay below 1"
            )
        return self


class TokenizerTraining(Node):
    vocab_size: Annotated[int, Field(ge=261, le=1_000_000)] = 4096  # bytes + 5


class Tokenizer(Node):
    """Trained here as a byte-level BPE, or taken from a folder."""

    train: TokenizerTraining | None = None
    from_: PathText | None = Field(None, alias="from", description="a folder with tokenizer.json")

    @model_validator(mode="after")
    def _one(self) -> Tokenizer:
        if (self.train is None) == (self.from_ is None):
            raise ValueError("give exactly one of train and from")
        return self


class Clean(Node):
    exact_duplicates: bool = Field(True, description="drop documents whose text occurred before")
    min_characters: Annotated[int, Field(ge=0)] = 1


class Chat(Node):
    template: PathText | None = Field(
        None, description="a Jinja file; without it the tokenizer's own, else ChatML"
    )
    system: str | None = None
    over_length: Literal["drop", "truncate", "refuse"] = Field(
        "drop", description="what happens to an example longer than sequence_length"
    )


class Data(Node):
    """What the data of all tasks have. Each task's class narrows `task` and `sources`."""

    task: str
    sources: Annotated[list[Any], Field(min_length=1)]
    split: Split = Split()
    clean: Clean = Clean()

    def of_model(self) -> bool:
        """Whether what is prepared follows from `model.from` too."""
        return False


class TokenizedData(Data):
    """Rows of tokens."""

    tokenizer: Tokenizer | None = Field(
        None, description="default: the tokenizer in the folder of model.from"
    )
    sequence_length: Annotated[int, Field(ge=2)] = 512

    def of_model(self) -> bool:
        return self.tokenizer is None


class TextData(TokenizedData):
    task: Literal["language_modeling", "chat"] = "language_modeling"
    sources: Annotated[list[TextSource], Field(min_length=1)]
    chat: Chat = Chat()
    packing: bool = True


class LanguageModelingData(TextData):
    task: Literal["language_modeling"] = "language_modeling"


class ChatData(TextData):
    task: Literal["chat"]


class LabelledData(TokenizedData):
    task: Literal["text_classification"]
    sources: Annotated[list[LabelledSource], Field(min_length=1)]


class PairData(TokenizedData):
    task: Literal["preference"]
    sources: Annotated[list[PairSource], Field(min_length=1)]
    chat: Chat = Chat()


class Image(Node):
    """What the model sees of a picture."""

    size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="edge of the square in pixels; default: that of model.from, else 224"
    )
    mean: Channels | None = Field(None, description="of the channels, of pixels from 0 to 1")
    std: Channels | None = None
    on_error: Literal["drop", "refuse"] = Field(
        "drop", description="what happens to a file that is damaged or no picture"
    )

    @model_validator(mode="after")
    def _divisible(self) -> Image:
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: found {self.std}; allowed are numbers above 0")
        return self


class ImageData(Data):
    task: Literal["image_classification"]
    sources: Annotated[list[ImageSource], Field(min_length=1)]
    image: Image = Image()

    def of_model(self) -> bool:
        return None in (self.image.size, self.image.mean, self.image.std)
