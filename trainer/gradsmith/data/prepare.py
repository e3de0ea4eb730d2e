"""Recipe -> a folder of token shards, with a manifest that accounts for every document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import UserError
from ..files import building, check_ours, write_json
from ..recipe import Recipe
from ..run import Run, check_output
from .chat import CHATML, render
from .clean import clean, deduplicate
from .document import Document, Ledger
from .shards import (
    FORMAT,
    TOKENIZER_FILES,
    HashedFile,
    PreparedData,
    ShardWriter,
    file_entry,
    files_in,
)
from .sources import check_sources, decode, fingerprint, read
from .split import SPLITS, assign
from .tokenizer import (
    find_tokenizer,
    load_tokenizer,
    special_tokens_as_text,
    token_bytes,
    train_tokenizer,
)

CHUNK = 256  # documents that are tokenised together, by several threads


def prepare(
    recipe: Recipe, *, fresh: bool = False, log: Callable[[str], None] = print
) -> PreparedData:
    """`gradsmith prepare`: makes `<output>/data/` under the run's lock; see `ensure_data`.

    With `fresh`, what was trained there is forgotten first.

    Raises:
        UserError: what `ensure_data` raises; another process is writing to the run's folder; or
            what was trained there is of another recipe.
    """
    check_output(recipe)
    run = Run(recipe.output)
    with run.lock():
        run.begin(recipe, fresh)
        return ensure_data(recipe, log=log)


def ensure_data(recipe: Recipe, *, log: Callable[[str], None] = print) -> PreparedData:
    """Makes `<output>/data/`, or returns it as it is where it still fits the recipe.

    It fits when recipe and sources hash to what its manifest says and its files are whole.
    Written beside its place and renamed at the end. The caller holds the run's lock.

    Raises:
        UserError: sources that are missing or unreadable (with file and line, row or byte), a
            share of the split that comes out empty, a tokenizer that cannot be loaded, examples
            over length where the recipe refuses them; or other data than the run's checkpoints
            were trained on, and then the old data is left as it is.
    """
    run = Run(recipe.output)
    final, trained_on = run.data, run.trained_on()
    there = _reusable(recipe, final, trained_on, log)
    if there is not None:
        return there
    check_sources(recipe.data, log)
    with building(final, "data") as scratch:
        write_json(scratch / "manifest.json", _write(recipe, scratch, log))
        if trained_on not in (None, PreparedData.open(scratch).fingerprint):
            raise UserError(_changed(run, []))
    return PreparedData.open(final)


def _write(recipe: Recipe, scratch: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Everything but the manifest, which is returned."""
    inputs = _inputs(recipe)
    ledger = Ledger()
    _collect(recipe, scratch, ledger, log)
    tokenizer = _tokenizer(recipe, scratch, ledger, log)
    splits = {name: _tokenise(recipe, scratch, name, tokenizer, ledger) for name in SPLITS}
    _check_shares(recipe, {name: entry["documents"] for name, entry in splits.items()}, ledger)
    _log_length(recipe, splits, log)
    ledger.check()
    return {
        "format": FORMAT,
        "task": recipe.data.task,
        "data_hash": recipe.data_hash(),
        "gradsmith": __version__,
        "vocab_size": len(tokenizer),
        "bos_id": _bos_id(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "sequence_length": recipe.data.sequence_length,
        **inputs,
        "tokenizer": {"files": files_in(scratch / "tokenizer", TOKENIZER_FILES)},
        "ledger": ledger.rows(),
        "splits": splits,
    }


def _changed(run: Run, changed: list[str]) -> str:
    return "\n  ".join(
        [
            f"{run.folder}: the sources are not what this run was trained on, and nothing was "
            "prepared again. Put them back as they were, start over with --fresh, or choose "
            "another output=...",
            *changed,
        ]
    )


# ------------------------------------------------------------------------------- what is there


def _reusable(
    recipe: Recipe, final: Path, trained_on: str | None, log: Callable[[str], None]
) -> PreparedData | None:
    check_ours(final)
    if not (final / "manifest.json").is_file():
        return None
    try:
        prepared = PreparedData.open(final)
        prepared.verify()
    except UserError as error:
        log(f"{error}; preparing again")
        return None
    trained, manifest = trained_on == prepared.fingerprint, prepared.manifest
    if not prepared.fits(recipe) and not trained:
        log("the data part of the recipe has changed: preparing again")
        return None
    try:
        inputs = _inputs(recipe)
    except UserError as error:
        log(f"{error}; going on with what was prepared from it")
        return prepared
    changed = list(_differences(manifest, inputs))
    if changed and trained:
        raise UserError(_changed(Run(recipe.output), changed))
    if changed:
        log("the sources have changed: preparing again")
        return None
    return prepared


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What was read before and is not the same now."""
    for number, (old, new) in enumerate(zip(before["sources"], now["sources"], strict=False)):
        if old["sha256"] != new["sha256"]:
            yield (
                f"data.sources.{number}: {old['files']:,} files of {old['bytes']:,} bytes before, "
                f"{new['files']:,} of {new['bytes']:,} now ({new['path'] or new['kind']})"
            )
    if len(before["sources"]) != len(now["sources"]):
        yield f"data.sources: {len(before['sources'])} before, {len(now['sources'])} now"
    for key, what in (("tokenizer_from", "the tokenizer"), ("template_from", "the chat template")):
        if before[key] != now[key] and now[key] != {}:  # {}: its folder is gone
            yield f"{what} that was taken is not the same"


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """Fingerprints of all that is read."""
    data = recipe.data
    sources = [fingerprint(s, f"data.sources.{i}") for i, s in enumerate(data.sources)]
    place, template = tokenizer_place(recipe), data.chat.template
    return {
        "sources": sources,
        "tokenizer_from": files_in(Path(place[0]), TOKENIZER_FILES) if place else None,
        "template_from": file_entry(_template_file(template)) if template else None,
    }


def _template_file(template: str) -> Path:
    path = Path(template)
    if not path.is_file():
        raise UserError(f"data.chat.template: no file {template} (from {Path.cwd()})")
    return path


# ------------------------------------------------------------------- sources -> raw documents


def _collect(recipe: Recipe, scratch: Path, ledger: Ledger, log: Callable[[str], None]) -> None:
    """Reads, cleans, deduplicates and splits; spools each split's documents to disk."""
    data = recipe.data
    documents: Iterable[Document] = read(data, ledger)
    documents = clean(documents, data.clean, ledger)
    documents = deduplicate(documents, data.clean.exact_duplicates, ledger)
    for name in SPLITS:
        (scratch / name).mkdir()
    files = {name: _spool(scratch, name).open("w", encoding="utf-8") for name in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    try:
        for name, document in assign(documents, data.split, ledger):
            files[name].write(json.dumps(document.to_json(), ensure_ascii=False) + "\n")
            counts[name] += 1
    finally:
        for file in files.values():
            file.close()
    what = "documents" if data.task == "language_modeling" else "conversations"
    log(f"{what}: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    _check_shares(recipe, counts, ledger)


def _spool(scratch: Path, name: str) -> Path:
    return scratch / name / "spool.jsonl"


def _read_spool(scratch: Path, name: str) -> Iterator[dict[str, Any]]:
    with _spool(scratch, name).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _check_shares(recipe: Recipe, counts: dict[str, int], ledger: Ledger) -> None:
    """Every split that the recipe asks for has a document.

    Raises:
        UserError: with the counts, and why documents were dropped.
    """
    shares = recipe.data.split
    wanted = {"train": True, "validation": shares.validation > 0, "test": shares.test > 0}
    empty = [name for name, asked in wanted.items() if asked and not counts[name]]
    if not empty:
        return
    found = ", ".join(f"{name} {n}" for name, n in counts.items())
    where, advice = "data.sources", "give more data, or check data.clean and data.chat.over_length"
    if "train" not in empty:
        held_out = next(name for name in empty if name != "train")
        where = f"data.split.{held_out}"
        advice = "give more documents, a larger share, or 0 to go without"
    dropped = [row for row in ledger.rows() if row["what"] == "dropped"]
    why = "; ".join(f"{row['documents']} {row.get('reason', '')}" for row in dropped)
    told = f"{found}; dropped: {why}" if why else found
    raise UserError(f"{where}: nothing is left for {' and '.join(empty)} ({told}); {advice}")


# -------------------------------------------------------------------------------- the tokenizer


def tokenizer_place(recipe: Recipe) -> tuple[str, str] | None:
    """(folder or hub name, the recipe's key) of a tokenizer that is taken and not trained."""
    settings = recipe.data.tokenizer
    if settings is not None and settings.train is not None:
        return None
    key, path = "model.from", recipe.model.from_
    if settings is not None:
        key, path = "data.tokenizer.from", settings.from_
    assert path is not None  # the recipe has one of them
    return find_tokenizer(path, key), key


def _tokenizer(recipe: Recipe, scratch: Path, ledger: Ledger, log: Callable[[str], None]) -> Any:
    place = tokenizer_place(recipe)
    if place is not None:
        tokenizer = load_tokenizer(*place)
    else:
        assert recipe.data.tokenizer is not None
        assert recipe.data.tokenizer.train is not None
        asked = recipe.data.tokenizer.train.vocab_size
        log(f"training a tokenizer of {asked:,} tokens on the training split")
        tokenizer = train_tokenizer(_texts(_read_spool(scratch, "train")), asked)
        if len(tokenizer) < asked:
            reason = f"asked for {asked}; the training split has no more pairs to merge"
            ledger.add("vocabulary", "smaller", 0, tokens=len(tokenizer), reason=reason)
            log(f"the vocabulary has {len(tokenizer):,} tokens: {reason}")
    template = recipe.data.chat.template
    if template is not None:
        file = _template_file(template)
        tokenizer.chat_template = decode(file.read_bytes(), file)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(scratch / "tokenizer")
    return tokenizer


def _texts(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "text" in row:
            yield row["text"]
        else:
            yield from (message["content"] for message in row["messages"])


def _bos_id(tokenizer: Any) -> int:
    """What a document starts with: BOS, or in a vocabulary without one EOS, as in GPT-2."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


# ------------------------------------------------------------------------ documents -> shards


def _tokenise(
    recipe: Recipe, scratch: Path, name: str, tokenizer: Any, ledger: Ledger
) -> dict[str, Any]:
    """Writes one split's shard; returns its entry in the manifest."""
    chat = recipe.data.task == "chat"
    writer = ShardWriter(scratch / name, len(tokenizer), with_targets=chat)
    raw = HashedFile(scratch / name / "documents.jsonl") if name != "train" else None
    encoded = _conversations if chat else _plain
    size = eos_targets = 0
    for row, ids, targets, row_bytes in encoded(
        recipe, _read_spool(scratch, name), tokenizer, ledger
    ):
        writer.add(ids, targets)
        in_loss = ids[1:] if targets is None else ids[targets]
        eos = int((in_loss == tokenizer.eos_token_id).sum())
        eos_targets += eos
        if not eos:
            reason = "no EOS in the loss: nothing teaches the model to stop"
            ledger.add("targets", "without EOS", reason=reason)
        size += row_bytes
        if raw is not None:
            raw.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    masked = "prompt and template" if chat else "BOS, which nothing comes before"
    ledger.add("targets", "in", writer.documents, tokens=writer.tokens)
    ledger.add("targets", "kept", writer.documents, tokens=writer.target_tokens)
    ledger.add("targets", "masked", 0, tokens=writer.tokens - writer.target_tokens, reason=masked)
    _spool(scratch, name).unlink()
    files = writer.close()
    if raw is not None:
        files[raw.path.name] = raw.close()
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "target_tokens": writer.target_tokens,
        "bytes": size,
        "eos_targets": eos_targets,
        "files": files,
    }


# (raw document, ids, targets or None for all but the first, UTF-8 bytes that the targets are)
_Encoded = Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray | None, int]]


def _chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _plain(
    recipe: Recipe, rows: Iterator[dict[str, Any]], tokenizer: Any, ledger: Ledger
) -> _Encoded:
    """BOS + text + EOS."""
    bos, eos = _bos_id(tokenizer), tokenizer.eos_token_id
    with special_tokens_as_text(tokenizer) as backend:
        for chunk in _chunks(rows):
            texts = [row["text"] for row in chunk]
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            for row, encoding in zip(chunk, encodings, strict=True):
                ids = np.array([bos, *encoding.ids, eos])
                ledger.add("tokenize", "in")
                ledger.add("tokenize", "kept", tokens=len(ids))
                yield row, ids, None, len(row["text"].encode())


def _conversations(
    recipe: Recipe, rows: Iterator[dict[str, Any]], tokenizer: Any, ledger: Ledger
) -> _Encoded:
    """The chat template's rendering; targets are the answers' tokens."""
    sizes = token_bytes(tokenizer)
    for chunk in _chunks(_rendered(recipe, rows, tokenizer, ledger)):
        texts = [text for _, text, _ in chunk]
        encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for (row, _, spans), encoding in zip(chunk, encodings, strict=True):
            ids = np.array(encoding.ids, np.int64)
            first, last = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            targets = np.zeros(len(ids), np.bool_)
            for start, end in spans:  # a token over the edge, as " word" may be, counts
                targets |= (first < end) & (last > start)
            targets[:1] = False  # nothing comes before the first token
            ledger.add("tokenize", "in")
            ledger.add("tokenize", "kept", tokens=len(ids))
            kept = _fit(recipe, len(ids), targets, row["source"], ledger)
            if kept:
                ids, targets = ids[:kept], targets[:kept]
                yield row, ids, targets, int(sizes[ids[targets]].sum())


def _rendered(
    recipe: Recipe, rows: Iterator[dict[str, Any]], tokenizer: Any, ledger: Ledger
) -> Iterator[tuple[dict[str, Any], str, list[tuple[int, int]]]]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    system = recipe.data.chat.system
    for row in rows:
        messages = row["messages"]
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        ledger.add("render", "in")
        # in a rendered text it would be the token, and could end or begin a turn
        if any(token in message["content"] for message in messages for token in special):
            ledger.add("render", "dropped", reason="has the text of a special token in it")
            continue
        ledger.add("render", "kept")
        yield row, *render(tokenizer, messages, row["source"])


def _fit(recipe: Recipe, length: int, targets: np.ndarray, source: str, ledger: Ledger) -> int:
    """How many of an example's tokens are kept; 0 means that it is dropped.

    Its last token is only ever a label, so sequence_length + 1 tokens fit.

    Raises:
        UserError: it is over length and the recipe says refuse.
    """
    room, over_length = recipe.data.sequence_length + 1, recipe.data.chat.over_length
    ledger.add("length", "in", tokens=length)
    kept, reason = length, "no answer's token in it"
    if length > room:
        if over_length == "refuse":
            raise UserError(
                f"data.chat.over_length: {source} has {length} tokens, and "
                f"data.sequence_length {recipe.data.sequence_length} takes {room}; "
                "allowed are a larger sequence_length, or drop or truncate here"
            )
        kept, reason = room, f"longer than {room} tokens"
        if over_length == "drop":
            ledger.add("length", "dropped", tokens=length, reason=reason)
            return 0
        ledger.add("length", "truncated", tokens=length - kept, reason=reason)
        reason = "no answer's token left after truncation"
    if not targets[:kept].any():
        ledger.add("length", "dropped", tokens=kept, reason=reason)
        return 0
    ledger.add("length", "kept", tokens=kept)
    return kept


def _log_length(
    recipe: Recipe, splits: dict[str, dict[str, Any]], log: Callable[[str], None]
) -> None:
    for name, entry in splits.items():
        if entry["documents"]:
            log(
                f"{name}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
                f"{entry['target_tokens']:,} of them in the loss"
            )
