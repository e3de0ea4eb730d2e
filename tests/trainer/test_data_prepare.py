"""`prepare` end to end: what is kept adds up, sides are stable, the folder is what it says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from data_recipes import (
    dropped,
    jsonl_source,
    make,
    pairs,
    recipe,
    tokenizer_of,
    words,
    write_jsonl,
)

from gradsmith.data import tokenizer as tokenizers
from gradsmith.data.columns import ColumnWriter
from gradsmith.data.example import Ledger, content_digest
from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.data.split import side
from gradsmith.data.text import TextProcessor, TokenSplit
from gradsmith.data.tokenizer import token_bytes
from gradsmith.errors import RunError, UserError
from gradsmith.recipe import Split, parse_recipe

SPLIT = {"validation": 0.2, "test": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(80):
        (folder / f"{i:03}.txt").write_text(words(i, 60) + " naïve 🙂 <|eos|>\n", encoding="utf-8")
    (folder / "copy.txt").write_text((folder / "003.txt").read_text(encoding="utf-8"))
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def source(folder) -> dict[str, str]:
    return {"kind": "text", "path": str(folder)}


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> PreparedData:
    return make(tmp_path_factory.mktemp("run"), sources=[source], split=SPLIT)


def sides(prepared: PreparedData) -> dict[str, str]:
    """Text -> split, of everything; the training texts are decoded from the shard."""
    tokenizer, found = tokenizer_of(prepared), {}
    for name in prepared.manifest["splits"]:
        split = prepared.split(name)
        for i in range(len(split)):
            ids, _ = split.document(i)
            text = tokenizer.decode(ids[1:-1].astype(int))
            assert text not in found
            found[text] = name
    return found


# ------------------------------------------------------------------------------- the contents


def test_documents_are_bos_text_eos_and_decode_to_themselves(prepared, folder):
    texts = {path.read_text(encoding="utf-8") for path in folder.glob("*.txt")} - {""}
    assert set(sides(prepared)) == texts
    bos, eos = prepared.manifest["bos_id"], prepared.manifest["eos_id"]
    split = prepared.split("train")
    for i in range(len(split)):
        ids, is_target = split.document(i)
        assert (ids[0], ids[-1]) == (bos, eos)
        # the "<|eos|>" in every text is seven characters and no token
        assert not np.isin(ids[1:-1], (bos, eos)).any()
        assert is_target.tolist() == [False] + [True] * (len(ids) - 1)


def test_the_manifest_counts_what_is_there(prepared, folder):
    sizes = token_bytes(tokenizer_of(prepared))
    total = 0
    for name, entry in prepared.manifest["splits"].items():
        split = prepared.split(name)
        assert entry["documents"] == len(split) == entry["eos_targets"]
        assert entry["tokens"] == len(split.tokens) == split.offsets[-1]
        assert entry["target_tokens"] == entry["tokens"] - entry["documents"]
        assert entry["bytes"] == sizes[split.tokens].sum()
        total += entry["bytes"]
        if name != "train":
            held_out = [row["text"] for row in prepared.held_out(name)]
            assert sum(len(text.encode()) for text in held_out) == entry["bytes"]
            assert {text for text, s in sides(prepared).items() if s == name} == set(held_out)
    copy = (folder / "copy.txt").stat().st_size
    assert total == sum(path.stat().st_size for path in folder.glob("*.txt")) - copy
    assert prepared.split("train").tokens.dtype == np.dtype("<u2")


def test_the_ledger_accounts_for_every_document(prepared):
    rows = prepared.manifest["ledger"]

    def count(step: str, *whats: str) -> int:
        return sum(r["documents"] for r in rows if r["step"] == step and r["what"] in whats)

    assert count("read", "in") == 82
    assert dropped(prepared, "clean") == {"text shorter than clean.min_characters (1)": 1}
    assert dropped(prepared, "deduplicate") == {"exact duplicate": 1}
    steps = ["read", "clean", "deduplicate", "split", "tokenize"]
    for step, following in itertools.pairwise(steps):
        left = count(step, "kept", "train", "validation", "test")
        assert count(step, "in") == left + count(step, "dropped", "joined")
        assert count(following, "in") == left
    kept = {r["what"]: r["tokens"] for r in rows if r["step"] == "targets"}
    assert kept["in"] == kept["kept"] + kept["masked"]
    for what in ("train", "validation", "test"):
        assert count("split", what) == prepared.manifest["splits"][what]["documents"]


def test_a_ledger_that_does_not_add_up_is_an_error():
    ledger = Ledger()
    ledger.add("clean", "in", 3)
    ledger.add("clean", "kept", 2)
    with pytest.raises(RunError, match="at clean: 3 documents"):
        ledger.check()
    ledger.add("clean", "dropped", 1, reason="it was short")
    ledger.check()
    ledger.add("length", "in", 1, tokens=10)
    ledger.add("length", "kept", 1, tokens=8)
    with pytest.raises(RunError, match=r"at length: .* 10 tokens"):
        ledger.check()
    ledger.add("length", "truncated", 1, tokens=2)
    ledger.check()


# ---------------------------------------------------------------------------------- the split


def test_no_document_changes_sides_when_others_come_and_go(prepared, tmp_path):
    first = sides(prepared)
    corpus = tmp_path / "other"
    corpus.mkdir()
    for number, text in enumerate([*list(first)[10:], *(words(500 + i, 50) for i in range(40))]):
        (corpus / f"{number % 7}-{number}.txt").write_text(text, encoding="utf-8")
    source = {"kind": "text", "path": str(corpus)}
    second = sides(make(tmp_path / "run", seed=99, sources=[source], split=SPLIT))
    common = set(first) & set(second)
    assert len(common) == 70
    assert all(first[text] == second[text] for text in common)
    assert set(first.values()) == set(second.values()) == {"train", "validation", "test"}


def test_kept_duplicates_stay_on_one_side(tmp_path):
    rows = [{"text": words(i % 30, 20)} for i in range(90)]
    source = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    clean = {"exact_duplicates": False}
    run = make(tmp_path / "run", sources=[source], split=SPLIT, clean=clean)
    held_out = {name: [r["text"] for r in run.held_out(name)] for name in ("validation", "test")}
    assert sum(entry["documents"] for entry in run.manifest["splits"].values()) == 90
    for texts in held_out.values():
        assert all(texts.count(text) == 3 for text in texts)
    assert not set(held_out["validation"]) & set(held_out["test"])


def test_one_text_file_has_held_out_shares_and_loses_nothing(tmp_path):
    text = "\n\n".join(words(i, 25) for i in range(1500)) + "\n"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text)
    source = {"kind": "text", "path": str(corpus)}
    prepared = make(tmp_path / "run", sources=[source], split={"validation": 0.1, "test": 0.1})
    first = sides(prepared)
    for name in ("validation", "test"):
        share = prepared.manifest["splits"][name]["bytes"] / len(text)
        assert 0.03 < share < 0.25
    assert sum(map(len, first)) == len(text)
    for document, here in first.items():
        assert document in text
        # neighbours on one side are one document again
        start = text.index(document)
        assert not any(text[:start].endswith(other) for other, s in first.items() if s == here)


def test_an_empty_share_is_an_error_with_the_counts(tmp_path):
    source = jsonl_source(write_jsonl(tmp_path / "rows.jsonl", pairs(1)))
    source = {"kind": "jsonl", "path": source["path"], "text": "answer"}
    message = r"data\.split\.\w+: nothing is left for .* \(train \d, validation \d, test \d\)"
    with pytest.raises(UserError, match=message):
        make(tmp_path / "run", sources=[source])
    none = {"validation": 0.0, "test": 0.0}
    run = make(tmp_path / "run", sources=[source], split=none)
    with pytest.raises(UserError, match='no split "test"; there are train'):
        run.split("test")
    with pytest.raises(UserError, match=r"data\.sources: nothing is left for train"):
        make(tmp_path / "run", sources=[source], split=none, clean={"min_characters": 1000})


# -------------------------------------------------------------------------------- the tokenizer


def test_the_trained_tokenizer_is_byte_level_deterministic_and_has_the_chat_tokens(prepared):
    tokenizer = tokenizer_of(prepared)
    text = "anything: \x00 \t naïve 日本 🙂\r\n  <|eos|>"
    with tokenizers.special_tokens_as_text(tokenizer) as backend:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert backend.decode(ids) == text
    assert token_bytes(tokenizer_of(prepared))[ids].sum() == len(text.encode())
    names = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    special = [tokenizer.convert_tokens_to_ids(name) for name in names]
    assert special == [0, 1, 2, 3, 4]
    assert token_bytes(tokenizer_of(prepared))[special].tolist() == [0] * 5
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == names[:3]
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert len(tokenizer) == prepared.manifest["vocab_size"] == 300

    def train() -> str:
        texts = (words(i, 50) for i in range(200))
        return tokenizers.train_tokenizer(texts, 400).backend_tokenizer.to_str()

    assert train() == train()


def test_only_the_training_split_trains_the_tokenizer(tmp_path):
    shares = Split(validation=0.0, test=0.5)
    marked = (f"{words(i, 20)} {'q' * 3000}" for i in range(100))
    marked = next(text for text in marked if side(content_digest(text), shares) == "test")
    rows = [{"text": words(i, 20)} for i in range(60)]
    source = {
        "kind": "jsonl",
        "path": str(write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": marked}])),
    }
    for test, learned in ((0.0, True), (0.5, False)):
        run = make(tmp_path / "run", sources=[source], split={"validation": 0.0, "test": test})
        assert any("qq" in token for token in tokenizer_of(run).get_vocab()) == learned


def test_a_smaller_vocabulary_than_asked_is_recorded(tmp_path):
    source = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", [{"text": "abab"}]))}
    run = make(
        tmp_path / "run",
        sources=[source],
        split={"validation": 0.0, "test": 0.0},
        tokenizer={"train": {"vocab_size": 1000}},
    )
    (row,) = [row for row in run.manifest["ledger"] if row["step"] == "vocabulary"]
    assert row["tokens"] == run.manifest["vocab_size"] < 300
    assert "asked for 1000" in row["reason"]


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    columns = TextProcessor.stored({"vocab_size": 65_537})
    writer = ColumnWriter(tmp_path, columns)
    writer.add({"tokens": np.array([1, 65_536])})
    writer.close()
    assert TokenSplit(tmp_path, columns).document(0)[0].tolist() == [1, 65_536]


@pytest.mark.parametrize("place", [".", "data", "data/tokenizer", "checkpoints/step-000010/model"])
def test_a_tokenizer_is_taken_from_a_run_and_its_folders(prepared, source, tmp_path, place):
    path = prepared.folder.parent / place
    path.mkdir(parents=True, exist_ok=True)
    other = make(tmp_path / "run", sources=[source], split=SPLIT, tokenizer={"from": str(path)})
    for name in ("train", "validation", "test"):
        assert np.array_equal(other.split(name).tokens, prepared.split(name).tokens)


def test_without_data_tokenizer_it_is_the_models(prepared, source, tmp_path):
    tree = recipe(tmp_path / "run", sources=[source], split=SPLIT).dump()
    tree["data"]["tokenizer"] = None
    tree["model"] = {"from": str(prepared.folder.parent)}
    other = prepare(parse_recipe(tree), log=lambda _: None)
    assert np.array_equal(other.split("train").tokens, prepared.split("train").tokens)


def test_a_tokenizer_without_bos_and_pad_uses_eos(prepared, source, tmp_path):
    tokenizer = tokenizer_of(prepared)
    tokenizer.bos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    run = make(
        tmp_path / "run", sources=[source], split=SPLIT, tokenizer={"from": str(tmp_path / "bare")}
    )
    assert run.manifest["bos_id"] == run.manifest["pad_id"] == run.manifest["eos_id"] == 1
    assert run.split("train").document(0)[0][[0, -1]].tolist() == [1, 1]


def test_unusable_tokenizers_are_named(source, tmp_path):
    for path, message in (
        (tmp_path / "none", r"data\.tokenizer\.from: no folder .*none"),
        (tmp_path, r"data\.tokenizer\.from: no tokenizer\.json in"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "run", sources=[source], tokenizer={"from": str(path)})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.tokenizer\.from: cannot load a tokenizer"):
        make(tmp_path / "run", sources=[source], tokenizer={"from": str(tmp_path)})


# ------------------------------------------------------------------------------------- reuse


def test_data_is_reused_until_recipe_sources_or_files_change(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": words(i, 20)} for i in range(40)])
    source = {"kind": "jsonl", "path": str(path)}

    def run(**data) -> tuple[PreparedData, list[str]]:
        said: list[str] = []
        settings = {"sources": [source], "split": SPLIT, **data}
        return prepare(recipe(tmp_path / "run", **settings), log=said.append), said

    first, said = run()
    assert said
    again, said = run()
    assert said == []
    assert again.manifest == first.manifest
    assert again.fingerprint == first.fingerprint

    tokens = again.folder / "train" / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[5] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(UserError, match=r"train/tokens\.bin: damaged: sha256"):
        again.verify()
    repaired, said = run()
    assert "damaged" in said[0]
    assert repaired.fingerprint == first.fingerprint

    write_jsonl(path, [{"text": words(i, 20)} for i in range(50)])
    changed, said = run()
    assert "sources have changed" in said[0]
    assert changed.fingerprint != first.fingerprint

    _, said = run(sequence_length=32)
    assert "recipe has changed" in said[0]

    path.unlink()
    kept, said = run(sequence_length=32)
    assert "going on with what was prepared" in said[0]
    assert len(kept.split("train")) == len(changed.split("train"))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".gradsmith", "data", "lock", "recipe.yaml",
    ]  # fmt: skip


def test_a_failure_leaves_what_was_there(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": words(i, 20)} for i in range(40)])
    source = {"kind": "jsonl", "path": str(path)}
    first = make(tmp_path / "run", sources=[source], split=SPLIT)
    with path.open("a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:41: not readable as JSON"):
        make(tmp_path / "run", sources=[source], split=SPLIT)
    still = PreparedData.open(tmp_path / "run" / "data")
    still.verify()
    assert still.fingerprint == first.fingerprint


def test_opening_what_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match="no prepared data there; run `gradsmith prepare`"):
        PreparedData.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match='format "other"; this version reads "gradsmith-data-1"'):
        PreparedData.open(tmp_path)


def test_two_runs_give_the_same_bytes(prepared, source, tmp_path):
    assert make(tmp_path / "run", sources=[source], split=SPLIT).fingerprint == prepared.fingerprint
