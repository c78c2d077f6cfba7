"""What settings are made of: a frozen section, number types, and the marker for settings free to change on resume."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

RUNNING = "running"


def _no_bool(value: Any) -> Any:
    """YAML's yes and true would pass for 1."""
    if isinstance(value, bool):
        raise ValueError("a number is expected here, not true or false")
    return value


Number = BeforeValidator(_no_bool)
Fraction = Annotated[float, Number, Field(ge=0, le=1)]
Positive = Annotated[float, Number, Field(gt=0)]
NotNegative = Annotated[float, Number, Field(ge=0)]
Count = Annotated[int, Number, Field(ge=1, lt=2**63)]  # as torch counts
Side = Annotated[int, Number, Field(ge=1, le=2**14)]  # of a view, in pixels: more than any network here is given
Natural = Annotated[int, Number, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def running(default: Any, **kwargs: Any) -> Any:
    """A field that may change between a run and its continuation."""
    return Field(default, json_schema_extra={RUNNING: True}, **kwargs)
