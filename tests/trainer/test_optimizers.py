"""The recipe's optimizers: what is refused, training under ZeRO, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, tiny_tree, train_on_ranks

from gradsmith import checkpoints, ranks
from gradsmith.errors import UserError
from gradsmith.reading import read_json
from gradsmith.recipe import (
    OF_WHOLE_TENSORS,
    OPTIMIZERS,
    Optimizer,
    Recipe,
    Training,
    parse_recipe,
)
from gradsmith.run import Run
from gradsmith.training import engine as engines
from gradsmith.training import loop
from gradsmith.training.deepspeed_internals import shards
from gradsmith.training.session import build

Tiny = Callable[..., Recipe]
RATES = {
    "adamw": 3e-3, "adam": 3e-3, "adamw8bit": 3e-3, "lion": 1e-3, "sgd": 0.3, "adagrad": 0.03,
    "lamb": 5e-2, "schedule_free": 1e-2, "adafactor": 0.1, "muon": 1e-2,
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
        ({"name": "adafactor"}, "needs zero.stage 0: its row and column means are of whole"),
        ({"name": "adafactor", "eps": 1e-8}, "eps does not go with adafactor"),
        ({"name": "adamw", "adamw_lr": 0.1}, "adamw_lr does not go with adamw"),
        ({"name": "lamb", "l1": 0.1}, "l1 does not go with lamb"),
        ({"name": "schedule_free"}, "schedule.name must be constant; it is cosine"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Any, settings: dict, message: str) -> None:
    tree = tiny_tree(tmp_path, tmp_path / "run")
    tree["training"]["optimizer"] = settings
    with pytest.raises(UserError, match=message):
        parse_recipe(tree)


def test_each_optimizer_is_tried() -> None:
    assert RATES.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", RATES)
def test_defaults_follow_the_name_and_read_back(name: str) -> None:
    settings = Optimizer.model_validate({"name": name})
    assert isinstance(settings, OPTIMIZERS[name])
    assert settings.lr > 0
    assert Optimizer.model_validate(settings.model_dump()) == settings
    fields = dict(settings)
    assert ("betas" not in fields) == (name in ("sgd", "adagrad", "adafactor"))
    assert (fields.get("rounding") == "stochastic") == (name == "adamw8bit")


def settings_for(name: str, stage: int, **more: Any) -> dict[str, Any]:
    return {
        "training.optimizer": {"name": name, "lr": RATES[name], **more},
        "training.zero.stage": stage,
        "training.schedule.name": "constant",
    }


@pytest.mark.parametrize("name", RATES)
def test_the_loss_falls(tiny: Tiny, name: str) -> None:
    stage = 0 if name in OF_WHOLE_TENSORS else 1
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
    ("schedule_free", 0, "none", {}),
    ("schedule_free", 2, "optimizer", {"l1": 1e-4}),
    ("adafactor", 0, "none", {"l1": 1e-3}),
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


def test_two_ranks_resume_where_each_holds_everything(tiny: Tiny, tmp_path: Path) -> None:
    """At stage 0, in float32, whose states are of the parameters, and in bf16, of copies."""
    runs: dict[str, dict[str, Recipe]] = {"whole": {}, "half": {}, "parts": {}}
    for precision in ("fp32", "bf16"):
        settings = settings_for("adamw", 0) | {"training.precision": precision}
        settings |= {"training.checkpoint.every": 3}
        for name, steps in (("whole", 6), ("half", 3), ("parts", 6)):
            folder = f"{'whole' if name == 'whole' else 'parts'}-{precision}"
            runs[name][precision] = tiny(folder, **settings, **{"training.steps": steps})
    train_on_ranks([*runs["whole"].values(), *runs["half"].values()], 2, tmp_path)
    train_on_ranks([*runs["parts"].values()], 2, tmp_path)
    for precision, whole in runs["whole"].items():
        parts = runs["parts"][precision]
        assert len(losses(parts)) == 6
        assert losses(parts) == losses(whole)
        first, second = (newest(parts) / f"optimizer-0000{rank}-of-00002.json" for rank in (0, 1))
        assert read_json(first)["pieces"]
        assert not read_json(second)["pieces"]


def test_two_ranks_with_offload_clip_and_8_bit_states_resume_with_the_same_bits(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = settings_for("adamw8bit", 2) | {"training.zero.offload": "optimizer"}
    settings |= {"training.checkpoint.every": 3, "training.clip": 0.05}  # every step is clipped
    whole = tiny("whole", **settings, **{"training.steps": 6})
    half = tiny("parts", **settings, **{"training.steps": 3})
    train_on_ranks([whole, half], 2, tmp_path)
    parts = tiny("parts", **settings, **{"training.steps": 6})
    train_on_ranks([parts], 2, tmp_path)
    assert len(losses(parts)) == 6
    assert losses(parts) == losses(whole)
    norms = [row["grad_norm"] for row in Run(whole.output).read_metrics() if "grad_norm" in row]
    assert min(norms) > 0.05
    for one in sorted(newest(whole).glob("optimizer-*.safetensors")):
        assert one.read_bytes() == (newest(parts) / one.name).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (2, "optimizer"), (3, "none")]
)
def test_a_step_on_nan_changes_nothing(
    tiny: Tiny, stage: int, offload: str, precision: str
) -> None:
    """The run goes on from the weights and states of before."""
    settings = settings_for("adamw", stage) | {"training.zero.offload": offload}
    recipe = tiny("run", **settings, **{"training.precision": precision})
    ranks.init_distributed()
    session = build(recipe, Run(recipe.output), fresh=True)
    engines.set_learning_rate(session.engine, 1e-3)
    optimizer = session.engine.basic_optimizer

    def held() -> dict[str, torch.Tensor]:
        found = {}
        for piece in shards(session.engine):
            state = {"weight": piece.owner, **optimizer.state[piece.owner]}
            for key in ("weight", "exp_avg", "exp_avg_sq"):
                found[f"{piece.name}:{key}"] = piece.of(state[key]).clone()
        return found

    loop.optimizer_step(session)
    before = held()
    spoiled = dict(session.engine.module.named_parameters())["model.norm.weight"]
    hook = spoiled.register_hook(lambda grad: grad * math.nan)
    _, norm, _ = loop.optimizer_step(session)
    assert not math.isfinite(norm)
    torch.testing.assert_close(held(), before, rtol=0, atol=0)
    hook.remove()
    _, norm, _ = loop.optimizer_step(session)
    assert math.isfinite(norm)
    assert any(not torch.equal(now, before[key]) for key, now in held().items())


def newest(recipe: Recipe) -> Path:
    found = checkpoints.newest(Run(recipe.output))[0]
    assert found is not None
    return found


def test_schedule_free_is_the_same_under_every_stage(tiny: Tiny) -> None:
    """Training and validation, which sees the averages."""
    found = []
    for stage in (0, 1, 2):
        settings = settings_for("schedule_free", stage) | {"training.precision": "fp32"}
        recipe = tiny(f"run{stage}", **settings, **{"training.steps": 6})
        loop.train(recipe)
        rows = [row for row in Run(recipe.output).read_metrics() if row["kind"] == "validation"]
        found.append(losses(recipe) + [row["loss"] for row in rows])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=0)


def states(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The values of the moments by parameter, read from where the run resumes."""
    from gradsmith_kernels.optim import decode

    ranks.init_distributed()
    session = build(recipe, Run(recipe.output), fresh=False)
    found = {}
    for piece in shards(session.engine):
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
