"""The losses over pairs of answers, as functions of the answers' log-probabilities alone.

Letters: B pairs; of a pair, y₊ is the chosen and y₋ the rejected answer to a prompt x; σ is the
logistic function. Each function returns what each pair adds to the loss, and its margin: by how
much the model rewards y₊ above y₋ (both (B,), of the dtype of the log-probabilities). A pair counts
as right where its margin is above 0, and half where it is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipe import Preference

WITHOUT_REFERENCE = ("orpo", "simpo")
"""The objectives that need no log-probabilities of a reference."""


@dataclass(frozen=True)
class Pairs:
    """What a model and its reference say of B pairs. All are (B,), of float32 or float64.

    Attributes:
        chosen, rejected: log π(y|x) = Σ log π(token), over the tokens of the answer.
        chosen_tokens, rejected_tokens: how many those are.
        ref_chosen, ref_rejected: log π_ref(y|x) of the reference; None where it is not needed.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None

    def ratios(self) -> tuple[Tensor, Tensor]:
        """log π(y|x) - log π_ref(y|x), of y₊ and of y₋."""
        assert self.ref_chosen is not None
        assert self.ref_rejected is not None
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    def means(self) -> tuple[Tensor, Tensor]:
        """log π(y|x) / |y|, of y₊ and of y₋."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def preference_loss(
    objective: Preference, pairs: Pairs, kl: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss that the recipe names, with its settings.

    Args:
        objective: one of `gradsmith.recipe.OBJECTIVES`.
        pairs: the log-probabilities; with a reference, unless `objective.name` is one of
            `WITHOUT_REFERENCE`.
        kl: for kto alone: see there.
    """
    settings = objective.model_dump(exclude={"name"})
    if objective.name == "kto":
        assert kl is not None
        return kto(pairs, kl, **settings)
    functions: dict[str, Callable[..., tuple[Tensor, Tensor]]]
    functions = {"dpo": dpo, "ipo": ipo, "orpo": orpo, "simpo": simpo}
    return functions[objective.name](pairs, **settings)


def dpo(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """-(1 - ε) log σ(m) - ε log σ(-m), with m = β (r₊ - r₋) and r = log π(y|x) / π_ref(y|x).

    The margin is m; ε is `label_smoothing`, the share of pairs taken to be the wrong way round.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; ε: Mitchell 2023, "A note on DPO
    with noisy preferences", the conservative loss.
    """
    better, worse = pairs.ratios()
    margin = beta * (better - worse)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, margin


def ipo(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """(h - 1 / (2β))², with h = r₊ / |y₊| - r₋ / |y₋| and r = log π(y|x) / π_ref(y|x).

    The margin is β h; β is the paper's τ.

    Source: Azar et al. 2023, arXiv 2310.12036, equation 17. Its ratios are of whole answers; each
    is divided by its number of tokens, as TRL does since its authors have said so of the paper's
    results: the aim 1 / (2β) is otherwise met the sooner, the longer the answers are.
    """
    better, worse = pairs.ratios()
    apart = better / pairs.chosen_tokens - worse / pairs.rejected_tokens
    return (apart - 1 / (2 * beta)) ** 2, beta * apart


def orpo(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """-log p₊ - β log σ(log odds(p₊) - log odds(p₋)), with p = π(y|x)^(1/|y|).

    odds(p) = p / (1 - p). The margin is β (log p₊ - log p₋); β is the paper's λ. A p that is 1 in
    the dtype counts as the number below 1, whose odds are finite.

    Source: Hong et al. 2024, arXiv 2403.07691, equations 3 to 7.
    """
    better, worse = pairs.means()
    log_odds = (better - _log_of_one_minus_exp(better)) - (worse - _log_of_one_minus_exp(worse))
    return -better - beta * F.logsigmoid(log_odds), beta * (better - worse)


def simpo(pairs: Pairs, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """-log σ(m - γ), with m = β (log π(y₊|x) / |y₊| - log π(y₋|x) / |y₋|).

    The margin is m.

    Source: Meng et al. 2024, arXiv 2405.14734, equation 6.
    """
    better, worse = pairs.means()
    margin = beta * (better - worse)
    return -F.logsigmoid(margin - gamma), margin


def kto(
    pairs: Pairs,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """½ [λ₊ (1 - σ(β (r₊ - z))) + λ₋ (1 - σ(β (z - r₋)))], with r = log π(y|x) / π_ref(y|x).

    Each answer is judged by itself, against z; with ½ the mean over pairs is the mean over
    answers. The margin is β (r₊ - r₋).

    Args:
        kl: a scalar, without a gradient: an estimate of KL(π ‖ π_ref), the mean of
            log π(y'|x) / π_ref(y'|x) over answers y' that belong to other prompts. z = max(0, kl).

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, equation 8.
    """
    better, worse = pairs.ratios()
    z = kl.detach().clamp(min=0)
    desirable = desirable_weight * (1 - torch.sigmoid(beta * (better - z)))
    undesirable = undesirable_weight * (1 - torch.sigmoid(beta * (z - worse)))
    return (desirable + undesirable) / 2, beta * (better - worse)


def _log_of_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - eˣ) for x < 0, without losing the digits that 1 - eˣ cancels (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps / 2)
    near = x > -math.log(2)
    # Either branch's gradient is infinite where the other one is meant, and 0 times that is NaN.
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)
