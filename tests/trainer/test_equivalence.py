"""The same gradients and losses, however the work is laid out.

Accumulation, ranks, ZeRO stages and packing must not change what is computed. Run as a script
under torchrun, this file writes the gradient of the first step and the losses of each recipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_ranks

from gradsmith import ranks
from gradsmith.data.loader import Loader
from gradsmith.data.packing import Sequences
from gradsmith.data.prepare import prepare
from gradsmith.models.build import build_model
from gradsmith.recipe import Recipe, load_recipe
from gradsmith.run import Run
from gradsmith.tasks import make_task
from gradsmith.training import engine as engines
from gradsmith.training import loop
from gradsmith.training.session import Session, build

Tiny = Callable[..., Recipe]
STEPS = 3

# float32 sums in another order: relative error of a gradient, ‖a - b‖ / ‖b‖
GRADIENT_TOLERANCE = 2e-6
LOSS_TOLERANCE = {"fp32": 2e-6, "bf16": 4e-3}


def first_gradient(session: Session) -> dict[str, torch.Tensor]:
    """The gradient that DeepSpeed is about to step with, whole, before clipping."""
    from deepspeed.utils import safe_get_full_grad

    engine, recipe, found = session.engine, session.recipe, {}
    rank, world = ranks.rank(), ranks.world()
    batches = list(
        session.loader.micro_batches(
            session.step, rank=rank, world=world, micro_batch=recipe.training.micro_batch
        )
    )
    targets = session.loader.items(session.step)
    for number, batch in enumerate(batches):
        nll = session.task.loss(engine, batch)
        engine.backward(nll * (world / targets), scale_wrt_gas=False)
        if number < len(batches) - 1:
            engine.step()
    for name, parameter in engine.module.named_parameters():
        gradient = parameter.grad
        if recipe.training.zero.stage > 0:
            gradient = safe_get_full_grad(parameter)
        found[name] = gradient.detach().float().cpu().clone()
    return found


def main(*recipes: str) -> None:
    from safetensors.torch import save_file

    ranks.init_distributed()
    for path in recipes:
        recipe = load_recipe(path)
        session = build(recipe, Run(recipe.output), fresh=True)
        gradients = first_gradient(session)
        engines.set_learning_rate(session.engine, 0.0)
        session.engine.step()  # an empty step ends the accumulation
        session = build(recipe, Run(recipe.output), fresh=True)
        losses = []
        for _ in range(STEPS):
            engines.set_learning_rate(session.engine, 1e-3)
            loss, norm, _ = loop.optimizer_step(session)
            losses.append([loss, norm])
            session.step += 1
        if ranks.rank() == 0:
            save_file(gradients, path + ".safetensors")
            Path(path + ".json").write_text(json.dumps(losses))


# ranks, stage, micro_batch, precision: all that one start of as many ranks computes
FP32 = [(1, 0, 2), (1, 1, 4), (1, 2, 2), (1, 3, 4), (2, 0, 4), (2, 1, 2), (2, 2, 4), (2, 3, 2)]
BF16 = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
LAYOUTS = [(*layout, "fp32") for layout in [(1, 0, 8), *FP32]]
LAYOUTS += [(ranks, stage, 2, "bf16") for ranks, stage in BF16]
LAYOUTS += [(1, 1, 8, "bf16"), (1, 1, 2, "bf16")]


@pytest.fixture(scope="module")
def results(
    corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[dict[str, torch.Tensor], list[list[float]]]]:
    """results(ranks, stage, micro_batch, precision): gradient of the first step, and the losses."""
    import shutil

    from conftest import tiny_tree, with_overrides
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("equivalence")
    known: dict[tuple, tuple[dict[str, torch.Tensor], list[list[float]]]] = {}

    def start(ranks: int) -> None:
        recipes = {}
        for layout in LAYOUTS:
            if layout[0] != ranks:
                continue
            name = "-".join(map(str, layout))
            tree = with_overrides(
                tiny_tree(corpus, folder / name),
                {
                    "training.zero.stage": layout[1],
                    "training.micro_batch": layout[2],
                    "training.precision": layout[3],
                },
            )
            shutil.copytree(prepared, folder / name / "data")
            recipes[layout] = str(folder / f"{name}.yaml")
            Path(recipes[layout]).write_text(yaml.safe_dump(tree))
        done = run_ranks([__file__, *recipes.values()], ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        for layout, path in recipes.items():
            losses = json.loads(Path(path + ".json").read_text())
            known[layout] = (load_file(path + ".safetensors"), losses)

    def compute(ranks: int, stage: int, micro: int, precision: str = "fp32") -> object:
        layout = (ranks, stage, micro, precision)
        if layout not in known:
            start(ranks)
        return known[layout]

    return compute


def assert_same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert b[name].norm() > 0, name
        error = ((a[name] - b[name]).norm() / b[name].norm()).item()
        assert error <= GRADIENT_TOLERANCE, f"{name}: {error}"


@pytest.mark.parametrize(("ranks", "stage", "micro"), FP32)
def test_layout_changes_nothing(results: Callable, ranks: int, stage: int, micro: int) -> None:
    gradients, losses = results(ranks, stage, micro)
    expected_gradients, expected_losses = results(1, 0, 8)
    assert_same_gradients(gradients, expected_gradients)
    for found, expected in zip(losses, expected_losses, strict=True):
        assert found == pytest.approx(expected, rel=LOSS_TOLERANCE["fp32"])


@pytest.mark.parametrize(("ranks", "stage"), BF16)
def test_bf16_losses_agree(results: Callable, ranks: int, stage: int) -> None:
    _, losses = results(ranks, stage, 2, "bf16")
    _, expected = results(1, 1, 8, "bf16")
    for (loss, norm), (expected_loss, expected_norm) in zip(losses, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE["bf16"])
        assert norm == pytest.approx(expected_norm, rel=2e-2)


def test_one_rank_steps_with_the_float32_sum(results: Callable) -> None:
    """DeepSpeed rounds what it averages over ranks to 16 bits; of one rank there is no average."""
    gradients, _ = results(1, 1, 2, "bf16")
    for name, gradient in gradients.items():
        assert not torch.equal(gradient, gradient.bfloat16().float()), name


def test_gradient_is_that_of_the_mean_over_all_targets(results: Callable, tiny: Tiny) -> None:
    """Against plain autograd on the whole global batch at once."""
    gradients, _ = results(2, 2, 4)
    recipe = tiny("plain", **{"training.precision": "fp32", "model.kernels": False})
    data = prepare(recipe, log=lambda _: None)
    task = make_task(recipe, data.processor(recipe))
    model = build_model(recipe, task)
    dataset = task.processor.dataset(data.split("train"))
    loader = Loader(dataset, seed=recipe.seed, global_batch=8)
    batch = next(loader.micro_batches(0, rank=0, world=1, micro_batch=8))
    (task.loss(model, batch) / loader.items(0)).backward()
    assert_same_gradients(gradients, {n: p.grad for n, p in model.named_parameters()})


def test_packing_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """Short documents, packed or a row each: the same loss and gradient, so nothing leaks."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(f'{{"q": "what is {i} + {i}?", "a": "it is {2 * i}"}}\n' for i in range(120))
    )
    recipe = tiny(
        "packed",
        **{
            "data.task": "chat",
            "data.sources": [{"kind": "jsonl", "path": str(pairs), "prompt": "q", "response": "a"}],
            "data.sequence_length": 256,
            "training.precision": "fp32",
        },
    )
    data = prepare(recipe, log=lambda _: None)
    task = make_task(recipe, data.processor(recipe))
    model = build_model(recipe, task)
    found = []
    for packing in (True, False):
        sequences = Sequences(data.split("train"), 256, packing, "chat", data.manifest["pad_id"])
        loader = Loader(sequences, seed=0, global_batch=len(sequences))
        model.zero_grad()
        total = 0.0
        for batch in loader.micro_batches(0, rank=0, world=1, micro_batch=1):
            loss = task.loss(model, batch) / loader.items(0)
            loss.backward()
            total += loss.item()
        found.append((total, len(sequences), {n: p.grad for n, p in model.named_parameters()}))
    (packed_loss, packed_rows, packed), (plain_loss, plain_rows, plain) = found
    assert packed_rows < plain_rows / 3
    assert packed_loss == pytest.approx(plain_loss, rel=1e-6)
    assert_same_gradients(packed, plain)


if __name__ == "__main__":
    main(*sys.argv[1:])
    ranks.end_rank(0)
