"""Which rows of a table are held out: nothing of the training split is among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from table_recipes import held_out, ledger, make, people, recipe, write_csv

from gradsmith.data.prepare import prepare, preview
from gradsmith.errors import UserError
from gradsmith.recipe import parse_recipe


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return people(600)


def sizes(data: Any) -> list[int]:
    return [data.manifest["splits"][name]["documents"] for name in ("train", "validation", "test")]


def test_a_row_keeps_its_side_when_others_come(rows: Any, tmp_path: Path) -> None:
    few = make(tmp_path / "few", write_csv(tmp_path / "few.csv", rows[:300]))
    all_ = make(tmp_path / "all", write_csv(tmp_path / "all.csv", rows[::-1]))
    for name, before in held_out(few).items():
        after = held_out(all_)[name]
        assert all(row in after for row in before)
        assert len(before) > 20


def test_rows_of_equal_features_are_on_one_side_whatever_their_targets(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [
        {"a": int(draw.integers(30)), "b": int(draw.integers(3)), "y": int(draw.integers(2))}
        for _ in range(800)
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    for by in ("random", "stratified"):
        data = make(tmp_path / by, path, "y", split={"by": by}, clean={"duplicates": "keep"})
        found = [
            {(row["a"], row["b"]) for row in held_out(data)[name]}
            for name in ("validation", "test")
        ]
        assert not found[0] & found[1]
        assert sum(sizes(data)) == 800
        numbers = {
            name: {row.tobytes() for row in np.asarray(data.split(name).numbers)}
            for name in ("train", "validation", "test")
        }
        assert not numbers["train"] & (numbers["validation"] | numbers["test"])


def test_duplicates_are_dropped_by_all_columns_or_by_keys(rows: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", rows[:200] + rows[:50])
    assert sum(sizes(make(tmp_path / "a", path))) == 200
    kept = make(tmp_path / "b", path, clean={"duplicates": "keep"})
    assert sum(sizes(kept)) == 250
    keyed = make(tmp_path / "c", path, clean={"keys": ["since", "city"]})
    reason = "the since, city again"
    assert sum(sizes(keyed)) == 250 - ledger(keyed, "deduplicate", "dropped")[reason]
    assert sum(sizes(keyed)) == len({(r["since"], r["city"]) for r in rows[:200]})


def test_counts_are_met_exactly(rows: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", rows)
    data = make(tmp_path / "a", path, split={"validation": 100, "test": 50})
    assert sizes(data) == [450, 100, 50]


def test_stratified_keeps_the_shares_of_the_classes(rows: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", rows)
    share = sum(row["left"] == "yes" for row in rows) / len(rows)
    data = make(tmp_path / "a", path, split={"by": "stratified", "test": 0.2})
    assert sizes(data)[2] == pytest.approx(120, abs=1)
    for found in held_out(data).values():
        assert sum(r["left"] == "yes" for r in found) == pytest.approx(share * len(found), abs=1)


def test_stratified_numbers_are_of_all_tenths(rows: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", rows)
    data = make(tmp_path / "a", path, "spent", split={"by": "stratified"})
    tenths = np.quantile([row["spent"] for row in rows], np.arange(0.1, 1, 0.1))
    found = np.searchsorted(tenths, [float(row["spent"]) for row in held_out(data)["test"]])
    counts = np.bincount(found, minlength=10)
    assert counts.min() >= 8
    assert counts.max() <= 10


def test_groups_stay_together_also_where_equal_rows_link_them(rows: Any, tmp_path: Path) -> None:
    for number, row in enumerate(rows := [dict(row) for row in rows]):
        row["household"] = f"h{number // 3}"
    linked = {**rows[0], "household": "h77"}
    path = write_csv(tmp_path / "t.csv", [*rows, linked])
    data = make(tmp_path / "a", path, group="household")
    assert data.manifest["numbers"].count("household") == 0
    found = {name: {r["household"] for r in some} for name, some in held_out(data).items()}
    assert not found["validation"] & found["test"]
    for name, some in held_out(data).items():
        for household in found[name]:
            of = [row for row in [*rows, linked] if row["household"] == household]
            assert len([row for row in some if row["household"] == household]) == len(of)
        assert ("h0" in found[name]) == ("h77" in found[name])


def test_the_past_trains_and_the_future_tests(rows: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", rows)
    data = make(tmp_path / "a", path, time="since")
    found = held_out(data)
    last = max(row["since"] for row in found["validation"])
    assert last < min(row["since"] for row in found["test"])
    before = sorted(row["since"] for row in rows)[: sizes(data)[0]]
    assert before[-1] < min(row["since"] for row in found["validation"])
    assert sizes(data)[2] == pytest.approx(90, abs=6)


def test_a_row_that_comes_again_later_is_a_leak(rows: Any, tmp_path: Path) -> None:
    rows = sorted(rows, key=lambda row: row["since"])
    again = {**rows[0], "since": "2029-01-01"}
    path = write_csv(tmp_path / "t.csv", [*rows, again])
    with pytest.raises(UserError) as caught:
        make(tmp_path / "a", path, time="since")
    told = str(caught.value)
    assert told.startswith("data.split: 1 held-out rows are equal to rows of another split")
    assert "t.csv:row 601 {" in told
    assert "t.csv:row 1 {" in told
    data = make(tmp_path / "a", path, time="since", split={"on_leak": "drop"})
    reason = "equal to a row of another split, in test"
    assert ledger(data, "encode", "dropped") == {reason: 1}


def test_rows_that_differ_in_an_id_alone_are_a_leak(rows: Any, tmp_path: Path) -> None:
    twice = [{"id": f"u-{n * 7919 % 5000}", **row} for n, row in enumerate([*rows, *rows])]
    path = write_csv(tmp_path / "t.csv", twice)
    with pytest.raises(UserError, match=r"equal to rows of another split.*put id, which no model"):
        make(tmp_path / "a", path)
    data = make(tmp_path / "b", path, columns={"drop": ["id"]})
    assert sum(sizes(data)) == 600


def test_a_time_that_is_none_names_its_row(rows: Any, tmp_path: Path) -> None:
    rows = [dict(row) for row in rows]
    rows[41]["since"] = "yesterday"
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(UserError, match=r'"since" is no number and no date .*t.csv:row 42 {'):
        make(tmp_path / "a", path, time="since")
    data = make(tmp_path / "b", path, time="since", on_error="skip")
    assert ledger(data, "split", "dropped") == {"since: no time": 1}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"split": {"by": "group"}}, "split.by: group needs data.group"),
        ({"split": {"by": "time"}}, "split.by: time needs data.time"),
        ({"group": "a", "split": {"by": "random"}}, "random would part groups"),
        ({"group": "a", "time": "b"}, "say split.by: group or time"),
        ({"group": "left"}, 'group: "left" is the target already'),
        ({"columns": {"drop": ["left"]}}, 'columns.drop: "left" is the target'),
        ({"split": {"test": 1.0}}, "allowed are a share below 1 and a number of rows"),
        ({"split": {"test": True}}, "allowed are a share below 1 and a number of rows"),
        ({"split": {"test": 0.6, "validation": 0.5}}, "validation + test is 1.1"),
        ({"group": "houshold"}, 'data.group: .*no column "houshold"; it has age, income'),
        ({"columns": {"drop": ["agee"]}}, r'data.columns.drop: .* Did you mean "age"\?'),
    ],
)
def test_what_cannot_be_split_is_refused(rows: Any, data: Any, said: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", rows[:50])
    with pytest.raises(UserError, match=said.replace("+ test", r"\+ test")):
        make(tmp_path / "a", path, **data)


def test_a_preview_says_what_would_become_of_each_row_and_keeps_nothing(
    rows: Any, tmp_path: Path
) -> None:
    asked = recipe(tmp_path / "run", write_csv(tmp_path / "t.csv", rows[:200] + rows[:9]))
    told: list[str] = []
    manifest = preview(asked, log=told.append)
    assert not (tmp_path / "run").exists()
    assert "deduplicate dropped 9 (exact duplicate)" in told
    assert "city: category (3 values)" in told
    made = prepare(asked, log=lambda _: None).manifest
    assert made["ledger"] == manifest["ledger"]
    assert made["splits"] == manifest["splits"]
    steps = dict.fromkeys(("read", "clean", "deduplicate", "split", "encode"), 0)
    for row in manifest["ledger"]:
        if row["what"] == "in":
            steps[row["step"]] += row["documents"]
    assert steps == {"read": 209, "clean": 209, "deduplicate": 209, "split": 200, "encode": 200}


def test_a_table_that_ships_is_read(tmp_path: Path) -> None:
    tree = recipe(tmp_path / "run", tmp_path / "x.csv", "target").dump()
    tree["data"]["sources"] = [{"kind": "sklearn", "path": "iris"}]
    data = prepare(parse_recipe(tree), log=lambda _: None)
    assert set(data.manifest["classes"]) == {"setosa", "versicolor", "virginica"}
    assert ledger(data, "deduplicate", "dropped") == {"exact duplicate": 1}
    tree["data"]["sources"] = [{"kind": "sklearn", "path": "irises"}]
    with pytest.raises(UserError, match=r'iris, wine, .* Did you mean "iris"\?'):
        parse_recipe(tree)
