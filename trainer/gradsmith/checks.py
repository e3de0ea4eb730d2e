"""What can be checked about a recipe without training: `gradsmith validate`, and the first thing
that `train` and `launch` do.

`gradsmith.recipe` checks a recipe by itself; here it meets the machine: files, folders, the model
that it describes. The model is built on the meta device, so its size does not matter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .recipe import LENGTHS, Recipe
from .run import Run, check_output

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Summary:
    """What a recipe amounts to."""

    name: str
    model: str
    parameters: int
    trainable_parameters: int
    world: int
    accumulation: int
    unit: str
    per_step: int
    steps: int | None
    length: str
    precision: str
    precision_asked: str
    precision_price: str | None

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {f"{values.pop('unit')}_per_step": values.pop("per_step"), **values}

    def __str__(self) -> str:
        trained = "all trained"
        if self.trainable_parameters != self.parameters:
            share = self.trainable_parameters / self.parameters
            trained = f"{self.trainable_parameters:,} of them trained ({share:.2%})"
        ranks = f"{self.world} rank" + "s" * (self.world > 1)
        auto = " (auto)" if self.precision_asked == "auto" else ""
        price = f"warning: {self.precision_price}"
        return "\n".join(
            (
                f"{self.name}: the recipe is good",
                f"  model   {self.model}, {self.parameters:,} parameters, {trained}",
                f"  step    {self.per_step:,} {self.unit} at most, on {ranks}, "
                f"{self.accumulation} micro-batches each",
                f"  length  {self.length}",
                f"  dtype   {self.precision}{auto}",
                *([price] if self.precision_price else []),
            )
        )


def check_recipe(
    recipe: Recipe, world: int = 1, *, fresh: bool = False, here: bool = True
) -> Summary:
    """Checks a recipe for `world` ranks, against this machine if it is to be trained `here`.

    Sources and a base that are gone are no obstacle to a run that has its data and base already,
    unless it starts over (`fresh`).

    Raises:
        UserError: naming every problem found.
    """
    from .models.config import describe_model
    from .precision import check_precision, precision_price, settle_precision
    from .tasks import task_class
    from .tasks.task import monitored

    asked, before = recipe.training.precision, None
    with contextlib.suppress(UserError):  # training says what is wrong with the run there
        before = None if fresh else Run(recipe.output).going_on()
    recipe = settle_precision(recipe, before)
    problems: list[str] = []
    with _collect(problems):
        recipe.training.accumulation(world)
    with _collect(problems):
        check_output(recipe)
    if here:
        with _collect(problems):
            check_precision(recipe)
    with _collect(problems):
        monitored(recipe, task_class(recipe.data.task))
    if recipe.training.early_stopping and not recipe.data.split.validation:
        problems.append("training.early_stopping: needs data.split.validation above 0; it is 0")
    problems += _check_data(recipe, fresh)
    model = None
    with _collect(problems):
        model = describe_model(recipe, fresh)
    if problems or model is None:
        raise UserError(
            "\n".join([f"{recipe.name}:", *(f"  {problem}" for problem in dict.fromkeys(problems))])
        )

    training = recipe.training
    task = task_class(recipe.data.task)
    per_step = training.global_batch * task.row_length(recipe)
    steps = training.steps
    if training.tokens is not None:
        steps = math.ceil(training.tokens / per_step)
    length = next(
        f"{value:g} {name}" if name != "tokens" else f"{value:,} tokens"
        for name in LENGTHS
        if (value := getattr(training, name)) is not None
    )
    total, trainable = _count(model)
    return Summary(
        name=recipe.name,
        model=recipe.model.architecture or str(recipe.model.from_),
        parameters=total,
        trainable_parameters=trainable,
        world=world,
        accumulation=training.accumulation(world),
        unit=task.unit,
        per_step=per_step,
        steps=steps,
        length=length,
        precision=recipe.training.precision,
        precision_asked=asked,
        precision_price=precision_price(recipe),
    )


@contextlib.contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(str(error))


# ---------------------------------------------------------------------------- files and machine


def _check_data(recipe: Recipe, fresh: bool) -> list[str]:
    from .data.prepared import PreparedData
    from .data.processor import processor_class
    from .data.sources import check_sources

    problems: list[str] = []
    if not fresh:
        with contextlib.suppress(UserError):
            if PreparedData.open(Run(recipe.output).data).fits(recipe):
                return []
    with _collect(problems):
        check_sources(recipe.data)
    with _collect(problems):
        processor_class(recipe.data.task).check(recipe)
    return problems


# ---------------------------------------------------------------------------------------- model


def _count(model: Any) -> tuple[int, int]:
    parameters = list(model.parameters())
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
