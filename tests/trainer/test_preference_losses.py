"""The losses over pairs: their formulas in float64 from numbers alone, and TRL's own functions."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradsmith.recipe import OBJECTIVES, Preference
from gradsmith.tasks.preference_losses import WITHOUT_REFERENCE, Pairs, preference_loss

# log π and log π_ref of three pairs: the model is right, is wrong, and is the reference.
CHOSEN, REJECTED = [-12.0, -30.5, -4.0], [-20.0, -8.25, -9.0]
REF_CHOSEN, REF_REJECTED = [-15.0, -24.5, -4.0], [-18.0, -10.25, -9.0]
CHOSEN_TOKENS, REJECTED_TOKENS = [6, 10, 4], [8, 3, 4]


def pairs(dtype: torch.dtype = torch.float64) -> Pairs:
    columns = (CHOSEN, REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS, REF_CHOSEN, REF_REJECTED)
    return Pairs(*(torch.tensor(column, dtype=dtype) for column in columns))


def objective(name: str, **settings: Any) -> Preference:
    return OBJECTIVES[name].model_validate({"name": name, **settings})


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(name: str, k: int, kl: float) -> tuple[float, float]:
    """Loss and margin of pair k, from the papers' formulas in Python's numbers."""
    better, worse = CHOSEN[k] - REF_CHOSEN[k], REJECTED[k] - REF_REJECTED[k]
    p, q = (
        math.exp(a[k] / n[k]) for a, n in ((CHOSEN, CHOSEN_TOKENS), (REJECTED, REJECTED_TOKENS))
    )
    if name == "dpo":
        m = 0.1 * (better - worse)
        return -0.9 * math.log(sigma(m)) - 0.1 * math.log(sigma(-m)), m
    if name == "ipo":
        h = better / CHOSEN_TOKENS[k] - worse / REJECTED_TOKENS[k]
        return (h - 1 / (2 * 0.2)) ** 2, 0.2 * h
    if name == "orpo":
        ratio = p / (1 - p) / (q / (1 - q))
        return -math.log(p) - 0.25 * math.log(sigma(math.log(ratio))), 0.25 * math.log(p / q)
    if name == "simpo":
        m = 2.0 * math.log(p / q)
        return -math.log(sigma(m - 1.5)), m
    wanted = 1.5 * (1 - sigma(0.3 * (better - max(0.0, kl))))
    unwanted = 0.5 * (1 - sigma(0.3 * (max(0.0, kl) - worse)))
    return (wanted + unwanted) / 2, 0.3 * (better - worse)


SETTINGS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.2},
    "orpo": {"beta": 0.25},
    "simpo": {"beta": 2.0, "gamma": 1.5},
    "kto": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
}


def test_every_objective_of_the_recipe_is_here() -> None:
    assert set(SETTINGS) == set(OBJECTIVES)


@pytest.mark.parametrize("kl", [0.75, -0.5])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_formula(name: str, kl: float) -> None:
    given = torch.tensor(kl, dtype=torch.float64)
    asked = objective(name, **SETTINGS[name])
    loss, margin = preference_loss(asked, pairs(), given)
    expected = [by_hand(name, k, kl) for k in range(3)]
    assert loss.tolist() == pytest.approx([row[0] for row in expected], rel=1e-12)
    assert margin.tolist() == pytest.approx([row[1] for row in expected], rel=1e-12, abs=1e-15)
    same, _ = preference_loss(
        objective(name, **SETTINGS[name]), pairs(torch.float32), given.float()
    )
    assert same.dtype == torch.float32
    assert same.tolist() == pytest.approx(loss.tolist(), rel=1e-5)


def test_what_is_known_of_the_reference_itself() -> None:
    """Where the model is its reference: log 2, 1 / (2 beta)², 1/2."""
    where = pairs()
    same = Pairs(where.ref_chosen, where.ref_rejected, where.chosen_tokens, where.rejected_tokens,
                 where.ref_chosen, where.ref_rejected)  # type: ignore[arg-type]  # fmt: skip
    zero = torch.zeros((), dtype=torch.float64)
    for name, value in (("dpo", math.log(2)), ("ipo", 25.0), ("kto", 0.5)):
        loss, margin = preference_loss(objective(name), same, zero)
        assert loss.tolist() == pytest.approx([value] * 3)
        assert margin.tolist() == [0.0] * 3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_formula(name: str) -> None:
    where, kl = pairs(), torch.tensor(0.75, dtype=torch.float64)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        moved = Pairs(chosen, rejected, where.chosen_tokens, where.rejected_tokens,
                      where.ref_chosen, where.ref_rejected)  # fmt: skip
        return preference_loss(objective(name, **SETTINGS[name]), moved, kl)[0]

    leaves = (where.chosen.requires_grad_(), where.rejected.requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)
    better, worse = torch.autograd.grad(loss(*leaves).sum(), leaves)
    assert (worse >= 0).all()  # less of the rejected answer is never worse
    if name != "ipo":  # which aims at a margin, and may have passed it
        assert (better <= 0).all()


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_some_need_no_reference(name: str) -> None:
    where = pairs()
    alone = Pairs(where.chosen, where.rejected, where.chosen_tokens, where.rejected_tokens)
    loss, margin = preference_loss(objective(name), alone)
    expected, same = preference_loss(objective(name), where)
    assert torch.equal(loss, expected)
    assert torch.equal(margin, same)


def test_odds_stay_finite_where_an_answer_is_certain_or_impossible() -> None:
    for dtype in (torch.float32, torch.float64):
        chosen = torch.tensor([0.0, -1e-12, -1e4, -5.0], dtype=dtype, requires_grad=True)
        rejected = torch.tensor([-5.0, -1e4, -1e-12, 0.0], dtype=dtype, requires_grad=True)
        tokens = torch.ones(4, dtype=dtype)
        loss, _ = preference_loss(objective("orpo"), Pairs(chosen, rejected, tokens, tokens))
        loss.sum().backward()
        for values in (loss, chosen.grad, rejected.grad):
            assert values is not None
            assert values.isfinite().all()


# ------------------------------------------------------------------------------------------ TRL


def trl_self(**more: Any) -> SimpleNamespace:
    """What TRL's methods read of their trainer."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=torch.nn.Module(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def trl_batch(where: Pairs) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a model says of a prompt of one token and the answers behind it, the chosen ones first,
    and TRL's inputs for them: each answer's log-probability is spread over its tokens."""
    total = torch.cat([where.chosen, where.rejected])
    tokens = torch.cat([where.chosen_tokens, where.rejected_tokens])
    mask = (torch.arange(12) > 0) & (torch.arange(12) <= tokens[:, None])
    log_probs = torch.where(mask[:, 1:], (total / tokens)[:, None], 0.0)
    nothing = torch.zeros_like(log_probs)
    said = SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": mask.long()}
    return (lambda **_: said), inputs


@pytest.mark.parametrize(("name", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo_are_trls(name: str, theirs: str) -> None:
    trainer = pytest.importorskip("trl").DPOTrainer
    where = pairs(torch.float32)
    model, inputs = trl_batch(where)
    trl = trl_self(beta=0.2, loss_types=[theirs], loss_weights=[1.0], ld_alpha=None,
                   f_divergence_type="reverse_kl", use_weighting=False)  # fmt: skip
    refs = {"ref_chosen_logps": where.ref_chosen, "ref_rejected_logps": where.ref_rejected}
    expected = trainer._compute_loss(trl, model, inputs | refs, False)
    loss, margin = preference_loss(objective(name, beta=0.2), where)
    torch.testing.assert_close(loss.mean(), expected)
    if name == "dpo":  # of whole answers, also where the loss is not
        assert trl._metrics["train"]["rewards/margins"] == pytest.approx(
            [float(margin.mean())], rel=1e-5
        )


@pytest.mark.parametrize("kl", [0.75, -0.5])
def test_kto_is_trls(kl: float) -> None:
    trainer = pytest.importorskip("trl").KTOTrainer
    where = pairs(torch.float32)
    model, inputs = trl_batch(where)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    trl = trl_self(beta=0.3, loss_type="kto", calculate_KL=True, **weights,
                   _compute_kl_logps=lambda *_: torch.full((6,), kl))  # fmt: skip
    assert where.ref_chosen is not None
    assert where.ref_rejected is not None
    inputs |= {
        "label": torch.tensor([True] * 3 + [False] * 3),
        "ref_logps": torch.cat([where.ref_chosen, where.ref_rejected]),
        "ref_KL_logps": torch.zeros(6),
    }
    expected = trainer._compute_loss(trl, model, inputs, False)
    asked = objective("kto", beta=0.3, **weights)
    loss, margin = preference_loss(asked, where, torch.tensor(kl))
    torch.testing.assert_close(loss.mean(), expected)
    assert trl._metrics["train"]["rewards/margins"] == pytest.approx(
        [float(margin.mean())], rel=1e-5
    )


def test_orpo_is_trls() -> None:
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    better, worse = pairs(torch.float32).means()
    odds, better_reward, worse_reward, *_ = trainer.odds_ratio_loss(
        trl_self(beta=0.25), better, worse
    )
    loss, margin = preference_loss(objective("orpo", beta=0.25), pairs(torch.float32))
    torch.testing.assert_close(loss, -better - odds)
    torch.testing.assert_close(margin, better_reward - worse_reward)


def test_simpo_is_trls() -> None:
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    trl = trl_self(beta=2.0, simpo_gamma=1.5, loss_type="simpo", alpha=0.0, label_smoothing=0.0)
    expected, better, worse = trainer.cpo_loss(trl, *pairs(torch.float32).means())
    loss, margin = preference_loss(objective("simpo", beta=2.0, gamma=1.5), pairs(torch.float32))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(margin, better - worse)
