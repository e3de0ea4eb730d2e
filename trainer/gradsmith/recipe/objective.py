"""`objective`: what a task minimises, where its data leave a choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ..errors import did_you_mean
from ..reading import describe
from .node import Fraction, Node, NotNegative, PositiveFloat, Variant

Share = Annotated[float, Field(ge=0, le=1)]
Mixing = Annotated[float, Field(ge=0, le=100)]


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


class ColorJitter(Node):
    """Factors within 1 ± each; hue by a share of the circle."""

    brightness: NotNegative = 0.0
    contrast: NotNegative = 0.0
    saturation: NotNegative = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class RandAugment(Node):
    """Cubuk et al. 2019, arXiv 1909.13719"""

    layers: Annotated[int, Field(ge=1, le=16)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Augment(Node):
    """What is random about a training picture, in this order; in one pass over it."""

    crop: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = Field(
        None, description="a part of the picture, by its area: [from, to]; default: the middle"
    )
    pad: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="shifts by at most so many pixels; what comes in is black"
    )
    flip: Share = Field(0.0, description="how often left and right change sides")
    vertical_flip: Share = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="degrees, at most")
    color_jitter: ColorJitter | None = None
    randaugment: RandAugment | None = None
    trivial_augment: bool = Field(False, description="arXiv 2103.10158")
    erase: Share = Field(0.0, description="how often a box is blanked: arXiv 1708.04896")

    @model_validator(mode="after")
    def _go_together(self) -> Augment:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1]:
            raise ValueError(f"crop: found {self.crop}; allowed are two shares, rising, above 0")
        if self.randaugment is not None and self.trivial_augment:
            raise ValueError("randaugment and trivial_augment: give one of them")
        return self


class ImageObjective(ClassificationObjective):
    """Cross-entropy over augmented pictures."""

    augment: Augment = Augment()
    mixup: Mixing = Field(0.0, description="alpha of arXiv 1710.09412; 0: none")
    cutmix: Mixing = Field(
        0.0, description="alpha of arXiv 1905.04899; 0: none. With mixup too, half the pairs each"
    )


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
