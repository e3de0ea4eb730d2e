"""Image classifiers: what others get of a run, all ways to fine-tune, families, what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import every_task
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from conftest import with_overrides

from gradsmith.checks import check_recipe
from gradsmith.errors import UserError
from gradsmith.evaluation.evaluate import evaluate
from gradsmith.models.base import open_model
from gradsmith.models.build import load_model, open_task
from gradsmith.models.export import export
from gradsmith.recipe import parse_recipe
from gradsmith.report.build import build_report
from gradsmith.run import Run
from gradsmith.training import loop

ADAPTER = {"rank": 2, "alpha": 4.0}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("images")
    every_task.write_pictures(folder / "pictures", 40)
    found = every_task.recipes(folder, folder)["image_classification"]
    return with_overrides(found, {"training.steps": 2, "training.validate.every": 50})


@pytest.fixture(scope="module")
def base(tree: dict[str, Any]) -> Run:
    loop.train(parse_recipe(tree))
    return Run(tree["output"])


@pytest.fixture(scope="module")
def other_classes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Three of them."""
    folder = tmp_path_factory.mktemp("others") / "pictures"
    every_task.write_pictures(folder, 30)
    draw = np.random.default_rng(1)
    (folder / "third").mkdir()
    for number in range(30):
        pixels = draw.integers(0, 255, (14, 14, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "third" / f"{number}.png")
    return [{"kind": "image_folder", "path": str(folder)}]


def ours(run: Run) -> tuple[Any, Any]:
    with open_model(run.folder, tell=False) as found:
        task = open_task(run.recipe(), found)
        return task, load_model(found, task).float()


@torch.no_grad()
def logits(task: Any, model: Any, files: list[bytes]) -> torch.Tensor:
    from gradsmith.data.pixels import decode

    pixels = task.processor.plain([decode(file) for file in files], seed=0)
    return torch.as_tensor(model(pixel_values=pixels).logits)


def test_transformers_reads_a_run_and_sees_what_it_saw(base: Run, tmp_path: Path) -> None:
    """The model by AutoModelForImageClassification, its pictures by AutoImageProcessor."""
    folder, _ = export(base, tmp_path / "out")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    assert model.config.id2label == {0: "above", 1: "left"}
    task, mine = ours(base)
    # One of the model's own size, which is not resized; others leave an even rest around the
    # square: of an odd one, transformers' two backends do not cut the same pixels.
    draw = np.random.default_rng(3)
    sizes = ((12, 12), (20, 20), (24, 36), (60, 30), (9, 9))
    shown = [PIL.Image.fromarray(draw.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]
    files = []
    for picture in shown:
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(file.getvalue())
    expected = logits(task, mine, files)
    with torch.no_grad():
        found = model(images(shown, return_tensors="pt")["pixel_values"]).logits
    torch.testing.assert_close(found[:1], expected[:1], rtol=1e-4, atol=1e-5)
    # Resizing rounds to bytes at other places: a pixel may be off by one of 255.
    assert (found - expected).norm() / expected.norm() < 0.01


def test_the_report_shows_what_the_model_saw(base: Run) -> None:
    found = evaluate(base)
    kinds = [block["title"] for block in found["blocks"] if block["kind"] == "images"]
    assert kinds[0] == "Training images, as the model sees them"
    assert kinds[-1] == "Where it looks"
    names = [result["name"] for result in found["results"]]
    assert names == ["this model", "majority", "logistic regression"]
    page = build_report([base], base.folder / "report.html").read_text()
    assert page.count("<img ") == sum(
        len(block["images"]) for block in found["blocks"] if block["kind"] == "images"
    )
    assert "of the time waiting for data" in page


@pytest.mark.parametrize("stage", [0, 3])
def test_a_linear_probe_trains_its_head_alone(
    base: Run, tree: dict[str, Any], other_classes: Any, tmp_path: Path, stage: int
) -> None:
    """Over other classes than the base had: its head is new, and what is below stays as it was."""
    more = {"output": str(tmp_path / "probe"), "data.sources": other_classes,
            "data.image": {}, "model": {"from": str(base.folder), "train": "head"},
            "training.zero.stage": stage}  # fmt: skip
    recipe = parse_recipe(with_overrides(tree, more))
    loop.train(recipe)
    _, before = ours(base)
    task, after = ours(Run(recipe.output))
    assert task.labels == ["above", "left", "third"]
    assert task.processor.sight.size == 12  # the base's
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert new["classifier.weight"].shape == (3, 32)
    moved = [name for name, weight in new.items() if not torch.equal(weight, old[name])
             if weight.shape == old[name].shape]  # fmt: skip
    assert not moved
    assert evaluate(Run(recipe.output))["metrics"]["examples"] > 0


def test_an_adapter_beside_its_head(
    base: Run, tree: dict[str, Any], other_classes: Any, tmp_path: Path
) -> None:
    more = {"output": str(tmp_path / "lora"), "data.sources": other_classes,
            "model": {"from": str(base.folder), "adapter": ADAPTER}}  # fmt: skip
    recipe = parse_recipe(with_overrides(tree, more))
    assert 0 < check_recipe(recipe).trainable_parameters < check_recipe(recipe).parameters / 2
    loop.train(recipe)
    run = Run(recipe.output)
    for form in ("adapter", "merged"):
        _, difference = export(run, tmp_path / form, form)  # type: ignore[arg-type]
        assert difference < 1e-5
    merged = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3
    names = [result["name"] for result in evaluate(run)["results"]]
    assert names[:2] == ["this model", "its base"]


FAMILIES = {
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
               "patch_size": 4},
    "convnext": {"patch_size": 2, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "swin": {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
             "window_size": 3},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
               "layer_type": "basic"},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tree: dict[str, Any], tmp_path: Path, family: str) -> None:
    model = {"architecture": family, "config": FAMILIES[family]}
    recipe = parse_recipe(with_overrides(tree, {"output": str(tmp_path / "run"), "model": model}))
    check_recipe(recipe)
    row = loop.train(recipe)
    assert np.isfinite(row["loss"])
    _, difference = export(Run(recipe.output), tmp_path / "out")
    assert difference == 0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.micro_batch", 1, "training.micro_batch: found 1; mixup and cutmix"),
        ("model.config", {"image_size": 16}, "model.config.image_size: found 16, and 12"),
        ("model.train", "head", "model: train: head trains a new head on a frozen model"),
        ("objective.augment.crop", [0.9, 0.5], "crop: found [0.9, 0.5]"),
        ("objective.augment.crop", [0.5], "objective.augment.crop"),
        ("objective.augment.flip", 2, "objective.augment.flip"),
        ("objective.augment.flips", 0.5, "flips: unknown key"),
        ("objective.augment.trivial_augment", True, "randaugment and trivial_augment"),
        ("objective.mixup", -1, "objective.mixup"),
        ("data.image.size", 0, "data.image.size"),
        ("data.image.std", [0, 1, 1], "std: found [0.0, 1.0, 1.0]"),
        ("data.image.mean", [0.5], "data.image.mean"),
        ("data.sources", [{"kind": "digits", "path": "x"}], "path does not go with kind digits"),
        ("data.sources", [{"kind": "text", "path": "x"}], "allowed are image_folder, tar"),
        ("training", {"tokens": 5}, "training.tokens: does not go with"),
    ],
)
def test_recipes_that_cannot_be(tree: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(with_overrides(tree, {key: value}))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.image.size", 3, "the layers do not fit together"),
        ("model.architecture", "llama", "allowed are the image classifiers of transformers"),
        ("model.config.patch_sizes", 4, "model.config.patch_sizes: vit has none"),
        ("training.validate.monitor", "acuracy", 'did you mean "accuracy"'),
        ("data.sources", [{"kind": "image_folder", "path": "nowhere"}], "no file or folder"),
    ],
)
def test_recipes_that_do_not_fit(
    tree: dict[str, Any], tmp_path: Path, key: str, value: Any, said: str
) -> None:
    more = {"output": str(tmp_path / "run"), key: value}
    with pytest.raises(UserError) as caught:
        check_recipe(parse_recipe(with_overrides(tree, more)))
    assert said.lower() in str(caught.value).lower()


def test_a_size_that_the_base_does_not_take_is_said(
    base: Run, tree: dict[str, Any], tmp_path: Path
) -> None:
    more = {"output": str(tmp_path / "run"), "model": {"from": str(base.folder)},
            "data.image.size": 16}  # fmt: skip
    recipe = parse_recipe(with_overrides(tree, more))
    with pytest.raises(UserError, match=r"(?i)image size|fit together"):
        check_recipe(recipe)
    with pytest.raises(UserError, match=r"(?i)image size|fit together"):
        loop.train(recipe)
