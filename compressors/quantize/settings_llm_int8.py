"""The settings of LLM.int8(). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from .settings import QuantizeSettings


class LlmInt8(QuantizeSettings):
    """LLM.int8(): 8-bit weights and activations, except for input columns with large values, which stay exact."""

    summary: ClassVar[str] = "Weights and activations of 8 bits; input columns with large values stay exact."
    citation: ClassVar[str] = (
        'Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"'
    )
    example: ClassVar[str] = "- quantize: {method: llm-int8, threshold: 6}"

    method: Literal["llm-int8"] = Field(default="llm-int8", description="Name of the method.")
    bits: int = Field(default=8, ge=8, le=8, description="Bits of one stored weight, and of activations.")
    group_size: Literal["channel"] = Field(default="channel", description="What shares a scale: a row.")
    threshold: float = Field(
        default=6.0,
        gt=0,
        description="An input column in which any magnitude reaches this stays exact in that product.",
    )

    @model_validator(mode="after")
    def _own_layout(self) -> Self:
        if self.layout == "compressed-tensors":
            raise ValueError("llm-int8 needs modelzip's layout, for inputs that stay exact: leave layout out")
        if self.embeddings:
            raise ValueError("llm-int8 rounds no embeddings, which have no activations: leave embeddings out")
        return self

    @property
    def label(self) -> str:
        """The method, whose bits are in its name."""
        return self.method
