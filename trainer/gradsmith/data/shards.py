"""The prepared folder: token shards on disk, and `PreparedData`, which reads them.

```
data/
  manifest.json                what it was made from, what became of it, hashes of all files
  tokenizer/                   a Hugging Face tokenizer folder
  <split>/tokens.bin           ids, little endian: uint16 up to a vocabulary of 65536, else uint32
  <split>/offsets.bin          uint64, documents + 1: document i is tokens[offsets[i]:offsets[i+1]]
  <split>/targets.bin          chat only: uint8 for each token, 1 where it counts in the loss
  <split>/documents.jsonl      validation and test: the raw documents
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..files import sha256
from ..reading import check, parse_json, read_json
from ..shapes import DataManifest

if TYPE_CHECKING:
    from ..recipe import Recipe

FORMAT = "gradsmith-data-1"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip


class HashedFile:
    """A file that is written once, front to back, with its size and SHA-256."""

    def __init__(self, path: Path):
        self.path, self.size, self._hash = path, 0, hashlib.sha256()
        self._file: IO[bytes] = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}


def file_entry(path: Path) -> dict[str, Any]:
    """A file's {bytes, sha256}."""
    try:
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def files_in(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> {bytes, sha256} of those of the files that are there."""
    return {name: file_entry(folder / name) for name in names if (folder / name).is_file()}


def fingerprint_of(files: dict[str, dict[str, Any]]) -> str:
    """One hash over files: equal means the same names and the same bytes."""
    digests = {path: entry["sha256"] for path, entry in files.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


class ShardWriter:
    """Appends documents to one split's shard."""

    def __init__(self, folder: Path, vocab_size: int, with_targets: bool):
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._tokens = HashedFile(folder / "tokens.bin")
        self._offsets = HashedFile(folder / "offsets.bin")
        self._targets = HashedFile(folder / "targets.bin") if with_targets else None
        self._offsets.write(np.zeros(1, "<u8").tobytes())
        self.documents = self.tokens = self.target_tokens = 0

    def add(self, ids: np.ndarray, targets: np.ndarray | None = None) -> None:
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self.documents += 1
        self.tokens += len(ids)
        if self._targets is None:
            self.target_tokens += len(ids) - 1
        else:
            assert targets is not None
            self._targets.write(targets.astype(np.uint8).tobytes())
            self.target_tokens += int(targets.sum())
        self._offsets.write(np.array([self.tokens], "<u8").tobytes())

    def close(self) -> dict[str, dict[str, Any]]:
        """The files' sizes and hashes, by name."""
        files = [self._tokens, self._offsets, *([self._targets] if self._targets else [])]
        return {file.path.name: file.close() for file in files}


class TokenSplit:
    """One split, memory-mapped: `tokens`, `offsets` and, for chat, `targets`."""

    def __init__(self, folder: Path, vocab_size: int):
        self.tokens = _map(folder / "tokens.bin", "<u2" if vocab_size <= 1 << 16 else "<u4")
        self.offsets = _map(folder / "offsets.bin", "<u8")
        targets = folder / "targets.bin"
        self.targets = _map(targets, np.bool_) if targets.is_file() else None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether each counts in the loss); in language modelling all but the first do."""
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        if self.targets is not None:
            return self.tokens[start:stop], self.targets[start:stop]
        is_target = np.ones(stop - start, np.bool_)
        is_target[:1] = False
        return self.tokens[start:stop], is_target


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


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
        return cls(Path(folder), check(manifest, DataManifest, str(path)))

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
    def tokenizer_fingerprint(self) -> str:
        """One hash over the tokenizer's files."""
        return fingerprint_of(self.manifest["tokenizer"]["files"])

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, by name."""
        folder = self.folder / "tokenizer"
        return {name: (folder / name).read_bytes() for name in self.manifest["tokenizer"]["files"]}

    def _files(self) -> dict[str, dict[str, Any]]:
        """Path inside the folder -> {bytes, sha256}."""
        files = {f"tokenizer/{k}": v for k, v in self.manifest["tokenizer"]["files"].items()}
        for name, split in self.manifest["splits"].items():
            files |= {f"{name}/{k}": v for k, v in split["files"].items()}
        return files

    def verify(self, *splits: str) -> None:
        """Compares the size and SHA-256 of the tokenizer's and the splits' files (by default of
        all splits) with the manifest.

        Raises:
            UserError: naming the first file that is missing or differs.
        """
        wanted = ("tokenizer", *(splits or self.manifest["splits"]))
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

    def tokenizer(self) -> Any:
        """The transformers PreTrainedTokenizerFast."""
        from .tokenizer import load_tokenizer

        return load_tokenizer(str(self.folder / "tokenizer"), "data")

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 (V,); special tokens 0."""
        from .tokenizer import token_bytes

        return token_bytes(self.tokenizer())

    def split(self, name: str) -> TokenSplit:
        self._check(name)
        return TokenSplit(self.folder / name, self.manifest["vocab_size"])

    def held_out(self, name: str) -> list[dict[str, Any]]:
        """The raw documents of validation or test: {"text"} or {"messages"}, and "source"."""
        self._check(name)
        path = self.folder / name / "documents.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: raw documents are kept for validation and test only")
        with path.open(encoding="utf-8") as lines:
            return [parse_json(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]

    def _check(self, name: str) -> None:
        there = [k for k, split in self.manifest["splits"].items() if split["documents"]]
        if name not in there:
            raise UserError(f'{self.folder}: no split "{name}"; there are {", ".join(there)}')
