"""What is read, and what a user is told when it cannot be."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_recipes import jsonl_source, make, pairs, words, write_jsonl

from gradsmith.data.example import Ledger
from gradsmith.data.readers import _blocks
from gradsmith.data.sources import check_sources, fingerprint, read
from gradsmith.errors import UserError
from gradsmith.recipe import TextData as Data


def documents(task: str = "language_modeling", **source) -> list:
    data = Data.model_validate({"task": task, "sources": [source]})
    check_sources(data)
    return list(read(data, Ledger()))


# --------------------------------------------------------------------------------------- kinds


def test_a_folder_a_glob_and_a_list_of_rows(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "deep" / "a.md").write_text("third\r\n")
    (tmp_path / "a.txt").write_text("\ufefffirst", encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    found = documents(kind="text", path=str(tmp_path))
    assert [d.text for d in found] == ["first", "second", "third\r\n"]
    found = documents(kind="text", path=str(tmp_path / "*.txt"))
    assert [d.text for d in found] == ["first", "second"]
    assert len(documents(kind="text", path=str(tmp_path / "**"))) == 3


def test_rows_of_jsonl_parquet_and_datasets_agree(tmp_path):
    rows = pairs(5)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "loose").mkdir()
    write_jsonl(tmp_path / "loose" / "train.jsonl", rows)
    keys = {"prompt": "question", "response": "answer"}
    expected = [
        [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in rows
    ]
    for kind, path in (
        ("jsonl", "rows.jsonl"),
        ("jsonl", "loose"),
        ("parquet", "rows.parquet"),
        ("hf_dataset", "saved"),
        ("hf_dataset", "loose"),
    ):
        found = documents("chat", kind=kind, path=str(tmp_path / path), **keys)
        assert [d.messages for d in found] == expected, (kind, path)
        found = documents(kind=kind, path=str(tmp_path / path), text="answer", limit=2)
        assert [d.text for d in found] == [row["answer"] for row in rows[:2]], (kind, path)


def test_one_file_is_cut_into_blocks_that_make_it_up_again(tmp_path):
    text = "\n\n".join(words(i, 40) for i in range(300)) + "\n"
    blocks = list(_blocks(iter(text.splitlines(keepends=True))))
    assert "".join(blocks) == text
    assert all(len(block) >= 1024 for block in blocks[:-1])
    assert len(blocks) > 20
    # an insertion changes the blocks around it only
    changed = "A new beginning.\n\n" + text
    others = set(_blocks(iter(changed.splitlines(keepends=True))))
    assert len(set(blocks) - others) <= 2


def test_a_text_without_blank_lines_is_cut_too():
    lines = [words(i, 10) + "\n" for i in range(2000)]
    blocks = list(_blocks(iter(lines)))
    assert "".join(blocks) == "".join(lines)
    assert 4096 <= max(map(len, blocks)) <= 17 * 1024
    assert len(blocks) > 10


def test_a_fingerprint_follows_content_and_names(tmp_path):
    def now() -> str:
        source = Data.model_validate({"sources": [{"kind": "text", "path": str(tmp_path)}]})
        return fingerprint(source.sources[0], "data.sources.0")["sha256"]

    (tmp_path / "a.txt").write_text("one")
    first = now()
    assert now() == first
    (tmp_path / "a.txt").write_text("two")
    second = now()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, now()}) == 3


# --------------------------------------------------------------------------------- bad input


BAD_FILES = [
    ("text", "a.txt", b"fine\nbad \xff here", {}, r"a\.txt: not UTF-8.* at byte 9 \(0xff\)"),
    ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": }\n', {}, r"a\.jsonl:2: not readable as JSON"),
    ("jsonl", "a.jsonl", b'{"text": "x"}\n[1]\n', {}, r"a\.jsonl:2: .* found a list"),
    ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": 3}\n', {}, r':2: "text" must be text; found a'),
    ("jsonl", "a.jsonl", b'{"text": null}\n', {}, r':1: "text" must be text; found null'),
    (
        "jsonl", "a.jsonl", b'{"texts": "x", "id": 1}\n', {},
        r':1: no key "text"; found texts, id\. Did you mean "texts"\?',
    ),
    ("jsonl", "a.jsonl", b'{"text": "\\ud83d"}\n', {}, r":1: .*half of a surrogate pair"),
    ("jsonl", "a.jsonl", b'{"text": "\xe9"}\n', {}, r"a\.jsonl: not UTF-8.* at byte 10"),
    ("jsonl", "a.jsonl", b"[" * 100_000, {}, r":1: not readable as JSON"),
    ("jsonl", "a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", {}, r":1: not readable as JSON"),
    ("parquet", "a.parquet", b"PAR1 no", {}, r"a\.parquet: not readable as Parquet"),
    (
        "jsonl", "a.jsonl", b'{"messages": [{"role": "user"}]}', {"messages": "messages"},
        r':1: messages\[0\]: no key "content"; found role',
    ),
    ("jsonl", "a.jsonl", b'{"messages": []}', {"messages": "messages"}, r":1: .*an empty list"),
    ("jsonl", "a.jsonl", b'{"messages": "hi"}', {"messages": "messages"}, r":1: .*found text"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "content", "keys", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_the_place(tmp_path, kind, name, content, keys, message):
    (tmp_path / name).write_bytes(content)
    task = "chat" if keys else "language_modeling"
    with pytest.raises(UserError, match=message):
        documents(task, kind=kind, path=str(tmp_path / name), **keys)


def test_a_missing_parquet_column_names_those_found(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'a\.parquet: no key "text"; found body, id'):
        documents(kind="parquet", path=str(tmp_path / "a.parquet"))


def test_a_missing_dataset_and_split_are_named(tmp_path):
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "x"}])})
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match='has no split "dev"; allowed are train'):
        documents(kind="hf_dataset", path=str(tmp_path / "saved"), split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.sources\.0\.path: cannot load the dataset"):
        documents(kind="hf_dataset", path=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.txt", "no file or folder .*none.txt"),
        ("*.nothing", r"no files match .*\*\.nothing"),
        ("", "no files in the folder"),
    ],
)
def test_nothing_found_names_the_pattern(tmp_path, path, message):
    with pytest.raises(UserError, match=r"data\.sources\.0\.path: " + message):
        documents(kind="text", path=f"{tmp_path}/{path}")


def test_linked_folders_are_left_out_and_named(tmp_path):
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "inside" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "loop").symlink_to(tmp_path / "inside")
    (tmp_path / "inside" / "b.txt").symlink_to(tmp_path / "outside" / "a.txt")
    for path in ("inside", "inside/**", "inside/**/*.txt"):
        told: list[str] = []
        source = {"kind": "text", "path": f"{tmp_path}/{path}"}
        data = Data.model_validate({"sources": [source]})
        check_sources(data, log=told.append)
        assert [d.text for d in read(data, Ledger())] == ["inside", "outside"]  # a linked file is
        assert told == [
            "data.sources.0.path: left out, since links to folders are not followed: "
            f"{tmp_path}/inside/loop, {tmp_path}/inside/out"
        ]
    # what was named is followed
    assert [d.text for d in documents(kind="text", path=f"{tmp_path}/inside/out")] == ["outside"]
    assert [d.text for d in documents(kind="text", path=f"{tmp_path}/*/out/*")] == ["outside"]


def test_a_folder_that_cannot_be_read_is_refused(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # nobody may not enter pytest's
        root = Path(folder)
        root.chmod(0o755)
        (root / "a.txt").write_text("first")
        (root / "sub").mkdir()
        (root / "sub" / "b.txt").write_text("second")
        (root / "sub").chmod(0)
        nobody = 65534 if os.geteuid() == 0 else os.geteuid()
        before = os.geteuid()
        for path in ("", "/**", "/*/*.txt"):
            os.seteuid(nobody)  # nothing is closed to root
            try:
                with pytest.raises(UserError, match=rf"^{folder}/sub: cannot be read: Permission"):
                    documents(kind="text", path=folder + path)
            finally:
                os.seteuid(before)
        (root / "sub").chmod(0o755)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("data_files: /ROOT/secret.txt", "names a file that is not its own: /.*secret.txt"),
        ("data_files: /etc/passwd", "cannot load the dataset .*'/etc/passwd'"),
        ("data_files: ../secret.txt", "names a file that is not its own: .*secret.txt"),
        ("data_files: link.txt", "names a file that is not its own: .*link.txt"),
        ("data_files: 'https://127.0.0.1:9/a.txt'", "cannot load the dataset|not its own"),
        ("data_files: a.tar", "is read as webdataset; allowed are text, csv, json, parquet"),
        ("data_files: a.wav", "is read as audiofolder; allowed are"),
    ],
)
def test_a_dataset_reads_its_own_files_only(tmp_path, card, said):
    (tmp_path / "secret.txt").write_text("secret")
    folder, card = tmp_path / "set", card.replace("/ROOT", str(tmp_path))
    folder.mkdir()
    for name in ("a.tar", "a.wav", "a.txt"):
        (folder / name).write_text("own")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    config = f"---\nconfigs:\n- config_name: default\n  {card}\n---\n"
    (folder / "README.md").write_text(config)
    with pytest.raises(UserError, match=said):
        documents(kind="hf_dataset", path=str(folder))
    (folder / "README.md").write_text(config.replace(card, "data_files: a.txt"))
    assert [d.text for d in documents(kind="hf_dataset", path=str(folder))] == ["own"]


def test_a_saved_dataset_reads_its_own_files_only(tmp_path):
    for name in ("set", "secret"):
        datasets.Dataset.from_list([{"text": name}]).save_to_disk(str(tmp_path / name))
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../secret/data-00000-of-00001.arrow"}]
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="names a file that is not its own"):
        documents(kind="hf_dataset", path=str(tmp_path / "set"))


@pytest.mark.parametrize("reader", ["text", "csv", "json", "parquet", "imagefolder"])
def test_the_name_of_a_reader_is_no_dataset(tmp_path, reader, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("secret.txt").write_text("secret")
    with pytest.raises(UserError, match=r"data\.sources\.0\.path: "):
        documents(kind="hf_dataset", path=reader)


def test_sources_that_do_not_go_with_the_task(tmp_path):
    with pytest.raises(UserError, match=r"data\.sources\.0\.kind: text has no questions"):
        documents("chat", kind="text", path=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.sources\.0\.prompt: goes with data\.task chat"):
        documents(kind="jsonl", path=str(tmp_path), prompt="a", response="b")


# ------------------------------------------------------------------------------ python_stdlib


DOCUMENTED = '''\
import os

class Thing:
    @property
    def size(self):
        """The number of bytes in it.

            Indented more.
        As before.
        """
        # a comment
        return os.stat(self.path).st_size + 0

    def trivial(self):
        """Do it."""
        return self.size() + self.size() + 1

    def nothing_else(self):
        """A docstring and nothing else but this docstring."""

    def undocumented(self):
        return 1

    async def on_one_line(self): "A docstring right in the line of the def"; return 12345678901
'''


@pytest.fixture
def stdlib(tmp_path, monkeypatch) -> Path:
    """A small standard library."""
    root = tmp_path / "lib"
    for folder in ("", "test", "email/tests", "site-packages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "module.py").write_text(f"place = {folder!r}\n")
    (root / "thing.py").write_text(DOCUMENTED)
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = 'caf\xe9'\r\n")
    (root / "undecodable.py").write_bytes(b"name = 'caf\xe9'\n")
    (root / "broken.py").write_text("def (:\n")
    for module in ("stdlib", "sources"):
        monkeypatch.setattr(f"gradsmith.data.{module}.stdlib", lambda: root)
    return root


def test_stdlib_drops_tests_and_what_does_not_parse(stdlib):
    ledger = Ledger()
    data = Data.model_validate({"sources": [{"kind": "python_stdlib"}]})
    found = {document.source: document.text for document in read(data, ledger)}
    assert set(found) == {f"python_stdlib:{n}.py" for n in ("module", "thing", "latin")}
    assert found["python_stdlib:latin.py"].endswith("name = 'café'\n")
    rows = {(row["what"], row.get("reason", "")): row["documents"] for row in ledger.rows()}
    parse = next(reason for _, reason in rows if reason.startswith("does not parse as Python 3."))
    assert rows == {
        ("in", ""): 7,
        ("kept", ""): 3,
        ("dropped", "test"): 2,
        ("dropped", "does not decode"): 1,
        ("dropped", parse): 1,
    }
    ledger.check()


def test_docstring_pairs_are_the_function_without_it_and_the_docstring(stdlib):
    ledger = Ledger()
    data = Data.model_validate({"task": "chat", "sources": [{"kind": "python_stdlib"}]})
    (pair,) = read(data, ledger)
    assert pair.source == "python_stdlib:thing.py:5"
    prompt, answer = (message["content"] for message in pair.messages)
    assert prompt.endswith(
        "\n\n@property\ndef size(self):\n    # a comment\n    return os.stat(self.path).st_size + 0"
    )
    assert answer == "The number of bytes in it.\n\n    Indented more.\nAs before."
    dropped = [r for r in ledger.rows() if (r["step"], r["what"]) == ("extract", "dropped")]
    assert {row["reason"]: row["documents"] for row in dropped} == {
        "docstring: shorter than 20 characters": 1,
        "function: nothing in it but the docstring": 2,
    }
    ledger.check()


def test_the_real_stdlib_is_there_in_full():
    data = Data.model_validate({"sources": [{"kind": "python_stdlib"}]})
    found = fingerprint(data.sources[0], "data.sources.0")
    assert found["files"] > 400
    assert found["bytes"] > 5_000_000
    ledger = Ledger()
    names = [document.source for document in read(data, ledger)]
    assert {"python_stdlib:argparse.py", "python_stdlib:json/decoder.py"} <= set(names)
    assert not [name for name in names if "/test" in name or "site-packages" in name]
    assert len(names) > 0.98 * found["files"]
    ledger.check()


def test_a_held_out_file_is_held_out_in_both_tasks(tmp_path, stdlib):
    for i in range(120):
        body = f'    """{words(i, 8)}"""\n    {words(500 + i, 6)!r}\n    return {i}\n'
        (stdlib / f"m{i}.py").write_text(f"def f{i}(x):\n{body}\ndef g{i}(x):\n{body}")
    (stdlib / "copy.py").write_text((stdlib / "m5.py").read_text())
    split = {"validation": 0.2, "test": 0.2}
    source = [{"kind": "python_stdlib"}]
    sides: dict[str, dict[str, str]] = {}
    for task in ("language_modeling", "chat"):
        prepared = make(
            tmp_path / task, task=task, sources=source, split=split, sequence_length=512
        )
        sides[task] = {
            row["source"].split(":")[1]: name
            for name in ("validation", "test")
            for row in prepared.held_out(name)
        }
    assert len(sides["chat"]) > 20
    for file, name in sides["chat"].items():
        assert sides["language_modeling"][file] == name
    held_out = set(sides["language_modeling"]) - set(sides["chat"])
    assert all(re.fullmatch(r"module|thing|latin|copy|m5", file[:-3]) for file in held_out)


def test_jsonl_questions_are_never_on_two_sides(tmp_path):
    questions = [f"Question {i}?" for i in range(60)]
    rows = [{"question": q, "answer": words(j, 5)} for q in questions for j in range(3)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    split = {"validation": 0.3, "test": 0.3}
    prepared = make(tmp_path / "run", task="chat", sources=[jsonl_source(path)], split=split)
    asked = [
        {row["messages"][0]["content"] for row in prepared.held_out(name)}
        for name in ("validation", "test")
    ]
    held_out = sum(len(prepared.held_out(name)) for name in ("validation", "test"))
    assert not asked[0] & asked[1]
    assert held_out == 3 * len(asked[0] | asked[1])
