"""What a recipe's sources hold, cleaned and split, on disk until it is encoded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self

from ..recipe import Recipe
from .clean import clean, deduplicate
from .columns import ColumnWriter, HashedFile
from .example import Dropped, Example, Ledger
from .processor import Processor, processor_class
from .sources import read
from .split import SPLITS, assign

CHUNK = 256  # examples that are encoded together, by several threads


class Spool(Protocol):
    """The rows of all splits, between reading and encoding."""

    @property
    def counts(self) -> dict[str, int]:
        """How many each split has."""
        ...

    @classmethod
    def collect(
        cls, recipe: Any, scratch: Path, ledger: Ledger, log: Callable[[str], None]
    ) -> Self:
        """Reads, cleans, deduplicates and splits."""
        ...

    def training(self) -> Iterable[Any]:
        """The training split, which a processor is fitted on."""
        ...

    def encode(self, processor: Any, name: str, ledger: Ledger) -> dict[str, Any]:
        """Writes a split's rows and drops them here; returns its entry in the manifest."""
        ...


class ExampleSpool:
    """A file of JSON lines for each split: examples one by one."""

    def __init__(self, scratch: Path):
        self.scratch, self.counts = scratch, dict.fromkeys(SPLITS, 0)

    @classmethod
    def collect(
        cls, recipe: Recipe, scratch: Path, ledger: Ledger, log: Callable[[str], None]
    ) -> Self:
        data = recipe.data
        documents: Iterable[Example] = read(data, ledger)
        documents = clean(documents, data.clean, ledger)
        documents = deduplicate(documents, data.clean.exact_duplicates, ledger)
        found = cls(scratch)
        files = {name: found._file(name).open("w", encoding="utf-8") for name in SPLITS}
        try:
            for name, document in assign(documents, data.split, ledger):
                files[name].write(json.dumps(document.to_json(), ensure_ascii=False) + "\n")
                found.counts[name] += 1
        finally:
            for file in files.values():
                file.close()
        what = processor_class(data.task).noun
        log(f"{what}: " + ", ".join(f"{name} {n:,}" for name, n in found.counts.items()))
        return found

    def _file(self, name: str) -> Path:
        return self.scratch / name / "spool.jsonl"

    def _read(self, name: str) -> Iterator[Example]:
        with self._file(name).open(encoding="utf-8") as lines:
            for line in lines:
                yield Example.from_json(json.loads(line))

    def training(self) -> Iterator[Example]:
        return self._read("train")

    def encode(self, processor: Processor, name: str, ledger: Ledger) -> dict[str, Any]:
        writer = ColumnWriter(self.scratch / name, processor.columns)
        raw = HashedFile(self.scratch / name / "documents.jsonl") if name != "train" else None
        counts = Counter(dict.fromkeys(("documents", *processor.counted), 0))
        examples = self._read(name)
        while chunk := list(islice(examples, CHUNK)):
            for example, row in zip(chunk, processor.encode(chunk, ledger), strict=True):
                if isinstance(row, Dropped):
                    continue
                writer.add(row)
                counts.update(documents=1, **processor.tally(example, row))
                if raw is not None:
                    raw.write((json.dumps(example.to_json(), ensure_ascii=False) + "\n").encode())
        processor.account(counts, ledger)
        self._file(name).unlink()
        files = writer.close()
        if raw is not None:
            files[raw.path.name] = raw.close()
        return {**counts, "files": files}
