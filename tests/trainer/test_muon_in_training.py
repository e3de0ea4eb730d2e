"""Muon in training: which parameters it steps, and the same losses however ZeRO cuts them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, tiny_tree, train_on_ranks, with_overrides

from gradsmith import ranks
from gradsmith.data.prepare import prepare
from gradsmith.models.build import build_model
from gradsmith.recipe import Recipe, parse_recipe
from gradsmith.run import Run
from gradsmith.tasks import make_task
from gradsmith.training import engine as engines
from gradsmith.training import loop
from gradsmith.training.deepspeed_internals import shards
from gradsmith.training.muon import partitions
from gradsmith.training.optimizers import parameter_groups
from gradsmith.training.session import Session, build

Tiny = Callable[..., Recipe]
# A gradient's last bit may flip a rounding to bfloat16, which the iteration spreads.
LOSS_TOLERANCE = 1e-4


def settings(stage: int, offload: str = "none", **optimizer: Any) -> dict[str, Any]:
    return {
        "training.optimizer": {"name": "muon", "lr": 1e-2, **optimizer},
        "training.precision": "fp32",
        "training.zero": {"stage": stage, "offload": offload},
        "training.schedule.name": "constant",
        "training.steps": 4,
    }


def test_hidden_matrices_go_to_muon_and_all_else_to_adamw(tiny: Tiny) -> None:
    recipe = tiny("run", **settings(0, adamw_lr=2e-3))
    processor = prepare(recipe, log=lambda _: None).processor(recipe)
    model = build_model(recipe, make_task(recipe, processor))
    names = {id(p): name for name, p in model.named_parameters()}
    tables, gains, hidden = parameter_groups(recipe, model)
    inside = {names[id(p)] for p in hidden["params"]}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert inside == {
        f"model.layers.{i}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}.weight"
        for i in range(2)
        for name in linear
    }
    assert {names[id(p)] for p in tables["params"]} <= {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert (tables["use_muon"], gains["use_muon"], hidden["use_muon"]) == (False, False, True)
    assert (tables["weight_decay"], gains["weight_decay"]) == (0.1, 0.0)
    counted = [p for group in (tables, gains, hidden) for p in group["params"]]
    assert sorted(map(id, counted)) == sorted(names)


def test_the_rates_follow_the_schedule_in_their_ratio(tiny: Tiny) -> None:
    session = loop_session(tiny("run", **settings(2, adamw_lr=2e-3)))
    engines.set_learning_rate(session.engine, 5e-3)  # half of the peak
    rates = {g["use_muon"]: g["lr"] for g in session.engine.optimizer.param_groups}
    assert rates == {True: 5e-3, False: pytest.approx(1e-3)}


def loop_session(recipe: Recipe) -> Session:
    ranks.init_distributed()
    return build(recipe, Run(recipe.output), fresh=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_partitions_hold_every_hidden_matrix_whole(tiny: Tiny, stage: int) -> None:
    session = loop_session(tiny("run", **settings(stage)))
    found = []
    for part in partitions(session.engine):
        group = session.engine.basic_optimizer.param_groups[part.group]
        assert bool(part.shapes) == group["use_muon"]
        for number, shape in enumerate(part.shapes):
            own = [piece for piece in part.pieces if piece.matrix == number]
            assert sum(piece.length for piece in own) == shape[0] * shape[1]
            found.append(shape)
    # two layers of four 32 x 32 and three of 48 x 32 or 32 x 48
    assert sorted(found) == sorted([(32, 32)] * 8 + [(48, 32)] * 4 + [(32, 48)] * 2)


CASES = [(1, 1, "none"), (1, 2, "optimizer"), (1, 3, "all"), (2, 0, "none"), (2, 1, "none"),
         (2, 2, "optimizer"), (2, 3, "none")]  # fmt: skip
# ZeRO-2 with offload, in bfloat16 with 16-bit states
RESUMED = settings(2, "optimizer", states="bf16") | {
    "training.precision": "bf16",
    "training.checkpoint.every": 2,
}


@pytest.fixture(scope="module")
def lasting(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """As `tiny`, in a folder that all tests of this file share."""
    folder = tmp_path_factory.mktemp("muon")

    def build(name: str, **overrides: Any) -> Recipe:
        shutil.copytree(prepared, folder / name / "data", dirs_exist_ok=True)
        return parse_recipe(with_overrides(tiny_tree(corpus, folder / name), overrides))

    return build


@pytest.fixture(scope="module")
def whole(lasting: Tiny) -> list[float]:
    """The losses on one rank without ZeRO."""
    recipe = lasting("whole", **settings(0))
    loop.train(recipe)
    return losses(recipe)


@pytest.fixture(scope="module")
def on_two_ranks(lasting: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Recipe]:
    """What two ranks train, in one start of theirs: the cases, a whole run and half of one."""
    recipes: dict[Any, Recipe] = {
        case: lasting("-".join(map(str, case)), **settings(*case[1:]))
        for case in CASES
        if case[0] == 2
    }
    recipes["whole"] = lasting("uncut", **RESUMED)
    recipes["half"] = lasting("parts", **RESUMED | {"training.steps": 2})
    train_on_ranks([*recipes.values()], 2, tmp_path_factory.mktemp("start"))
    return recipes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_changes_nothing(
    case: tuple[int, int, str], whole: list[float], tiny: Tiny, request: pytest.FixtureRequest
) -> None:
    ranks, stage, offload = case
    if ranks == 1:
        recipe = tiny("cut", **settings(stage, offload))
        loop.train(recipe)
    else:
        recipe = request.getfixturevalue("on_two_ranks")[case]
    assert losses(recipe) == pytest.approx(whole, rel=LOSS_TOLERANCE)


def test_two_ranks_resume_with_the_same_bits(
    on_two_ranks: dict[Any, Recipe], lasting: Tiny, tmp_path: Path
) -> None:
    parts = lasting("parts", **RESUMED)
    assert len(losses(parts)) == 2
    train_on_ranks([parts], 2, tmp_path)
    assert losses(parts) == losses(on_two_ranks["whole"])


def test_states_move_to_another_stage(tiny: Tiny) -> None:
    """momentum_buffer and the moments of AdamW, as they were saved, in other flat tensors."""

    loop.train(tiny("run", **settings(2)))
    found: list[dict[str, torch.Tensor]] = []
    for stage in (2, 3):
        recipe = tiny("run", **settings(stage))
        ranks.init_distributed()
        session = build(recipe, Run(recipe.output), fresh=False)
        values = {}
        for piece in shards(session.engine):
            state = session.engine.basic_optimizer.state[piece.owner]
            keys = {"momentum_buffer", "exp_avg", "exp_avg_sq"} & set(state)
            values |= {f"{piece.name}:{key}": piece.of(state[key]).clone() for key in keys}
        found.append(values)
    two, three = found
    assert two.keys() == three.keys()
    assert any(name.endswith("q_proj.weight:momentum_buffer") for name in two)
    assert any(name.endswith("embed_tokens.weight:exp_avg_sq") for name in two)
    assert all(torch.equal(three[name], value) for name, value in two.items())
