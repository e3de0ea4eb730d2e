"""A table's features: against scikit-learn, and learned of the training split alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import decomposition, feature_selection, impute, preprocessing
from table_recipes import held_out, ledger, make, people, recipe, write_csv

from gradsmith.data.example import Example, Ledger
from gradsmith.data.prepared import PreparedData
from gradsmith.data.processor import Dropped
from gradsmith.data.table_steps import Scaler, bounds
from gradsmith.errors import UserError
from gradsmith.recipe.table import Outliers

PLAIN = {"drop": ["left", "city", "since"]}  # age with gaps, and income, to learn spent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table") / "people.csv", people(500))


def raw(data: PreparedData, source: Path, *names: str) -> dict[str, np.ndarray]:
    """Columns of the training split as numbers, in the order of the file."""
    import csv

    with source.open() as file:
        rows = list(csv.DictReader(file))
    held = [row for some in held_out(data).values() for row in some]
    keys = {tuple(row.values()) for row in held}
    kept = [row for row in rows if not {tuple(row[n] for n in held[0])} & keys]
    return {n: np.array([float(row[n] or "nan") for row in kept]) for n in names}


def numbers(data: PreparedData, split: str = "train") -> dict[str, np.ndarray]:
    stored = np.asarray(data.split(split).numbers)
    return dict(zip(data.manifest["numbers"], stored.T, strict=True))


@pytest.mark.parametrize(
    ("how", "theirs"),
    [
        ("zscore", preprocessing.StandardScaler()),
        ("minmax", preprocessing.MinMaxScaler()),
        ("robust", preprocessing.RobustScaler()),
        (
            "quantile",
            preprocessing.QuantileTransformer(
                n_quantiles=1000, output_distribution="normal", subsample=None
            ),
        ),
    ],
)
def test_scales_are_scikit_learns(how: str, theirs: Any) -> None:
    draw = np.random.default_rng(0)
    values = np.round(np.exp(draw.normal(size=3000)), 2)  # with ties
    new = np.concatenate([values[:500], [-9.0, 1e6, 0.015]])
    expected = theirs.fit(values[:, None]).transform(new[:, None])[:, 0]
    found = Scaler.fit(values, how)
    stored = Scaler(**json.loads(json.dumps(vars(found))))
    assert stored.apply(new) == pytest.approx(expected, abs=1e-6)


def test_a_constant_is_not_divided_by_rounding() -> None:
    for how in ("zscore", "minmax", "robust"):
        found = Scaler.fit(np.full(1000, 0.1), how).apply(np.full(5, 0.1))
        assert np.abs(found).max() < 1e-12


@pytest.mark.parametrize("method", ["iqr", "zscore", "mad"])
def test_bounds_are_those_of_their_definitions(method: str) -> None:
    values = np.random.default_rng(0).normal(5, 2, 4000)
    low, high = bounds(values, Outliers(method=method))
    reach = {"iqr": 2.698, "zscore": 3.0, "mad": 3.5}[method]  # of a normal, in deviations
    assert (low, high) == pytest.approx((5 - 2 * reach, 5 + 2 * reach), abs=0.25)


@pytest.mark.parametrize("missing", ["mean", "median", "most_frequent", "constant"])
def test_gaps_are_filled_as_scikit_learn_fills_them(
    missing: str, source: Path, tmp_path: Path
) -> None:
    data = make(tmp_path / "a", source, "spent", columns=PLAIN, clean={"missing": missing},
                features={"scale": "none"})  # fmt: skip
    columns = raw(data, source, "age", "income")
    theirs = impute.SimpleImputer(strategy=missing, fill_value=0.0)
    expected = theirs.fit_transform(np.stack(list(columns.values()), 1))
    assert data.manifest["numbers"] == ["age", "income"]
    for place, found in enumerate(numbers(data).values()):
        assert found == pytest.approx(expected[:, place], rel=1e-6)


def test_auto_says_what_was_missing(source: Path, tmp_path: Path) -> None:
    data = make(tmp_path / "a", source, "spent", columns=PLAIN)
    missing = np.isnan(raw(data, source, "age")["age"])
    assert 20 < missing.sum() < 60
    assert numbers(data)["age is missing"].astype(bool).tolist() == missing.tolist()
    filled = ledger(data, "encode", "changed")
    assert sum(filled.values()) == sum(row["age"] == "" for row in people(500))
    gone = make(tmp_path / "b", source, "spent", columns=PLAIN, clean={"missing": "drop"})
    assert ledger(gone, "encode", "dropped") == {"age: missing": sum(filled.values())}


def test_nearest_is_scikit_learns_knn(source: Path, tmp_path: Path) -> None:
    columns = {"drop": ["left", "since"]}
    data = make(tmp_path / "a", source, "spent", columns=columns, clean={"missing": "knn"},
                features={"encode": "onehot"})  # fmt: skip
    train, test = numbers(data), numbers(data, "test")
    age = raw(data, source, "age")["age"]
    scaled = (age - np.nanmean(age)) / np.nanstd(age)
    others = [values for name, values in train.items() if name != "age"]
    theirs = impute.KNNImputer(n_neighbors=5).fit(np.stack([scaled, *others], 1))
    expected = theirs.transform(np.stack([scaled, *others], 1))[:, 0]
    assert train["age"] == pytest.approx(expected, abs=1e-4)
    held = np.array([float(row["age"] or "nan") for row in held_out(data)["test"]])
    held = (held - np.nanmean(age)) / np.nanstd(age)
    rest = [values for name, values in test.items() if name != "age"]
    expected = theirs.transform(np.stack([held, *rest], 1))[:, 0]
    assert test["age"] == pytest.approx(expected, abs=1e-4)


def test_iterative_finds_what_depends_on_the_others(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 400))
    c = 2 * a - b + 0.05 * draw.normal(size=400)
    gaps = draw.random(400) < 0.2
    rows = [
        {"a": a[i], "b": b[i], "c": "" if gaps[i] else c[i], "y": a[i] + draw.normal()}
        for i in range(400)
    ]
    data = make(tmp_path / "a", write_csv(tmp_path / "t.csv", rows), "y",
                clean={"missing": "iterative"}, features={"scale": "none"})  # fmt: skip
    for name in ("train", "test"):
        found = numbers(data, name)
        assert found["c"] == pytest.approx(2 * found["a"] - found["b"], abs=0.25)


def test_components_are_scikit_learns(source: Path, tmp_path: Path) -> None:
    columns = {"drop": ["left", "since"]}
    asked = {"encode": "onehot", "interactions": [["age", "income"]]}
    plain = make(tmp_path / "a", source, "spent", columns=columns, features=asked)
    found = make(tmp_path / "b", source, "spent", columns=columns, features={**asked, "pca": 3})
    assert found.manifest["numbers"] == ["component 1", "component 2", "component 3"]
    theirs = decomposition.PCA(3).fit(np.asarray(plain.split("train").numbers, np.float64))
    for name in ("train", "test"):
        expected = theirs.transform(np.asarray(plain.split(name).numbers, np.float64))
        ours = np.asarray(found.split(name).numbers)
        signs = np.sign((ours * expected).sum(axis=0))
        assert ours * signs == pytest.approx(expected, abs=1e-5)
    stored = numbers(plain)
    product = stored["age"].astype(np.float64) * stored["income"]
    assert stored["age * income"] == pytest.approx(
        (product - product.mean()) / product.std(), abs=1e-5
    )


def test_the_features_that_say_most_are_kept(source: Path, tmp_path: Path) -> None:
    columns = {"drop": ["left", "since"]}
    whole = make(tmp_path / "a", source, "spent", columns=columns, features={"encode": "onehot"})
    select = {"by": "mutual_information", "keep": 2}
    found = make(tmp_path / "b", source, "spent", columns=columns,
                 features={"encode": "onehot", "select": select})  # fmt: skip
    values, target = np.asarray(whole.split("train").numbers), whole.split("train").target
    discrete = [len(np.unique(column)) <= 2 for column in values.T]
    scores = feature_selection.mutual_info_regression(
        values, target, discrete_features=discrete, random_state=0
    )
    stored = json.loads((found.folder / "processor" / "processor.json").read_text())
    ours = stored["stages"][0]["scores"]
    assert list(ours.values()) == pytest.approx(scores, abs=0.03)
    assert list(ours) == whole.manifest["numbers"]
    best = sorted(ours, key=lambda name: -ours[name])[:2]
    assert set(found.manifest["numbers"]) == set(best)
    assert "age" in found.manifest["numbers"]
    select = {"by": "variance", "above": 0.1}
    kept = make(tmp_path / "c", source, "spent", columns=columns,
                features={"encode": "onehot", "select": select})  # fmt: skip
    names = whole.manifest["numbers"]
    stretched = preprocessing.MinMaxScaler().fit_transform(values)
    expected = feature_selection.VarianceThreshold(0.1).fit(stretched).get_support()
    assert kept.manifest["numbers"] == [n for n, k in zip(names, expected, strict=True) if k]


def test_categories_are_encoded_as_scikit_learn_encodes_them(source: Path, tmp_path: Path) -> None:
    columns = {"drop": ["left", "since", "age"]}  # the income tells rows apart
    names = ("index", "onehot", "ordinal", "frequency", "hash", "target")
    made = {
        encode: make(
            tmp_path / encode,
            source,
            "spent",
            columns=columns,
            features={"encode": encode, "scale": "none"},
        )
        for encode in names
    }
    data = made["index"]
    assert data.manifest["categories"] == {"city": 4}
    codes = np.asarray(data.split("train").categories)[:, 0]
    test_codes = np.asarray(data.split("test").categories)[:, 0]
    known = np.array(["", "Bern", "Oslo", "Rome"])
    assert [row["city"] for row in held_out(data)["test"]] == known[test_codes].tolist()
    found = {name: numbers(data) for name, data in made.items()}
    theirs = preprocessing.OneHotEncoder(sparse_output=False).fit_transform(known[codes][:, None])
    shown = ["city is missing", "city=Bern", "city=Oslo", "city=Rome"]
    assert np.array_equal(np.stack([found["onehot"][name] for name in shown], 1), theirs)
    assert np.array_equal(found["ordinal"]["city order"], codes)
    shares = np.array([0, *(np.mean(codes == code) for code in (1, 2, 3))])
    assert found["frequency"]["city share"] == pytest.approx(shares[codes])
    hashes = np.stack([v for name, v in found["hash"].items() if "#" in name])
    assert (np.abs(hashes).sum(0) == (codes > 0)).all()
    target = np.asarray(data.split("train").target, np.float64)
    encoder = preprocessing.TargetEncoder(smooth=10.0, target_type="continuous")
    encoder.fit(known[codes][:, None], target)
    expected = encoder.transform(known[test_codes][:, None])[:, 0]
    assert numbers(made["target"], "test")["city mean"] == pytest.approx(expected, abs=1e-5)


def test_no_row_reads_its_own_target(tmp_path: Path) -> None:
    """A category of two rows at most says nothing of other rows; encoded without folds it would
    all but give the target away."""
    draw = np.random.default_rng(0)
    rows = [
        {"who": f"w{n // 2}", "x": draw.normal(), "y": float(draw.normal())} for n in range(600)
    ]
    data = make(tmp_path / "a", write_csv(tmp_path / "t.csv", rows), "y",
                features={"encode": "target"})  # fmt: skip
    split = data.split("train")
    assert data.manifest["numbers"][0] == "who mean"
    assert abs(np.corrcoef(split.numbers[:, 0], split.target)[0, 1]) < 0.15


EVERYTHING: list[dict[str, Any]] = [
    {"features": {"scale": "quantile", "encode": "target", "interactions": [["age", "income"]],
                  "select": {"by": "mutual_information", "keep": 6}}},
    {"clean": {"missing": "knn", "outliers": {"method": "mad", "action": "flag"}},
     "features": {"encode": "onehot", "pca": 4}},
    {"clean": {"missing": "iterative", "outliers": {"method": "isolation_forest",
                                                    "action": "drop"}},
     "features": {"scale": "robust", "encode": "frequency"}},
    {"clean": {"missing": "most_frequent", "outliers": {"method": "zscore", "action": "drop"}},
     "features": {"encode": "ordinal", "select": {"by": "variance", "keep": 5}}},
    {"clean": {"outliers": {"method": "iqr", "action": "clip"}}, "columns": {"text": ["city"]},
     "problem": "regression", "features": {"scale": "minmax"}},
]  # fmt: skip


def settings_of(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    target = "spent" if asked.get("problem") else "left"
    other = {"left": "spent", "spent": "left"}[target]
    return target, {**asked, "columns": {**asked.get("columns", {}), "drop": [other]}}


@pytest.mark.parametrize("asked", EVERYTHING)
def test_poisoned_held_out_rows_change_no_fitted_number(
    asked: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """They are put where their time puts them: behind all of the training split."""
    target, asked = settings_of(asked)
    rows = sorted(people(400), key=lambda row: row["since"])
    cut = next(i for i in range(280, 400) if rows[i]["since"] != rows[i - 1]["since"])
    asked |= {"time": "when", "split": {"validation": 60, "test": 400 - 60 - cut}}
    for number, row in enumerate(rows):
        row["when"] = max(0, number - cut + 1)
    poisoned = [dict(row) for row in rows]
    for number, row in enumerate(poisoned[cut:]):
        row |= {"age": 1e30 * (-1) ** number, "income": -1e25, "city": f"nowhere {number}"}
        row |= {"since": f"1{number % 999:03}-01-01", "spent": 1e20 + number}
    plain = make(tmp_path / "a", write_csv(tmp_path / "a.csv", rows), target, **asked)
    other = make(tmp_path / "b", write_csv(tmp_path / "b.csv", poisoned), target, **asked)
    assert plain.manifest["splits"]["train"] == other.manifest["splits"]["train"]
    assert plain.processor_fingerprint == other.processor_fingerprint
    assert plain.fingerprint != other.fingerprint


@pytest.mark.parametrize("asked", EVERYTHING)
def test_what_is_served_is_what_was_stored(
    asked: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """Row by row, from text or from numbers; and a second time to the same bytes."""
    target, asked = settings_of(asked)
    made = recipe(tmp_path / "a", source, target, **asked)
    data = make(tmp_path / "a", source, target, **asked)
    processor = data.processor(made)
    for name in ("validation", "test"):
        split, examples = data.split(name), data.examples(name)
        for number, row in enumerate(processor.encode(examples, Ledger())):
            assert not isinstance(row, Dropped)
            for column, stored in split.row(number).items():
                assert np.array_equal(row[column], stored), (name, number, column)
    (example,) = examples[:1]
    typed = {
        key: float(value) if key in ("age", "income", "spent") and value else value or None
        for key, value in example.fields.items()
    }
    del typed[target]
    (row,) = processor.encode([Example("request", typed)], Ledger())
    assert isinstance(row, dict)
    assert "target" not in row
    first = data.split(name).row(0)
    assert all(np.array_equal(values, first[column]) for column, values in row.items())
    before = data.fingerprint
    shutil.rmtree(tmp_path / "a")
    assert make(tmp_path / "a", source, target, **asked).fingerprint == before


def test_outliers_of_the_training_split_alone_are_dropped(source: Path, tmp_path: Path) -> None:
    clean = {"outliers": {"method": "iqr", "action": "drop"}}
    data = make(tmp_path / "a", source, "spent", columns=PLAIN, clean=clean)
    plain = make(tmp_path / "b", source, "spent", columns=PLAIN)
    lost = ledger(data, "encode", "dropped")
    assert set(lost) == {"age: outlier", "income: outlier"}
    for name in ("train", "validation", "test"):
        few, all_ = (d.manifest["splits"][name]["documents"] for d in (data, plain))
        assert all_ - few == (sum(lost.values()) if name == "train" else 0)


def test_a_request_without_a_column_is_refused(source: Path, tmp_path: Path) -> None:
    data = make(tmp_path / "a", source, columns={"drop": ["spent"]})
    processor = data.processor(recipe(tmp_path / "a", source, columns={"drop": ["spent"]}))
    fields = data.examples("test")[0].fields
    del fields["income"]
    with pytest.raises(UserError, match='request: no column "income"'):
        processor.encode([Example("request", fields)], Ledger())


def test_any_number_of_threads_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        write_csv(tmp_path / f"part-{number}.csv", people(80, seed=number))
    target, asked = settings_of(EVERYTHING[0])
    found = set()
    for cores in (1, 4):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)))
        data = make(tmp_path / f"run-{cores}", tmp_path / "part-*.csv", target, **asked)
        found.add((data.fingerprint, json.dumps(data.manifest["ledger"])))
    assert len(found) == 1
