"""Recipe -> a folder of encoded rows, with a manifest that accounts for every example."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..files import building, check_ours, files_in, write_json
from ..recipe import Recipe
from ..run import Run, check_output
from .example import Ledger
from .prepared import FORMAT, PreparedData
from .processor import PROCESSOR_FILES, processor_class
from .sources import check_sources, fingerprint
from .split import SPLITS


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


def preview(recipe: Recipe, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """`gradsmith prepare --dry-run`: all that `prepare` would do, kept nowhere.

    Returns:
        the manifest that it would write; the ledger's lines are logged.

    Raises:
        UserError: as `ensure_data`.
    """
    check_sources(recipe.data, log)
    with tempfile.TemporaryDirectory(prefix="gradsmith-") as scratch:
        manifest = _write(recipe, Path(scratch), log)
    for row in manifest["ledger"]:
        tokens = f", {row['tokens']:,} tokens" if row.get("tokens") else ""
        why = ": ".join(row[key] for key in ("source", "reason") if key in row)
        log(f"{row['step']} {row['what']} {row['documents']:,}{tokens}{f' ({why})' if why else ''}")
    return manifest


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
    kind = processor_class(recipe.data.task)
    for name in SPLITS:
        (scratch / name).mkdir()
    spool = kind.spool().collect(recipe, scratch, ledger, log)
    _check_shares(recipe, spool.counts, ledger)
    processor = kind.fit(recipe, spool.training, ledger, log)
    processor.save_pretrained(scratch / kind.folder)
    splits = {name: spool.encode(processor, name, ledger) for name in SPLITS}
    _check_shares(recipe, {name: entry["documents"] for name, entry in splits.items()}, ledger)
    _log_splits(splits, kind.noun, log)
    ledger.check()
    return {
        "format": FORMAT,
        "task": recipe.data.task,
        "data_hash": recipe.data_hash(),
        "gradsmith": __version__,
        **processor.describe(),
        **inputs,
        kind.folder: {"files": files_in(scratch / kind.folder, PROCESSOR_FILES[kind.folder])},
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
        if before.get(key) != now.get(key) and now.get(key) != {}:  # {}: its folder is gone
            yield f"{what} that was taken is not the same"


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """Fingerprints of all that is read."""
    data = recipe.data
    sources = [fingerprint(s, f"data.sources.{i}") for i, s in enumerate(data.sources)]
    return {"sources": sources, **processor_class(data.task).inputs(recipe)}


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


def _log_splits(splits: dict[str, dict[str, Any]], noun: str, log: Callable[[str], None]) -> None:
    for name, entry in splits.items():
        if entry["documents"]:
            more = f", {entry['tokens']:,} tokens" if "tokens" in entry else ""
            if "target_tokens" in entry:
                more += f", {entry['target_tokens']:,} of them in the loss"
            log(f"{name}: {entry['documents']:,} {noun}{more}")
