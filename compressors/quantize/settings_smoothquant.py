"""The settings of SmoothQuant. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from modelzip.compressors.settings import CalibratedSettings

from .settings import QuantizeSettings
from .settings_activations import STAGE, ActivationSettings


class SmoothQuant(ActivationSettings, CalibratedSettings, QuantizeSettings):
    """SmoothQuant: part of what makes activations hard to round is moved to the weights, then both have 8 bits."""

    summary: ClassVar[str] = "Weights and activations of 8 bits; scales move from activations to weights first."
    citation: ClassVar[str] = (
        'Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"'
    )
    example: ClassVar[str] = "- quantize: {method: smoothquant, alpha: 0.5}"

    whole_stage: ClassVar[frozenset[str]] = QuantizeSettings.whole_stage | STAGE | {"alpha"}

    method: Literal["smoothquant"] = Field(default="smoothquant", description="Name of the method.")
    bits: int = Field(default=8, ge=8, le=8, description="Bits of one stored weight, and of activations.")
    group_size: Literal["channel"] = Field(default="channel", description="What shares a scale: a row.")
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="How much of the difficulty is moved from activations to weights; 0: none, 1: all of it.",
    )

    activations: Literal["int8", "fp8"] = Field(
        default="int8",
        description="What weights and inputs of linears are rounded to; int8: integers of 8 bits, fp8: floats E4M3.",
    )

    @property
    def label(self) -> str:
        """Method and bits of weights and activations."""
        return f"{self.method}-{'w8a8' if self.activations == 'int8' else 'fp8'}"
