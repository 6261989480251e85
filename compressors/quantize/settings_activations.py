"""The settings of rounded activations. No torch here."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from modelzip.compressors.settings import MethodSettings

STAGE: Final = frozenset({"activations", "activation_scales"})
"""What rules can't change: engines know one way of rounding inputs for all linears."""


class ActivationSettings(MethodSettings):
    """What methods share that may round what flows into the linears, too."""

    activations: Literal["none", "int8", "fp8"] = Field(
        default="none",
        description="What inputs of linears are rounded to as the model runs; int8: integers of 8 bits, fp8: floats "
        "E4M3.",
    )
    activation_scales: Literal["dynamic", "static"] = Field(
        default="dynamic",
        description="Of rounded activations; dynamic: a scale for each token as it comes, static: one for each linear, "
        "from the largest magnitude in the calibration text.",
    )

    @model_validator(mode="after")
    def _activations_agree(self) -> Self:
        if self.activations == "none":
            if self.activation_scales != "dynamic":
                raise ValueError("activation_scales does nothing without activations: take int8 or fp8 for these")
            return self
        if getattr(self, "embeddings", False):
            raise ValueError("embeddings have no activations to round: leave embeddings or activations out")
        if getattr(self, "is_open", False):
            raise ValueError("bits are chosen for exact activations: give bits, or leave activations out")
        return self
