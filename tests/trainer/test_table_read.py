"""Tables from every kind of file, their types, and everything that may be wrong in one."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from table_recipes import held_out, ledger, make, people, recipe, write_csv

from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.data.table_kinds import Reading, infer
from gradsmith.errors import UserError
from gradsmith.recipe import parse_recipe

DROP = {"columns": {"drop": ["spent"]}}


def of_source(output: Path, **source: Any) -> PreparedData:
    tree = recipe(output, Path("x.csv"), **DROP).dump()
    tree["data"]["sources"] = [source]
    return prepare(parse_recipe(tree), log=lambda _: None)


def typed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: None if v == "" else v for k, v in row.items()} for row in rows]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("plain")
    return make(folder / "run", write_csv(folder / "t.csv", people(300)), **DROP)


@pytest.mark.parametrize(
    "name", ["t.csv.gz", "t.csv.bz2", "t.csv.zst", "semicolons.csv", "t.tsv", "bom.csv", "nameless"]
)
def test_every_csv_is_the_same_table(name: str, plain: PreparedData, tmp_path: Path) -> None:
    rows = people(300)
    text = write_csv(tmp_path / "plain.csv", rows).read_bytes()
    path, more = tmp_path / name, {}
    if name == "t.csv.gz":
        path.write_bytes(gzip.compress(text))
    elif name == "t.csv.bz2":
        path.write_bytes(bz2.compress(text))
    elif name == "t.csv.zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(text)
    elif name == "semicolons.csv":
        path.write_bytes(text.replace(b",", b";"))
        more = {"delimiter": ";"}
    elif name == "t.tsv":
        path.write_bytes(text.replace(b",", b"\t"))
    elif name == "bom.csv":
        path.write_bytes(b"\xef\xbb\xbf" + text)
    else:
        path.write_bytes(text.partition(b"\n")[2])
        more = {"columns": list(rows[0])}
    found = of_source(tmp_path / "run", kind="csv", path=str(path), **more)
    assert_same(found, plain)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "arrow stream"])
def test_typed_sources_are_the_same_table(kind: str, plain: PreparedData, tmp_path: Path) -> None:
    rows = typed(people(300))
    path = tmp_path / "t.data"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table.append_column("day", pa.array([1] * 300)), path)
        table = None
    else:
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    found = of_source(tmp_path / "run", kind=kind.partition(" ")[0], path=str(path))
    if kind != "parquet":  # another column is another content
        assert_same(found, plain)
    assert sum(split["documents"] for split in found.manifest["splits"].values()) == 300


def assert_same(found: PreparedData, plain: PreparedData) -> None:
    for name in ("train", "validation", "test"):
        assert found.manifest["splits"][name]["documents"] > 20
        for column in ("numbers", "categories", "target"):
            ours, theirs = (getattr(data.split(name), column) for data in (found, plain))
            assert np.array_equal(ours, theirs), column


def test_several_files_are_one_table(plain: PreparedData, tmp_path: Path) -> None:
    rows = people(300)
    for number, start in enumerate(range(0, 300, 100)):
        write_csv(tmp_path / f"part-{number}.csv", rows[start : start + 100])
    assert_same(of_source(tmp_path / "run", kind="csv", path=str(tmp_path / "part-*.csv")), plain)
    other = [{k: v for k, v in row.items() if k != "income"} for row in people(10, 7)]
    write_csv(tmp_path / "part-9.csv", other)
    with pytest.raises(UserError, match=r'sources.0: .*part-9.csv has no column "income"'):
        of_source(tmp_path / "run", kind="csv", path=str(tmp_path / "part-*.csv"))


def test_quoted_values_may_hold_anything(tmp_path: Path) -> None:
    rows = [{"a": f'say "{n}", then\nleave', "b": n, "y": ["no", "yes"][n % 2]} for n in range(120)]
    data = make(tmp_path / "run", write_csv(tmp_path / "t.csv", rows), "y")
    for row in held_out(data)["test"]:
        assert row == {key: str(value) for key, value in rows[int(row["b"])].items()}
    for line in data.held_out("test"):
        assert line["source"] == f"{tmp_path / 't.csv'}:row {int(line['fields']['b']) + 1}"


GOOD = "a,b,y\n" + "".join(f"{n},{n * n % 7},{n % 2}\n" for n in range(80))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "1,2\n", r"t.csv:row 81: 2 values in this row; allowed are as many as .* 3\. dat"),
        (GOOD.replace("\n9,", "\n9,9,"), r"t.csv:row 10: 4 values"),
        (GOOD + '5,"6,1\n7,8,0\n', r"t.csv:82: not readable as CSV: unexpected end of data"),
        (GOOD.replace("a,b", "a,a"), r't.csv:1: the column "a" is there twice'),
        (GOOD.replace("a,b", "a, "), r"t.csv:1: a column's name is empty: a, ,"),
        (GOOD + "1,\xff,2\n", r"not UTF-8 text: invalid start byte at byte \d+ \(0xff\)"),
        ("", r"t.csv:1: no line of columns' names: the file is empty"),
        ("a,b,y\n", r"data.sources: there is no row"),
        (GOOD.replace("a,b,y", "a,b,z"), r'data.target: .* no column "y"; it has a, b, z'),
        ("y\n1\n0\n", r"no column is left to learn from; it has y"),
        ("a,y\n" + "".join(f"{n},1\n" for n in range(50)), r'target: "y" has one class only .*"1"'),
        ("a,y\n" + "".join(f"{n},x{n}\n" for n in range(90)), r'"y" has \d+ classes in \d+ rows'),
        (GOOD.replace("\n7,", "\nseven,"), r't.csv:row 8: "a" is a column of numbers; found "sev'),
        (GOOD.replace("\n7,", "\ninf,"), r't.csv:row 8: "a" is a column of numbers; found "inf"'),
        (
            "a,b,y\n" + "".join(f'"{n},{n:03}",{n},{n % 2}\n' for n in range(1, 90)),
            r"column \"a\": numbers with thousands' separators .*: say data.columns.thousands",
        ),
    ],
)
def test_what_is_wrong_in_a_csv_is_said(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=said):
        make(tmp_path / "run", tmp_path / "t.csv", "y", split={"validation": 0, "test": 0})
    assert not (tmp_path / "run" / "data").exists()


def test_broken_rows_are_skipped_and_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    text = GOOD.replace("\n9,", "\n9,9,").replace("\n20,", "\ntwenty,") + "1\n"
    (tmp_path / "t.csv").write_text(text)
    more: dict[str, Any] = {"columns": {"numeric": ["a"]}, "split": {"validation": 0, "test": 0.2}}
    data = make(tmp_path / "run", tmp_path / "t.csv", "y", on_error="skip", **more)
    assert sum(ledger(data, "read", "dropped").values()) == 2
    assert ledger(data, "encode", "dropped") == {"a: no number": 1}
    assert sum(split["documents"] for split in data.manifest["splits"].values()) == 78
    for line in data.held_out("test"):  # those after the broken one count it
        assert line["source"].endswith(f":row {int(line['fields']['a']) + 1}")


def test_a_type_that_breaks_late_names_its_row(tmp_path: Path) -> None:
    rows = [f"{n % 977},{n * 7 % 1013},{n % 2}\n" for n in range(300_000)]
    rows[290_000] = "unknown,1,0\n"
    (tmp_path / "t.csv").write_text("a,b,y\n" + "".join(rows))
    settings: dict[str, Any] = {"split": {"validation": 0, "test": 0.1}}
    with pytest.raises(UserError, match=r't.csv:row 290001: "a" is a column of numbers; found "u'):
        make(tmp_path / "run", tmp_path / "t.csv", "y", **settings)


def test_rows_without_a_target_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        GOOD.replace("\n3,2,1", "\n3,2,").replace("\n4,2,0", "\n4,2,NA")
    )
    data = make(tmp_path / "run", tmp_path / "t.csv", "y", columns={"numeric": ["a"]})
    assert ledger(data, "clean", "dropped") == {"no target": 2}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a": 1, "y": 0}, {"a": [1], "y": 1}], 'column "a": found a list; allowed are text'),
        ([{"a": 1, "y": 0}, {"a": {}, "y": 1}], 'column "a": found an object'),
        ([1], r"t.jsonl:1: each line is a JSON object"),
    ],
)
def test_what_is_wrong_in_json_lines_is_said(rows: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=said):
        of_source(tmp_path / "run", kind="jsonl", path=str(tmp_path / "t.jsonl"))


def test_a_parquet_of_lists_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"a": [[1], [2]], "left": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r'column "a": of type list<.*; allowed are numbers'):
        of_source(tmp_path / "run", kind="parquet", path=str(tmp_path / "t.parquet"))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"t.parquet: not readable as Parquet"):
        of_source(tmp_path / "run", kind="parquet", path=str(tmp_path / "t.parquet"))


# -------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "2.5", "", "-3e4", " 7 "], "number"),
        ([1, 2, None], "number"),
        (["0", "1"], "number"),
        (["True", "false", "NA"], "boolean"),
        (["yes", "no"], "boolean"),
        ([True, None], "boolean"),
        (["2024-02-29", "2024-03-01 10:00:00", "2024-03-01T10:00:00Z"], "date"),
        (["a", "b", "a"], "category"),
        (["1", "2", "b", "a"], "category"),
        (["x", "x"], "constant"),
        (["", None, "NA"], "constant"),
        ([f"user-{n}" for n in range(40)], "id"),
        ([str(n + 7) for n in range(40)], "id"),
        ([str(n * n) for n in range(40)], "number"),
        ([f"number {n} is a text" for n in range(40)], "text"),
    ],
)
def test_types_are_inferred(values: list[Any], kind: str) -> None:
    reader = Reading(["", "NA"])
    assert infer([pa.array(values)], reader, "column").name == kind


def test_dates_are_seconds_since_1970() -> None:
    texts = ["1969-12-31", "2024-02-29", "2024-02-29 01:02:03.5", "2024-02-29T01:00:00+02:00", "x"]
    found, bad = Reading([]).dates(pa.array(texts))
    expected = [
        datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()
        for text in texts[:3]
    ]
    assert found[:4].tolist() == [*expected, expected[1] - 3600]
    assert bad.tolist() == [False] * 4 + [True]
    parts, _ = Reading([]).dates(pa.array(["2024-02-29", None]))
    assert parts[0] == expected[1]
    assert np.isnan(parts[1])


def test_numbers_as_people_write_them() -> None:
    reader = Reading([], thousands=".", decimal=",")
    found, bad = reader.numbers(pa.array(["1.234,5", "-1.234.567", "12,5", "7", "1.2"]))
    assert found[:4].tolist() == [1234.5, -1234567.0, 12.5, 7.0]
    assert bad.tolist() == [False] * 4 + [True]


def test_categories_lose_case_and_blanks_where_asked() -> None:
    cells = pa.array([" Big  Apple", "big apple", "BIG\tAPPLE ", "  ", None])
    assert Reading([], lower=True).categories(cells).to_pylist() == ["big apple"] * 3 + [None] * 2
    assert Reading([], trim=False).categories(cells).to_pylist() == cells.to_pylist()


def test_what_prepare_infers_is_shown_and_stored(tmp_path: Path) -> None:
    told: list[str] = []
    source = write_csv(tmp_path / "t.csv", [{"id": n, **row} for n, row in enumerate(people(200))])
    asked = recipe(tmp_path / "run", source, columns={"drop": ["spent"]}, split={"test": 0.2})
    data = prepare(asked, log=told.append)
    assert "id: id (whole numbers that count the rows)" in told
    assert "since: date (dates)" in told
    settings = json.loads((data.folder / "processor" / "processor.json").read_text())
    kinds = {name: kind["name"] for name, kind in settings["kinds"].items()}
    assert kinds == {"id": "id", "age": "number", "income": "number", "city": "category",
                     "since": "date"}  # fmt: skip
    assert not any(name.startswith("id") for name in data.manifest["numbers"])
