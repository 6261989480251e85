"""The settings of QUIK. No torch here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from modelzip.compressors.settings import DampedSettings

from .settings import QuantizeSettings


class Quik(DampedSettings, QuantizeSettings):
    """QUIK: weights and activations of 4 bits, with the columns exact that meet the largest inputs."""

    summary: ClassVar[str] = "Weights and activations of 4 bits; columns with the largest inputs stay exact."
    citation: ClassVar[str] = (
        'Ashkboos et al. 2023, "QUIK: Towards End-to-End 4-Bit Inference on Generative Large Language Models"'
    )
    example: ClassVar[str] = (
        '- quantize:\n    method: quik\n    outliers: 0.0625\n    rules: [{match: "*.down_proj", bits: 8}]'
    )

    method: Literal["quik"] = Field(default="quik", description="Name of the method.")
    bits: int = Field(
        default=4, ge=2, le=8, description="Bits of one stored weight outside the exact columns, and of activations."
    )
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = Field(
        default=None, description="Bits of activations outside the exact columns, if not those of weights."
    )
    group_size: Literal["channel"] = Field(default="channel", description="What shares a scale: a row.")
    outliers: float = Field(
        default=0.0625,
        ge=0,
        le=0.5,
        description="Share of each matrix's columns that stays exact: those with the largest inputs in the calibration "
        "text.",
    )
    clip: Literal["none", "mse"] = Field(
        default="mse",
        description="Range of a row's grid; mse: the one with the least squared error, none: up to the largest weight.",
    )
    order: Literal["activation", "none"] = Field(
        default="activation",
        description="Order of the columns to be rounded; activation: those with the largest inputs first, none: as "
        "they are.",
    )
    block_size: int = Field(
        default=128, ge=1, description="Columns worked on before the rest of the matrix is updated."
    )

    @model_validator(mode="after")
    def _own_layout(self) -> Self:
        if self.layout == "compressed-tensors":
            raise ValueError("quik needs modelzip's layout, for columns that stay exact: leave layout out")
        if self.embeddings:
            raise ValueError("quik rounds no embeddings, which have no activations: leave embeddings out")
        return self

    @property
    def input_bits(self) -> int:
        """Bits of one activation."""
        return self.bits if self.activation_bits is None else self.activation_bits

    def count(self, columns: int) -> int:
        """Exact columns of so many."""
        return round(self.outliers * columns)

    @property
    def label(self) -> str:
        """Method and bits of weights and activations."""
        return f"{self.method}-w{self.bits}a{self.input_bits}"
