"""The prepared folder: rows on disk, and `PreparedData`, which reads them.

```
data/
  manifest.json                what it was made from, what became of it, hashes of all files
  tokenizer/ or processor/     what the processor learned of the training split
  <split>/<column>.bin         see gradsmith.data.columns; for text:
      tokens.bin               ids: uint16 up to a vocabulary of 65536, else uint32
      offsets.bin              uint64, documents + 1: document i is tokens[offsets[i]:offsets[i+1]]
      targets.bin              chat only: uint8 for each token, 1 where it counts in the loss
  <split>/documents.jsonl      validation and test: the raw examples
```
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import file_entry, fingerprint_of
from ..reading import check, describe, parse_json, read_json
from ..shapes import DataManifest
from .example import Example
from .processor import PROCESSORS, Processor, processor_class

if TYPE_CHECKING:
    from ..recipe import Recipe

FORMAT = "gradsmith-data-1"


class PreparedData:
    """What `prepare` wrote into a run's `data/`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path) -> PreparedData:
        """Reads the manifest only; see `verify`.

        Raises:
            UserError: nothing is prepared there, or by another version of the format.
        """
        path = Path(folder) / "manifest.json"
        if not path.is_file():
            raise UserError(f"{folder}: no prepared data there; run `gradsmith prepare` first")
        manifest = read_json(path)
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise UserError(f'{path}: format "{found}"; this version reads "{FORMAT}"')
        task = check(manifest, DataManifest, str(path))["task"]
        if task not in PROCESSORS:
            raise UserError(
                f"{path}: task: found {describe(task)}; allowed are {', '.join(PROCESSORS)}"
            )
        shape = processor_class(task).manifest_shape
        return cls(Path(folder), check(manifest, shape, str(path)))

    @property
    def task(self) -> str:
        return str(self.manifest["task"])

    def fits(self, recipe: Recipe) -> bool:
        """Whether the recipe's data part is the one that this was made from."""
        return bool(self.manifest["data_hash"] == recipe.data_hash())

    @property
    def fingerprint(self) -> str:
        """One hash over all files: equal means the same tokens, splits and tokenizer."""
        return fingerprint_of(self._files())

    @property
    def _processor(self) -> type[Processor]:
        return processor_class(self.task)

    @property
    def processor_name(self) -> str:
        """What the processor's folder is called."""
        return self._processor.folder

    @property
    def processor_fingerprint(self) -> str:
        """One hash over the processor's files."""
        return fingerprint_of(self.manifest[self._processor.folder]["files"])

    def processor_files(self) -> dict[str, bytes]:
        """The processor's files, by name."""
        name = self._processor.folder
        names = self.manifest[name]["files"]
        return {file: (self.folder / name / file).read_bytes() for file in names}

    def _files(self) -> dict[str, dict[str, Any]]:
        """Path inside the folder -> {bytes, sha256}."""
        name = self._processor.folder
        files = {f"{name}/{k}": v for k, v in self.manifest[name]["files"].items()}
        for split, entry in self.manifest["splits"].items():
            files |= {f"{split}/{k}": v for k, v in entry["files"].items()}
        return files

    def verify(self, *splits: str) -> None:
        """Compares the size and SHA-256 of the processor's and the splits' files (by default of
        all splits) with the manifest.

        Raises:
            UserError: naming the first file that is missing or differs.
        """
        wanted = (self._processor.folder, *(splits or self.manifest["splits"]))
        for name, entry in self._files().items():
            if name.partition("/")[0] not in wanted:
                continue
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{path}: missing, though the manifest lists it")
            found = file_entry(path)
            for what in ("bytes", "sha256"):
                if found[what] != entry[what]:
                    raise UserError(
                        f"{path}: damaged: {what} {found[what]}, where the manifest has "
                        f"{entry[what]}; delete the data folder and prepare again"
                    )

    def processor(self, recipe: Recipe) -> Processor:
        """What encoded the rows."""
        return self._processor.from_pretrained(self.folder / self._processor.folder, recipe)

    def split(self, name: str) -> Any:
        """The rows of a split, as its task's processor reads them."""
        self._check(name)
        columns = self._processor.stored(self.manifest)
        return self._processor.split_class(self.folder / name, columns)

    def held_out_path(self, name: str) -> Path:
        """The file with the raw examples of validation or test.

        Raises:
            UserError: there is no such split, or it is not held out.
        """
        self._check(name)
        path = self.folder / name / "documents.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: raw documents are kept for validation and test only")
        return path

    def held_out(self, name: str) -> list[dict[str, Any]]:
        """The raw examples of validation or test, as `Example.to_json` writes them."""
        path = self.held_out_path(name)
        with path.open(encoding="utf-8") as lines:
            return [parse_json(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]

    def examples(self, name: str) -> list[Example]:
        """The raw examples of validation or test."""
        return [Example.from_json(row) for row in self.held_out(name)]

    def _check(self, name: str) -> None:
        there = [k for k, split in self.manifest["splits"].items() if split["documents"]]
        if name not in there:
            raise UserError(f'{self.folder}: no split "{name}"; there are {", ".join(there)}')
