"""`kind: excel`: a workbook gives what the same rows as CSV give, or says what is wrong."""

from __future__ import annotations

import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
import table_recipes
from conftest import with_overrides
from table_recipes import people, write_csv

from gradsmith.data import excel
from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.errors import UserError
from gradsmith.recipe import parse_recipe


def write(path: Path, rows: list[list[Any]], sheet: str = "people") -> Path:
    book = openpyxl.Workbook(write_only=True)
    page = book.create_sheet(sheet)
    for row in rows:
        page.append(row)
    book.create_sheet("empty")
    book.save(path)
    return path


def made(output: Path, path: Path, **source: Any) -> PreparedData:
    tree = table_recipes.recipe(output, path, "spent").dump()
    sources = [{"kind": "excel", "path": str(path), **source}]
    recipe = parse_recipe(with_overrides(tree, {"data.sources": sources}))
    return prepare(recipe, log=lambda _: None)


def rows_of(found: list[dict[str, Any]]) -> list[list[Any]]:
    cells = [
        [datetime.fromisoformat(v) if k == "since" else None if v == "" else v
         for k, v in row.items()]
        for row in found
    ]  # fmt: skip
    return [list(found[0]), *cells]


def test_a_workbook_gives_what_csv_gives(tmp_path: Path) -> None:
    rows = people(300)
    path = write(tmp_path / "people.xlsx", rows_of(rows))
    data = made(tmp_path / "excel", path, sheet="people")
    text = table_recipes.recipe(tmp_path / "csv", write_csv(tmp_path / "p.csv", rows), "spent")
    other = prepare(text, log=lambda _: None)
    for split in ("train", "test"):
        for column in ("numbers", "categories", "target"):
            found = [np.asarray(getattr(d.split(split), column)) for d in (data, other)]
            np.testing.assert_array_equal(*found)


def test_empty_rows_and_columns_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xlsx", [[], ["a", "b", None], [1, None], [], [None, "x"]])
    (found,) = excel.batches(path, None, "data.sources.0")
    assert found == (["a", "b"], [(1, None), (None, "x")])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["a", "b"], [1, 2, 3]], r"a.xlsx:row 2: a value stands beyond the last column"),
        ([["a", "a"], [1, 2]], r'a.xlsx:row 1: the column "a" is there twice'),
        ([["a", None, "b"], [1, 2, 3]], r"a.xlsx:row 1: a column's name is empty"),
        ([["a"], [1], ["#DIV/0!"]], r"a.xlsx:row 3: a formula's value is #DIV/0!"),
    ],
)
def test_sheets_that_cannot_be(tmp_path: Path, rows: list[list[Any]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(tmp_path / "run", write(tmp_path / "a.xlsx", rows))


def test_files_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.xlsx", [["a"], [1]])
    with pytest.raises(UserError, match=r'has no sheet "peopl"; allowed are people, empty'):
        made(tmp_path / "run", path, sheet="peopl")
    (tmp_path / "text.xlsx").write_text("a,b")
    with pytest.raises(UserError, match=r"text.xlsx: not readable as an Excel workbook"):
        made(tmp_path / "run", tmp_path / "text.xlsx")
    with zipfile.ZipFile(tmp_path / "bomb.xlsx", "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("xl/worksheets/sheet1.xml", b"0" * (1 << 22))
    monkeypatch.setattr(excel, "LARGEST", 1 << 20)
    with pytest.raises(UserError, match=r"bomb.xlsx: unpacked, this workbook has 4\.\d+ MB; allow"):
        made(tmp_path / "run", tmp_path / "bomb.xlsx")
