"""gradsmith.profile: its numbers against pandas and scikit-learn, its page and its recipe."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from scipy.stats import contingency
from sklearn.metrics import mutual_info_score, roc_auc_score
from table_recipes import people, write_csv

from gradsmith.__main__ import main
from gradsmith.errors import UserError
from gradsmith.profile import scan
from gradsmith.profile.build import profile, write
from gradsmith.profile.relations import (
    FOLDS,
    auc,
    bins,
    class_score,
    cramers_v,
    mutual_information,
    number_score,
    pearson,
    spearman,
)
from gradsmith.recipe import parse_recipe


def column(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in found["columns"] if c["name"] == name)


def findings(found: dict[str, Any], what: str) -> list[list[str]]:
    return [f["columns"] for f in found["findings"] if f["what"] == what]


def shop(folder: Path, rows: int = 600) -> Path:
    """A table with one of everything that a profile should find."""
    draw = np.random.default_rng(0)
    told = []
    for i in range(rows):
        size = round(draw.normal(50, 10), 3)
        bought = size + draw.normal(0, 10) > 50
        told.append(
            {
                "when": str(np.datetime64("2023-01-01") + i // 2),
                "size": "" if i % 7 == 3 else size,
                "half": "" if i % 7 == 3 else round(size / 2, 4),
                "color": draw.choice(["red", "green", "blue"]),
                "one": "always",
                "rare": "b" if i % 200 == 0 else "a",
                "gone": "x" if i % 10 == 0 else "",
                "bought": "yes" if bought else "no",
                "invoice": "sent" if bought else "none",
                "mixed": "inf" if i % 60 == 0 else round(draw.normal(), 3),
            }
        )
    told += told[:5]
    told[-1] = told[0]
    return write_csv(folder / "shop.csv", told)


# -------------------------------------------------------------------------------------- oracles


def gappy() -> np.ndarray:
    draw = np.random.default_rng(1)
    values = draw.normal(size=(400, 5))
    values[:, 1] = values[:, 0] ** 3 + 1e6
    values[:, 2] = np.round(values[:, 2])  # ties
    values[:, 3] = 7.0
    values[draw.random(values.shape) < 0.15] = np.nan
    values[:, 4] = np.arange(400.0)
    return values


@pytest.mark.parametrize(("ours", "method"), [(pearson, "pearson"), (spearman, "spearman")])
def test_correlations_are_those_of_pandas(ours: Any, method: Any) -> None:
    values = gappy()
    wanted = pandas.DataFrame(values).corr(method).to_numpy()
    np.testing.assert_allclose(ours(values), wanted, atol=1e-9)


def test_information_and_auc_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(2)
    a = draw.integers(0, 5, 500)
    b = np.where(draw.random(500) < 0.5, a, draw.integers(0, 4, 500))
    assert mutual_information(a, b) == pytest.approx(mutual_info_score(a, b))
    assert mutual_information(a, np.zeros(500, int)) == pytest.approx(0.0, abs=1e-12)
    scores, positive = draw.integers(0, 9, 500).astype(float), draw.random(500) < 0.3
    assert auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_cramers_v_is_that_of_the_chi_squared_table() -> None:
    draw = np.random.default_rng(3)
    a = draw.integers(0, 4, 300)
    b = np.where(draw.random(300) < 0.6, a % 3, draw.integers(0, 3, 300))
    table = pandas.crosstab(a, b).to_numpy()
    assert cramers_v(a, b) == pytest.approx(contingency.association(table, "cramer"))
    a[:50] = -1  # missing
    table = pandas.crosstab(a[50:], b[50:]).to_numpy()
    assert cramers_v(a, b) == pytest.approx(contingency.association(table, "cramer"))
    assert np.isnan(cramers_v(a, np.zeros(300, int)))


def test_a_score_is_cross_fitted() -> None:
    """A value of its own in each row says nothing of other rows; a copy says all."""
    draw = np.random.default_rng(4)
    folds, classes = draw.integers(0, FOLDS, 1000), draw.integers(0, 2, 1000)
    assert class_score(np.arange(1000), classes, folds) == pytest.approx(0.5)
    assert class_score(classes.copy(), classes, folds) == 1.0
    several = draw.integers(0, 4, 1000)
    assert class_score(several * 2, several, folds) == 1.0
    assert abs(class_score(draw.integers(0, 3, 1000), several, folds) - 0.5) < 0.06
    target = draw.normal(size=1000)
    assert number_score(np.arange(1000), None, target, folds) < 0.01
    x = target * 3 + 1
    assert number_score(bins(x, 4), x, target, folds) > 0.999
    assert number_score(bins(x**3, 64), x**3, target, folds) > 0.95
    x[:100] = np.nan
    assert 0.5 < number_score(bins(x, 64) + 1, x, target, folds) < 0.95


# --------------------------------------------------------------------------------- what is found


def test_what_stands_in_a_table_is_found(tmp_path: Path) -> None:
    found = profile(str(shop(tmp_path)), target="bought")
    frame = pandas.read_csv(tmp_path / "shop.csv", keep_default_na=False, na_values=[""])
    assert found["rows"] == len(frame) == found["sampled"]
    assert found["duplicates"] == frame.duplicated().sum() == 5
    for name in ("size", "half"):
        c, wanted = column(found, name), frame[name].astype(float)
        assert (c["missing"], c["distinct"]) == (wanted.isna().sum(), wanted.nunique())
        told = [c[key] for key in ("least", "q1", "median", "q3", "most", "mean")]
        of = wanted.quantile([0, 0.25, 0.5, 0.75, 1]).tolist()
        assert told == pytest.approx([*of, wanted.mean()])
        iqr = of[3] - of[1]
        far = (wanted < of[1] - 1.5 * iqr) | (wanted > of[3] + 1.5 * iqr)
        assert c["outliers"] == far.sum()
        assert sum(c["histogram"]["counts"]) + c["histogram"]["beyond"] == wanted.count()
    counts = frame["color"].value_counts()
    assert dict(map(tuple, column(found, "color")["top"])) == counts.to_dict()
    assert column(found, "mixed")["bad"] == np.isinf(frame["mixed"].astype(float)).sum() == 12
    assert findings(found, "leak") == [["invoice"]]
    assert findings(found, "copy") == [["half", "size"]]
    assert findings(found, "constant") == [["one"]]
    assert findings(found, "near-constant") == [["rare"], ["gone"]]
    assert findings(found, "missing") == [["gone"]]
    assert findings(found, "mixed") == [["mixed"]]
    assert set(found["missing_map"]) == {"size", "half", "gone", "mixed"}
    (trend,) = found["trends"]
    assert trend["column"] == "when"
    assert sum(trend["rows"]) == 605
    assert trend["edges"][0] == "2023-01-01"


def test_ids_are_found_and_not_used(tmp_path: Path) -> None:
    rows = [
        {"number": i + 1, "key": f"k{i * 7919 % 1000:03}", "city": row["city"], "left": row["left"]}
        for i, row in enumerate(people(200))
    ]
    found = profile(str(write_csv(tmp_path / "t.csv", rows)), target="left")
    assert findings(found, "id") == [["number"], ["key"]]
    assert yaml.safe_load(found["recipe"])["data"]["columns"]["drop"] == ["number", "key"]


def test_of_a_large_table_a_sample_is_drawn_and_the_rest_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path / "people.csv", people(3000, seed=1))
    whole = profile(str(path), target="left")
    monkeypatch.setattr(scan, "SAMPLE", 500)
    monkeypatch.setattr(scan, "SKETCH", 256)
    part = profile(str(path), target="left")
    assert part == {**profile(str(path), target="left"), "created": part["created"]}
    assert (part["rows"], part["sampled"], whole["sampled"]) == (3000, 500, 3000)
    for one, other in zip(part["columns"], whole["columns"], strict=True):
        exact = ("missing", "bad", "least", "most", "mean", "top")
        assert [one.get(k) for k in exact] == [other.get(k) for k in exact]
        assert one["distinct"] == pytest.approx(other["distinct"], rel=0.25)
        if one["name"] == "age":
            assert one["median"] == pytest.approx(other["median"], rel=0.05)
            assert not one["distinct_exact"]


# ---------------------------------------------------------------------------------- the recipe


def test_the_recipe_says_why_and_prepares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shop(tmp_path)
    text = profile("shop.csv", target="bought")["recipe"]
    tree = yaml.safe_load(text)
    dropped = {"half", "one", "gone", "invoice"}
    assert set(tree["data"]["columns"]["drop"]) == dropped
    lines = [line for line in text.splitlines() if line.strip().startswith("- ")]
    assert all("  # " in line for line in lines[1:])  # the first is the source
    assert tree["data"]["on_error"] == "skip"
    (tmp_path / "shop.yaml").write_text(text)
    assert main(["validate", "shop.yaml"]) == 0
    assert main(["prepare", "shop.yaml"]) == 0, capsys.readouterr().err


def test_a_recipes_own_words_stay(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "people.csv", people(400))
    recipe = tmp_path / "mine.yaml"
    data = {"task": "table", "sources": [{"kind": "csv", "path": str(path)}], "target": "spent",
            "time": "since", "columns": {"drop": ["left"], "categorical": ["income"]}}  # fmt: skip
    recipe.write_text(yaml.safe_dump({
        "name": "mine", "output": str(tmp_path / "run2"), "data": data,
        "model": {"architecture": "mlp"}, "training": {"steps": 1},
    }))  # fmt: skip
    found = profile(str(recipe))
    assert found["target"]["name"] == "spent"
    assert column(found, "income")["why"] == "as the recipe says"
    proposed = parse_recipe(yaml.safe_load(found["recipe"])).data
    assert proposed.time == "since"
    assert "left" in proposed.columns.drop
    assert profile(str(recipe), target="left")["target"]["problem"] == "classification"


@pytest.mark.parametrize("name", ["a: b", "# no", "it's", 'a "b"', "ü\u2028", "- x", "null", "1"])
def test_a_recipe_takes_any_column_name(tmp_path: Path, name: str) -> None:
    rows = [{name: row["age"], "left": row["left"]} for row in people(100)]
    text = profile(str(write_csv(tmp_path / "t.csv", rows)), target="left")["recipe"]
    columns = yaml.safe_load(text)["data"]["columns"]
    assert columns["numeric"] == [name]


def test_thousands_are_found(tmp_path: Path) -> None:
    rows = [{"a": f"{i * 977:,}", "left": row["left"]} for i, row in enumerate(people(100))]
    found = profile(str(write_csv(tmp_path / "t.csv", rows)), target="left")
    assert column(found, "a")["most"] == 99 * 977
    assert yaml.safe_load(found["recipe"])["data"]["columns"]["thousands"] == ","


# ------------------------------------------------------------------------------------- the page


class Balance(HTMLParser):
    """Fails where an element is not closed; keeps the texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not any(name.startswith("on") or name == "src" for name, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_what_was_found(tmp_path: Path) -> None:
    found = profile(str(shop(tmp_path)), target="bought")
    page = write(found, "shop.csv", tmp_path / "new" / "page.html").read_text()
    parser = Balance()
    parser.feed(page)
    text = "".join(parser.texts)
    assert not parser.open
    for told in [f["text"] for f in found["findings"]] + [c["name"] for c in found["columns"]]:
        assert told in text
    assert "nan" not in page.replace("finance", "").lower().split()
    assert found["recipe"].strip() in text


def test_other_files_than_tables_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.tar", "x.png"):
        Path(name).write_bytes(b"1")
        assert main(["profile", name]) == 2
        said = capsys.readouterr().err
        assert f"{name}: no kind that is known; allowed are files, globs and folders of" in said
        assert ".csv" in said
        assert ".tar," not in said


def test_a_table_cannot_write_into_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    rows = [{evil: evil + str(i % 3), "left": row["left"]} for i, row in enumerate(people(60))]
    found = profile(str(write_csv(tmp_path / "t.csv", rows)), target="left")
    page = write(found, "t.csv", tmp_path / "page.html").read_text()
    assert "<script>alert" not in page


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"a,b\n", "there is no row"),
        (b"a,a\n1,2\n", '"a" is there twice'),
        (b"a,\n1,2\n", "name is empty"),
        (b"a,b\n1,\xff\n", "not UTF-8 text: invalid start byte at byte 6"),
        (b'a,b\n1,"2\n', "not readable as CSV"),
    ],
)
def test_what_is_no_table_is_refused(
    tmp_path: Path, content: bytes, told: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_bytes(content)
    assert main(["profile", "t.csv"]) == 2
    assert told in capsys.readouterr().err
    assert not Path("t.profile.html").exists()


@pytest.mark.parametrize(
    "content",
    ["a\n1\n2\n", "a,b\n,\n,\n", "a,b\n1,2\n1,2\n", "a,b\n1,inf\n2,-inf\n",
     "a,b\n1e308,-1e308\n2,3\n", "a,b\n1,2\n3\n4,5\n", "a,b\n2024-01-01,1\n2024-01-01,2\n"],
)  # fmt: skip
@pytest.mark.parametrize("target", [None, "a"])
def test_a_table_of_nearly_nothing_has_a_page(
    tmp_path: Path, content: str, target: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(content)
    asked = ["--target", target] if target else []
    assert main(["profile", "t.csv", *asked]) == 0
    assert capsys.readouterr().out.endswith("t.profile.html\n")
    assert main(["profile", "t.csv", *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] is None


def test_what_is_asked_wrongly_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "t.csv", people(50))
    for arguments, told in (
        ((("gone.csv",)), "no such file"),
        (("t.csv", ["seed=1"]), "overrides go with a recipe"),
        (("t.csv", [], "lef"), 'Did you mean "left"'),
        (("none-*.csv",), "files match"),
    ):
        with pytest.raises(UserError, match=told):
            profile(*arguments)  # type: ignore[arg-type]
    Path("t.txt").write_text("hello")
    with pytest.raises(UserError, match=r"allowed are files, globs and folders of .*csv"):
        profile("t.txt")
    found = profile(".")
    assert found["files"] == 1
    with pytest.raises(UserError, match=r"ends in \.html"):
        write(found, "t.csv", Path("t.csv"))


def test_a_strong_feature_is_suspected_and_only_a_perfect_one_left_out(tmp_path: Path) -> None:
    tree = {
        "name": "iris", "output": str(tmp_path / "run"), "model": {"architecture": "mlp"},
        "data": {"task": "table", "sources": [{"kind": "sklearn", "path": "iris"}],
                 "target": "target"},
        "training": {"steps": 1},
    }  # fmt: skip
    (tmp_path / "iris.yaml").write_text(yaml.safe_dump(tree))
    found = profile(str(tmp_path / "iris.yaml"))
    assert findings(found, "leak") == [["petal length (cm)"], ["petal width (cm)"]]
    columns = yaml.safe_load(found["recipe"])["data"]["columns"]
    assert len(columns["numeric"]) == 4
    assert found["recipe"].count("drop it if it is known only after target") == 2
