"""What every branch of the recipe is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ..files import expand
from ..reading import describe

PositiveInt = Annotated[int, Field(gt=0, le=10**12)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
SMALLEST_TEMPERATURE = 1e-3  # but for 0; logits divided by less are no numbers any more


def _printable(value: str) -> str:
    """What goes into commands, scripts and messages holds no line breaks and no NUL, and is a
    path that the system takes."""
    if not value.isprintable():
        raise ValueError(f"found {value!r}; control characters (a line break, NUL) are refused")
    parts = [len(part.encode(errors="replace")) for part in value.split("/")]
    if max(parts) > 255 or sum(parts) + len(parts) > 4000:
        raise ValueError(f"found {describe(value)}; a path has 255 bytes in a part, 4,000 in all")
    return value


# A path or a hub name; `~` and `$NAME` mean the same in all of them.
PathText = Annotated[str, AfterValidator(_printable), AfterValidator(expand)]


class Node(BaseModel):
    """A branch of the recipe: unknown keys refused, no silent conversions ("8" is not 8)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Variant(Node):
    """A branch whose `name` says of which class it is, each with fields and defaults of its own.

    A family's base class says which there are; a field is annotated `SerializeAsAny[base]`. The
    class is chosen by hand, since pydantic's tagged unions put the tag into every error's place.
    """

    name: str

    @classmethod
    def variants(cls) -> Mapping[str, type[Self]]:
        """The family's classes by name; the first one is meant where no name is given."""
        raise NotImplementedError

    @classmethod
    def chosen(cls, values: Any) -> type[Self] | None:
        """The class that plain data stand for; None: its name is none of them."""
        family = cls.variants()
        name = values.get("name", next(iter(family))) if isinstance(values, dict) else None
        return family.get(name) if isinstance(name, str) else None

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            return handler(values)
        if cls not in cls.variants().values():
            chosen = cls.chosen(values)
            if chosen is None:
                problem: Any = {"type": "literal_error", "loc": ("name",), "input": values["name"]}
                problem["ctx"] = {"expected": ", ".join(cls.variants())}
                raise ValidationError.from_exception_data(cls.__name__, [problem])
            return chosen.model_validate(values)
        # What is null is left out; and what other classes of the family have may be null here,
        # as in the recipes that runs before this one kept.
        known = {key for other in cls.variants().values() for key in other.model_fields}
        return handler({k: v for k, v in values.items() if v is not None or k not in known})

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        if cls in cls.variants().values():
            return handler(core_schema)
        options = [handler(option.__pydantic_core_schema__) for option in cls.variants().values()]
        for option in options[1:]:  # without a name it is the first one
            option["required"] = ["name", *option.get("required", [])]
        return {"oneOf": options, "discriminator": {"propertyName": "name"}}
