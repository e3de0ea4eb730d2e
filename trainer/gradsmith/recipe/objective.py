"""`objective`: what a task minimises, where its data leave a choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ..errors import did_you_mean
from ..reading import describe
from .node import Fraction, Node, NotNegative, PositiveFloat, Variant


class ClassificationObjective(Node):
    """Cross-entropy, its rows weighted by their classes."""

    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = Field(
        None,
        description="what a row of each class counts; balanced: rows / (classes x its rows)",
    )
    label_smoothing: Fraction = 0.0

    @field_validator("class_weights", mode="before")
    @classmethod
    def _one_of_its_kinds(cls, value: Any) -> Any:
        """Said here, for pydantic has a complaint from each kind that a value could have been.
        Labels that are numbers in the YAML are text, as they are in the data."""
        if value is None or value == "balanced":
            return value
        if not isinstance(value, dict) or not value:
            near = did_you_mean(value, ["balanced"]) if isinstance(value, str) else ""
            raise ValueError(
                f"found {describe(value)}; allowed are balanced, and a mapping of labels to "
                f"numbers above 0.{near}"
            )
        for label, weight in value.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise ValueError(f"{label}: found {describe(weight)}; allowed are numbers above 0")
            if isinstance(label, bool) or not isinstance(label, str | int):
                raise ValueError(f"found the label {describe(label)}; allowed are text and numbers")
        return {str(label): float(weight) for label, weight in value.items()}


class TextClassificationObjective(ClassificationObjective):
    """Cross-entropy over texts of which some tokens are left out."""

    token_dropout: Fraction = Field(
        0.0,
        description="how many of a training text's tokens are left out, others each time: "
        "Iyyer et al. 2015, Deep unordered composition rivals syntactic methods",
    )

class TableObjective(ClassificationObjective):
    """Of a classification class_weights and label_smoothing, of a regression the others."""

    loss: Literal["squared", "absolute", "huber", "quantile"] | None = Field(
        None, description="regression: what the distance from the target costs; default: squared"
    )
    delta: PositiveFloat | None = Field(
        None, description="huber: from where on it grows linearly, in the target's deviations"
    )
    quantiles: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] | None = (
        Field(None, description="quantile: which to predict; default: 0.1, 0.5, 0.9")
    )

    @model_validator(mode="after")
    def _of_its_loss(self) -> Self:
        for key, loss in (("delta", "huber"), ("quantiles", "quantile")):
            if getattr(self, key) is not None and self.loss != loss:
                raise ValueError(f"{key} goes with loss: {loss}; the loss is {self.loss}")
        if self.quantiles is not None and self.quantiles != sorted(set(self.quantiles)):
            raise ValueError(f"quantiles: found {self.quantiles}; allowed are rising ones")
        return self


class Preference(Variant):
    """A loss over pairs of answers; the formulas are in gradsmith.tasks.preference_losses."""

    @classmethod
    def variants(cls) -> Mapping[str, type[Self]]:
        return cast("Mapping[str, type[Self]]", OBJECTIVES)


class DPO(Preference):
    """Rafailov et al. 2023, arXiv 2305.18290"""

    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = Field(0.1, description="how far the model may go from its reference")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="the share of pairs that may be the wrong way round"
    )


class IPO(Preference):
    """Azar et al. 2023, arXiv 2310.12036"""

    name: Literal["ipo"] = "ipo"
    beta: PositiveFloat = Field(0.1, description="the margin aimed at is 1 / (2 beta)")


class ORPO(Preference):
    """Hong et al. 2024, arXiv 2403.07691; without a reference"""

    name: Literal["orpo"] = "orpo"
    beta: PositiveFloat = Field(0.1, description="the weight of the odds ratio (the paper's λ)")


class SimPO(Preference):
    """Meng et al. 2024, arXiv 2405.14734; without a reference"""

    name: Literal["simpo"] = "simpo"
    beta: PositiveFloat = Field(2.0, description="scale of the answers' mean log-probabilities")
    gamma: NotNegative = Field(1.0, description="the margin by which the chosen answer must win")


class KTO(Preference):
    """Ethayarajh et al. 2024, arXiv 2402.01306; both answers of a pair, each by itself"""

    name: Literal["kto"] = "kto"
    beta: PositiveFloat = Field(0.1, description="how far the model may go from its reference")
    desirable_weight: PositiveFloat = Field(1.0, description="what a chosen answer counts")
    undesirable_weight: PositiveFloat = Field(1.0, description="what a rejected answer counts")


OBJECTIVES: dict[str, type[Preference]] = {
    "dpo": DPO,
    "ipo": IPO,
    "orpo": ORPO,
    "simpo": SimPO,
    "kto": KTO,
}
