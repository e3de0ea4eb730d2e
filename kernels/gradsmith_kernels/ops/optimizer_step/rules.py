"""The update rules: which options and states each has, and what the kernels are told of them.

Every rule works on float32 values of the weight x, the gradient g (already unscaled and clipped)
and its states, at step t = 1, 2, ...:

    adam           m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
                   x -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    amsgrad        adam with s = max(s, v) in place of v in the update of x
    lion           x -= lr * sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g
    sgd            x -= lr * g
    momentum       m = momentum * m + (1 - dampening) g   (m = g at t = 1)
                   x -= lr * (g + momentum * m if nesterov else m)
    adagrad        s += g^2;  x -= lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)
    schedule_free  v as adam;  d = g / (sqrt(v / (1 - beta2^t)) + eps) + wd * x
                   x += average (z - x) - lr (1 - beta1 (1 - average)) d;  z -= lr * d
    lamb           m, v as adam;  d = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + wd * x
                   x -= lr * |x| / |d| * d   (norms of the whole tensor; 1 where one of them is 0)
    direction      m = momentum * m + (1 - momentum) g
                   x = (1 - momentum) * g + momentum * m if nesterov else m
                   (Muon's first sweep: x is overwritten with what is then orthogonalised)

Decay: decoupled, x is first multiplied by 1 - lr * weight_decay; else g grows by weight_decay * x
(schedule_free and lamb: as in the formula). l1 is proximal: after the update every weight moves
towards 0 by lr * l1 and stops there.

Sources: Kingma and Ba 2015 (arXiv:1412.6980), Loshchilov and Hutter 2019 (1711.05101), Reddi et al.
2018 (AMSGrad, 1904.09237), Chen et al. 2023 (Lion, 2302.06675), Sutskever et al. 2013 (Nesterov as
torch.optim.SGD has it), Duchi et al. 2011, Defazio et al. 2024 (schedule-free, 2405.15682), You et
al. 2020 (LAMB, 1904.00962), Jordan et al. 2024 (Muon, kellerjordan.github.io/posts/muon, with the
buffer of torch.optim.Muon).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Options = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """One update rule.

    code: its number in csrc/optimizer_step/optimizer_step.h.
    states: how many tensors of the weight's shape it keeps.
    options: the names of its numbers; flags are 0.0 or 1.0.
    coefficients: (options, t) -> the kernel's first six; see csrc for their meaning.
    """

    name: str
    code: int
    states: int
    options: tuple[str, ...]
    first_coefficients: Callable[[Options, float], tuple[float, ...]]

    def coefficients(self, o: Options, t: float) -> list[float]:
        """The eight numbers that the kernels take for step t."""
        first = self.first_coefficients(o, t)
        if self.name == "schedule_free":
            return [*first, o["beta1"], o["lr"] * o["l1"]]
        if self.name == "lamb":
            return [*first, 0.0, 1 / (1 - o["beta1"] ** t)]
        if self.name == "direction":
            return [*first, 0.0, 0.0]
        l2 = 0.0 if o["decoupled"] else o["weight_decay"]
        return [*first, l2, o["lr"] * o["l1"]]


def _decay(o: Options) -> float:
    return o["lr"] * o["weight_decay"] if o["decoupled"] else 0.0


def _share(beta: float) -> float:
    """How the kernels are told of beta * average + (1 - beta) * value: what is multiplied with
    value - average and added to the average (1 - beta), or, where beta is at most a half, to the
    value (-beta, and -0 for 0). Otherwise an average far above the value would drown it."""
    return 1 - beta if beta > 0.5 else -beta


def _adam(o: Options, t: float) -> tuple[float, ...]:
    step = o["lr"] / (1 - o["beta1"] ** t)
    inverse = 1 / math.sqrt(1 - o["beta2"] ** t)
    return (_share(o["beta1"]), _share(o["beta2"]), o["eps"], _decay(o), step, inverse)


def _lion(o: Options, t: float) -> tuple[float, ...]:
    return (_share(o["beta1"]), _share(o["beta2"]), 0.0, _decay(o), o["lr"], 0.0)


def _sgd(o: Options, t: float) -> tuple[float, ...]:
    return (0.0, 0.0, 0.0, _decay(o), o["lr"], 0.0)


def _momentum(o: Options, t: float) -> tuple[float, ...]:
    new = 1.0 if t == 1 else 1 - o["dampening"]
    of_g, of_m = (1.0, o["momentum"]) if o["nesterov"] else (0.0, 1.0)
    return (o["momentum"], new, of_g, _decay(o), o["lr"], of_m)


def _direction(o: Options, t: float) -> tuple[float, ...]:
    of_g, of_m = (1 - o["momentum"], o["momentum"]) if o["nesterov"] else (0.0, 1.0)
    return (_share(o["momentum"]), 0.0, of_g, 0.0, 0.0, of_m)


def _adagrad(o: Options, t: float) -> tuple[float, ...]:
    rate = o["lr"] / (1 + (t - 1) * o["lr_decay"])
    return (0.0, 0.0, o["eps"], _decay(o), rate, 0.0)


def _schedule_free(o: Options, t: float) -> tuple[float, ...]:
    inverse = 1 / math.sqrt(1 - o["beta2"] ** t)
    return (o["average"], _share(o["beta2"]), o["eps"], o["weight_decay"], o["lr"], inverse)


def _lamb(o: Options, t: float) -> tuple[float, ...]:
    inverse = 1 / math.sqrt(1 - o["beta2"] ** t)
    shares = _share(o["beta1"]), _share(o["beta2"])
    return (*shares, o["eps"], o["weight_decay"], o["lr"], inverse)


_COMMON = ("lr", "weight_decay", "decoupled", "l1")
RULES = {
    rule.name: rule
    for rule in (
        Rule("adam", 0, 2, (*_COMMON, "beta1", "beta2", "eps"), _adam),
        Rule("lion", 1, 1, (*_COMMON, "beta1", "beta2"), _lion),
        Rule("sgd", 2, 0, _COMMON, _sgd),
        Rule("momentum", 3, 1, (*_COMMON, "momentum", "dampening", "nesterov"), _momentum),
        Rule("adagrad", 4, 1, (*_COMMON, "lr_decay", "eps"), _adagrad),
        Rule(
            "schedule_free",
            5,
            2,
            ("lr", "weight_decay", "l1", "beta1", "beta2", "eps", "average"),
            _schedule_free,
        ),
        Rule("lamb", 6, 2, ("lr", "weight_decay", "beta1", "beta2", "eps"), _lamb),
        Rule("direction", 8, 1, ("momentum", "nesterov"), _direction),
        Rule("amsgrad", 9, 3, (*_COMMON, "beta1", "beta2", "eps"), _adam),
    )
}
LAMB_APPLY = 7  # code of lamb's second sweep


def seed_of_step(seed: int, t: float) -> int:
    """32 bits for the random rounding of step t."""
    return zlib.crc32(struct.pack("<qq", seed, int(t)))


def trust_ratio(weight_squares: float, update_squares: float) -> float:
    """LAMB's |x| / |d|, from the sums of squares."""
    if weight_squares > 0 and update_squares > 0:
        return math.sqrt(weight_squares / update_squares)
    return 1.0
