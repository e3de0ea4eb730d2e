"""The recipe's optimizers: what is refused, training under ZeRO, resuming."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import losses, tiny_tree

from gradsmith.errors import UserError
from gradsmith.recipe import Optimizer, Recipe, Training, parse_recipe
from gradsmith.run import Run
from gradsmith.training import checkpoint, loop
from gradsmith.training import engine as engines

Tiny = Callable[..., Recipe]
RATES = {
    "adamw": 3e-3, "adam": 3e-3, "adamw8bit": 3e-3, "lion": 1e-3, "sgd": 0.3, "adagrad": 0.03,
    "lamb": 5e-2, "muon": 1e-2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sgd", "betas": [0.9, 0.9]}, "betas does not go with sgd; allowed are name, lr"),
        ({"name": "adamw", "momentum": 0.9}, "momentum does not go with adamw"),
        ({"name": "adamw8bit", "states": "bf16"}, "states does not go with adamw8bit"),
        ({"name": "adamw", "rounding": "nearest"}, "rounding does not go with adamw"),
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov needs a momentum above 0"),
        ({"name": "adamv"}, "Did you mean"),
        ({"name": "lamb"}, "needs zero.stage 0: its trust ratios are of whole tensors"),
        ({"name": "adamw", "adamw_lr": 0.1}, "adamw_lr does not go with adamw"),
        ({"name": "lamb", "l1": 0.1}, "l1 does not go with lamb"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Any, settings: dict, message: str) -> None:
    tree = tiny_tree(tmp_path, tmp_path / "run")
    tree["training"]["optimizer"] = settings
    with pytest.raises(UserError, match=message):
        parse_recipe(tree)


@pytest.mark.parametrize("name", RATES)
def test_defaults_follow_the_name_and_read_back(name: str) -> None:
    settings = Optimizer(name=name)
    assert settings.lr > 0
    assert Optimizer.model_validate(settings.model_dump()) == settings
    assert (settings.betas is None) == (name in ("sgd", "adagrad"))
    assert (settings.rounding == "stochastic") == (name == "adamw8bit")


def settings_for(name: str, stage: int, **more: Any) -> dict[str, Any]:
    return {
        "training.optimizer": {"name": name, "lr": RATES[name], **more},
        "training.zero.stage": stage,
        "training.schedule.name": "constant",
    }


@pytest.mark.parametrize("name", RATES)
def test_the_loss_falls(tiny: Tiny, name: str) -> None:
    stage = 0 if name == "lamb" else 1
    recipe = tiny("run", **settings_for(name, stage), **{"training.steps": 15})
    loop.train(recipe)
    assert losses(recipe)[-1] < losses(recipe)[0] - 0.2


CASES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("adamw8bit", 0, "none", {}),
    ("adamw8bit", 1, "none", {"rounding": "nearest"}),
    ("adamw8bit", 2, "optimizer", {}),
    ("adamw8bit", 3, "none", {}),
    ("adamw", 2, "none", {"states": "bf16", "l1": 1e-3}),
    ("lion", 2, "none", {}),
    ("sgd", 3, "none", {"nesterov": True}),
    ("adagrad", 1, "none", {}),
    ("lamb", 0, "none", {}),
    ("muon", 0, "none", {"states": "bf16"}),
    ("muon", 1, "none", {}),
    ("muon", 2, "optimizer", {"adamw_lr": 3e-3}),
    ("muon", 3, "none", {"adjust_lr_fn": "original"}),
]


@pytest.mark.parametrize(("name", "stage", "offload", "more"), CASES)
def test_resume_gives_the_same_bits(
    tiny: Tiny, name: str, stage: int, offload: str, more: dict[str, Any]
) -> None:
    settings = settings_for(name, stage, **more) | {"training.zero.offload": offload}
    settings["training.checkpoint.every"] = 3
    whole = tiny("whole", **settings, **{"training.steps": 6})
    loop.train(whole)
    loop.train(tiny("parts", **settings, **{"training.steps": 3}))
    parts = tiny("parts", **settings, **{"training.steps": 6})
    loop.train(parts)
    assert losses(parts) == losses(whole)


def states(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The values of the moments by parameter, read from where the run resumes."""
    from gradsmith_kernels.optim import decode

    engines.init_distributed()
    session = loop._build(recipe, Run(recipe.output), fresh=False)
    found = {}
    for piece in checkpoint.pieces(session.engine):
        state = session.engine.basic_optimizer.state[piece.owner]
        for key, scale, signed in (("state1", "absmax1", True), ("state2", "absmax2", False)):
            values = state[key]
            if scale in state:
                values = decode(values, state[scale], signed)
            found[f"{piece.name}:{key}"] = piece.of(values).clone()
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_8_bit_states_move_to_another_stage(tiny: Tiny, stage: int) -> None:
    """Blocks lie elsewhere there: the values are rounded once more, each to its nearest."""
    recipe = tiny("run", **settings_for("adamw8bit", 2), **{"training.steps": 4})
    loop.train(recipe)
    before = states(recipe)
    after = states(tiny("run", **settings_for("adamw8bit", stage), **{"training.steps": 4}))
    assert before.keys() == after.keys()
    for name, values in before.items():
        distance = (after[name] - values).norm() / values.norm().clamp(min=1e-12)
        assert distance < 0.1, name


def test_training_reads_optimizers() -> None:
    training = Training.model_validate({"steps": 1, "optimizer": {"name": "lion"}})
    assert training.optimizer.betas == [0.9, 0.99]
