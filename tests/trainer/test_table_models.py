"""Models of tables, regression, and what stands beside both: against torch and scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import table_recipes
import torch
from conftest import with_overrides
from sklearn import metrics as oracle
from sklearn.ensemble import HistGradientBoostingRegressor
from table_recipes import people, write_csv

from gradsmith.data.prepare import prepare
from gradsmith.data.processor import Batch
from gradsmith.errors import UserError
from gradsmith.evaluation.evaluate import evaluate
from gradsmith.models import tabular
from gradsmith.models.build import build_model
from gradsmith.models.config import config_of, describe_model
from gradsmith.models.export import export
from gradsmith.recipe import Recipe, parse_recipe
from gradsmith.run import Run
from gradsmith.tasks import make_task
from gradsmith.tasks.baselines import Rows, fit_baselines, permutation_importance
from gradsmith.tasks.metrics import REGRESSION_METRICS
from gradsmith.tasks.regression import Regression
from gradsmith.training import loop
from gradsmith_kernels import accelerate

EDGES = [[-1.0, 0.0, 0.5, 2.0], [0.0, 1.0], [3.0]]
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden_sizes": [8, 6]},
    "resnet": {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2},
    "ft_transformer": {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2
    },
}  # fmt: skip


def model_of(name: str, bins: int = 0, cardinalities: tuple[int, ...] = (3, 5)) -> Any:
    config_class = next(
        cls
        for cls in tabular.AutoModelForTable._model_mapping
        if cls.model_type == tabular.ARCHITECTURES[name]
    )
    config = config_class(**SMALL[name], dropout=0.0, bins=bins)
    config.numbers, config.cardinalities, config.num_labels = 3, list(cardinalities), 2
    config.edges = EDGES if bins else []
    torch.manual_seed(0)
    return tabular.AutoModelForTable.from_config(config, dtype=torch.float32).eval()


def inputs(rows: int = 5, cardinalities: tuple[int, ...] = (3, 5)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(n, (rows,), generator=generator) for n in cardinalities]
    none = torch.zeros(rows, 0, dtype=torch.int64)
    return {
        "numbers": torch.randn(rows, 3, generator=generator),
        "categories": torch.stack(codes, 1) if codes else none,
    }


@pytest.mark.parametrize("bins", [0, 3])
@pytest.mark.parametrize("name", list(SMALL))
def test_a_model_trains_and_is_the_same_after_saving(name: str, bins: int, tmp_path: Path) -> None:
    model, batch = model_of(name, bins), inputs()
    logits = model(**batch).logits
    assert logits.shape == (5, 2)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    model.save_pretrained(tmp_path)
    again = tabular.AutoModelForTable.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, logits)
    accelerate(model)
    torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(SMALL))
def test_rows_do_not_see_one_another_and_categories_may_be_none(name: str) -> None:
    model, batch = model_of(name, 0, ()), inputs(4, ())
    whole = model(**batch).logits
    for row in range(4):
        alone = model(**{key: value[row : row + 1] for key, value in batch.items()}).logits
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-6)


def test_an_mlp_is_what_torch_makes_of_its_layers() -> None:
    model, batch = model_of("mlp"), inputs()
    table = model.features.categories.weight
    codes = batch["categories"]
    parts = [batch["numbers"], table[codes[:, 0]], table[3 + codes[:, 1]]]
    first, second = (layer.linear for layer in model.layers)
    plain = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), model.head)
    torch.testing.assert_close(model(**batch).logits, plain(torch.cat(parts, 1)))


def test_attention_is_that_of_torch() -> None:
    layer = model_of("ft_transformer").layers[0].attention
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        for name in ("weight", "bias"):
            joined = torch.cat([getattr(part, name) for part in (layer.q, layer.k, layer.v)])
            getattr(theirs, f"in_proj_{name}").copy_(joined)
            getattr(theirs.out_proj, name).copy_(getattr(layer.out, name))
    x = torch.randn(3, 6, 8)
    torch.testing.assert_close(layer(x), theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_numbers_are_placed_in_their_bins() -> None:
    """Whole bins up to the value, a share of its own, none beyond: as the paper's figure has it."""
    embedding = model_of("mlp", 3).features.numbers
    with torch.no_grad():
        embedding.weight.copy_(torch.randn_like(embedding.weight))
        embedding.bias.fill_(100.0)  # so that relu changes nothing
    numbers = torch.tensor([[0.25, 0.5, 9.0], [-3.0, 4.0, 0.0], [2.6, -1.0, 1.0]])
    shares = torch.tensor(
        [
            [[1.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[-2.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[1.0, 1.0, 1.4], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        ]
    )
    expected = torch.stack([shares[:, n] @ embedding.weight[n] for n in range(3)], 1) + 100
    torch.testing.assert_close(embedding(numbers), expected)


def test_our_kernels_go_under_an_ft_transformer() -> None:
    placed = accelerate(model_of("ft_transformer")).replaced
    assert {op for op, _ in placed.values()} >= {"attention", "layer_norm"}


# ------------------------------------------------------------------------------------ regression


class Target:
    """What a regression asks of its processor."""

    target_mean, target_scale = 50.0, 7.0


def regression(**objective: Any) -> Regression:
    tree = {
        "name": "t", "output": "runs/t", "objective": objective, "model": {"architecture": "mlp"},
        "data": {"task": "table", "sources": [{"kind": "csv", "path": "t.csv"}], "target": "y"},
        "training": {"steps": 1},
    }  # fmt: skip
    return Regression(parse_recipe(tree), Target())  # type: ignore[arg-type]


def drawn(rows: int, columns: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(rows, generator=generator)
    return target[:, None] + torch.randn(rows, columns, generator=generator), target


def test_losses_are_those_of_scikit_learn() -> None:
    outputs, target = drawn(50)
    f, z = outputs[:, 0].numpy(), target.numpy()

    def mean(outputs: torch.Tensor, **objective: Any) -> float:
        return float(regression(**objective).terms(outputs, target).mean())

    assert mean(outputs) == pytest.approx(oracle.mean_squared_error(z, f), rel=1e-6)
    absolute = mean(outputs, loss="absolute")
    assert absolute == pytest.approx(oracle.mean_absolute_error(z, f), rel=1e-6)
    away = np.abs(f - z)
    huber = np.where(away <= 0.7, away**2 / 2, 0.7 * (away - 0.35)).mean()
    assert mean(outputs, loss="huber", delta=0.7) == pytest.approx(huber, rel=1e-6)
    outputs, _ = drawn(50, 2)
    pinball = [
        oracle.mean_pinball_loss(z, outputs[:, i].numpy(), alpha=q)
        for i, q in enumerate((0.2, 0.9))
    ]
    found = mean(outputs, loss="quantile", quantiles=[0.2, 0.9])
    assert found == pytest.approx(np.mean(pinball), rel=1e-6)


def test_metrics_are_in_the_targets_unit_and_as_scikit_learn_has_them() -> None:
    task = regression(loss="quantile", quantiles=[0.25, 0.5])
    outputs, target = drawn(200, 2)
    weight = torch.ones(200)
    weight[150:] = 0  # rows that count for nothing, 3.5 elsewhere changes no metric
    weight[:10] = 3.5
    parts = [slice(0, 70), slice(70, 200)]
    sums = sum(
        task.metric_sums(outputs[p], Batch({}, {"target": target[p], "weight": weight[p]}))
        for p in parts
    )
    values = task.summarize(sums)  # type: ignore[arg-type]
    y, f = 50 + 7 * target[:150].double().numpy(), 50 + 7 * outputs[:150].double().numpy()
    assert values["rmse"] == pytest.approx(oracle.root_mean_squared_error(y, f[:, 1]), rel=1e-6)
    assert values["mae"] == pytest.approx(oracle.mean_absolute_error(y, f[:, 1]), rel=1e-6)
    assert values["r2"] == pytest.approx(oracle.r2_score(y, f[:, 1]), rel=1e-6)
    assert values["coverage_25"] == pytest.approx((y <= f[:, 0]).mean())
    loss = np.mean(
        [oracle.mean_pinball_loss(y, f[:, i], alpha=q) for i, q in ((0, 0.25), (1, 0.5))]
    )
    assert values["loss"] == pytest.approx(loss / 7, rel=1e-5)
    assert values["examples"] == 150
    answer = task.decode(outputs[:1])[0]
    assert answer["prediction"] == answer["quantile_50"] == pytest.approx(f[0, 1])


def test_residuals_by_prediction_are_those_of_numpy() -> None:
    task = regression()
    outputs, target = drawn(500)
    labels = {"target": target, "weight": torch.ones(500)}
    bins = task.sums.by_prediction(task.metric_sums(outputs, Batch({}, labels))[1:])
    y, f = 50 + 7 * target.numpy(), 50 + 7 * outputs[:, 0].numpy()
    width = 6 * 7 / 30
    place = np.clip((f - 50 + 21) // width, 0, 29)
    expected = [
        (f[here].mean(), (f - y)[here].mean(), (f - y)[here].std(), here.sum())
        for here in (place == number for number in range(30))
        if here.any()
    ]
    np.testing.assert_allclose(bins, expected, rtol=1e-3, atol=1e-3)


def test_recipes_that_cannot_be() -> None:
    for objective, words in [
        ({"loss": "squared", "delta": 1.0}, "delta goes with loss: huber; the loss is squared"),
        ({"quantiles": [0.5]}, "quantiles goes with loss: quantile; the loss is None"),
        ({"loss": "quantile", "quantiles": [0.5, 0.1]}, "allowed are rising ones"),
        ({"loss": "quantile", "quantiles": [0.0]}, "objective.quantiles.0"),
    ]:
        with pytest.raises(UserError, match=words):
            regression(**objective)


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table") / "people.csv", people(400))


def recipe_of(source: Path, output: Path, target: str = "spent", **overrides: Any) -> Recipe:
    tree = table_recipes.recipe(output, source, target).dump()
    training = {
        "epochs": 60, "global_batch": 32, "micro_batch": 32, "precision": "fp32",
        "optimizer": {"lr": 3e-3},
    }  # fmt: skip
    model = {"architecture": "mlp", "config": {"hidden_sizes": [32, 32], "bins": 6}}
    return parse_recipe(with_overrides({**tree, "training": training, "model": model}, overrides))


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = recipe_of(source, tmp_path_factory.mktemp("runs") / "run")
    loop.train(recipe)
    return Run(recipe.output)


def test_a_regression_is_learned_and_stands_beside_its_baselines(trained: Run) -> None:
    found = evaluate(trained)
    rmse = {row["name"]: row["values"]["rmse"] for row in found["results"]}
    names = {"this model", "mean", "linear regression", "gradient boosting"}
    assert set(rmse) == names
    assert rmse["this model"] < 0.5 * rmse["mean"]
    assert found["metrics"]["rmse"] == rmse["this model"]
    assert [d["name"] for d in found["definitions"]][:3] == [m.name for m in REGRESSION_METRICS]
    titles = [block["title"] for block in found["blocks"]]
    assert titles[:3] == [
        "Predicted against actual", "Residuals against predictions", "Residuals"
    ]  # fmt: skip
    importance = next(b for b in found["blocks"] if b["title"] == "Permutation importance")
    best, *others = importance["bars"]
    assert best["name"] == "age"
    assert best["low"] > max(bar["high"] for bar in others if bar["name"] != "city")


def test_a_baseline_is_scikit_learns_on_the_same_rows(trained: Run, source: Path) -> None:
    recipe = trained.recipe()
    data = prepare(recipe, log=lambda _: None)
    processor: Any = data.processor(recipe)
    train, test = (Rows.of(processor.dataset(data.split(name))) for name in ("train", "test"))
    fitted = fit_baselines(train, list(processor.categories.values()), classify=False)
    assert fitted is not None
    both = [np.concatenate([rows.numbers, rows.categories], 1) for rows in (train, test)]
    kinds = list(range(train.numbers.shape[1], both[0].shape[1]))
    theirs = HistGradientBoostingRegressor(categorical_features=kinds, random_state=0)
    theirs.fit(both[0], train.target)
    np.testing.assert_array_equal(fitted["gradient boosting"](test)[:, 0], theirs.predict(both[1]))
    some = Rows.of(processor.dataset(data.split("train")), most=50)
    np.testing.assert_array_equal(some.target[[0, -1]], train.target[[0, -1]])
    assert len(some.target) == 50


def test_bins_are_quantiles_of_the_training_split(trained: Run) -> None:
    recipe = trained.recipe()
    data = prepare(recipe, log=lambda _: None)
    numbers = np.asarray(data.split("train").numbers)
    step = sorted(trained.checkpoints.iterdir())[-1]
    edges = json.loads((step / "model" / "config.json").read_text())["edges"]
    for column, ends in zip(numbers.T.astype(np.float64), edges, strict=True):
        assert ends == pytest.approx(np.unique(np.quantile(column, np.linspace(0, 1, 7))))
    assert max(map(len, edges)) == 7


def test_a_shuffled_feature_matters_as_far_as_the_model_reads_it(trained: Run) -> None:
    recipe = trained.recipe()
    data = prepare(recipe, log=lambda _: None)
    processor: Any = data.processor(recipe)
    first = processor.numbers[0]  # age

    def measure(batch: Batch) -> dict[str, float]:  # a model that reads the first number only
        return {"rmse": float((batch.inputs["numbers"][:, 0] - kept).square().mean().sqrt())}

    rows = processor.dataset(data.split("test"))
    kept = rows.batch(range(len(rows))).inputs["numbers"][:, 0]
    names = (processor.numbers, list(processor.categories))
    bars = permutation_importance(measure, rows, names, REGRESSION_METRICS[0])["bars"]
    assert bars[0]["name"] == first
    assert bars[0]["value"] == pytest.approx(2**0.5 * float(kept.std()), rel=0.2)
    assert bars[0]["low"] < bars[0]["value"] < bars[0]["high"]
    assert {bar["value"] for bar in bars[1:]} == {0.0}


def test_a_run_goes_on_from_another_with_the_same_features(
    trained: Run, source: Path, tmp_path: Path
) -> None:
    start = {"architecture": None, "config": None, "from": str(trained.folder)}
    tuned = recipe_of(source, tmp_path / "tuned", **{"training.epochs": 1, "model": start})
    described = sum(p.numel() for p in describe_model(tuned).parameters())
    loop.train(tuned)
    found = evaluate(Run(tuned.output))
    assert [row["name"] for row in found["results"]][:2] == ["this model", "its base"]
    assert export(Run(tuned.output), tmp_path / "out")[1] == 0
    again = tabular.AutoModelForTable.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in again.parameters()) == described
    other = recipe_of(
        source, tmp_path / "other", **{"data.columns.drop": ["income"], "model": start}
    )
    with pytest.raises(UserError, match=r"its model reads 14 numbers .* the data have 13 numbers"):
        loop.train(other)


def test_the_target_decides_what_goes_with_it(source: Path, tmp_path: Path) -> None:
    for target, objective, words in [
        ("left", {"loss": "huber"}, "objective.loss: does not go with the target, left, which is"),
        ("spent", {"label_smoothing": 0.1}, "objective.label_smoothing: .* learned by regression"),
    ]:
        recipe = recipe_of(source, tmp_path / target, target, objective=objective)
        data = prepare(recipe, log=lambda _: None)
        with pytest.raises(UserError, match=words):
            make_task(recipe, data.processor(recipe))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"architecture": "mpl"}, "found mpl; allowed are mlp, resnet, ft_transformer. Did you"),
        ({"architecture": "mlp", "config": {"hidden_size": 3}}, "mlp has none. Did you mean"),
        ({"architecture": "mlp", "config": {"numbers": 3}}, "numbers: mlp has none"),
        ({"architecture": "mlp", "config": {"hidden_sizes": [8, 0]}}, "hidden_sizes: found 0"),
        ({"architecture": "mlp", "config": {"hidden_sizes": 8}}, r"give a list: \[256, 256\]"),
        ({"architecture": "resnet", "config": {"dropout": 1}}, "dropout: found 1; allowed are 0"),
        ({"architecture": "ft_transformer", "config": {"hidden_size": 9}}, "multiples of"),
    ],
)
def test_models_that_cannot_be(
    source: Path, tmp_path: Path, model: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        config_of(recipe_of(source, tmp_path / "run", model=model), {})


def test_a_model_of_16_bits_keeps_its_bins_in_32(source: Path, tmp_path: Path) -> None:
    recipe = recipe_of(source, tmp_path / "run", **{"training.precision": "bf16"})
    data = prepare(recipe, log=lambda _: None)
    processor: Any = data.processor(recipe)
    task = make_task(recipe, processor)
    rows = processor.dataset(data.split("train"))
    task.check_data(data, rows)
    model: Any = build_model(recipe, task)
    batch = rows.batch(range(4)).to(torch.device("cpu"), torch.bfloat16)
    assert task.outputs(model, batch).dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in model.features.numbers._ends)
