"""What every method's settings class has: strict frozen fields, one line of summary, a citation and a sample stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Engine: TypeAlias = Literal["layerwise", "structural", "training"]


class MethodSettings(BaseModel):
    """The settings of one method. Recipes, options, `modelzip methods` and the JSON schema are all made from these.

    Every field has a description. A field's `json_schema_extra` may hold `allowed` (a sentence part that says which
    values are taken, where types and ranges don't) and `negative` (what a switch is called when it is off).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, allow_inf_nan=False)

    engine: ClassVar[Engine] = "layerwise"
    """layerwise: one matrix after the other; structural: a smaller ordinary model; training: with gradients."""
    summary: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    example: ClassVar[str] = ""
    whole_stage: ClassVar[frozenset[str]] = frozenset({"method"})
    """Fields that a rule can't change for some modules only."""
    alternatives: ClassVar[tuple[str, ...]] = ()
    """Fields of which one takes the place of the others."""

    method: str = Field(default="", description="Name of the method.")

    @classmethod
    def overlaid(cls, data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a stage as plain data, with those of a rule or of options on top.

        One of the `alternatives` takes the place of whichever the stage has.
        """
        if all(overrides.get(name) is None for name in cls.alternatives):
            return {**data, **overrides}
        return {**{name: value for name, value in data.items() if name not in cls.alternatives}, **overrides}

    @property
    def label(self) -> str:
        """What an output folder's name says of this stage."""
        return self.method
