"""The settings of the quantization methods: ranges, defaults, citation and a sample stage. No torch here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from modelzip.compressors.settings import MethodSettings

GroupSize = Annotated[int, Field(ge=1)] | Literal["channel", "tensor"]


class QuantizeSettings(MethodSettings):
    """What all methods share that write integers on an affine grid."""

    whole_stage: ClassVar[frozenset[str]] = frozenset({"method", "layout", "propagate", "embeddings"})

    method: str = Field(description="Name of the method.")
    bits: int = Field(default=4, ge=2, le=8, description="Bits of one stored weight.")
    group_size: GroupSize = Field(
        default=128,
        description="Columns that share one scale; channel: one scale a row; tensor: one scale a matrix.",
    )
    symmetric: bool = Field(
        default=True,
        description="Grid symmetric around zero; off, every group also has a zero point.",
        json_schema_extra={"negative": "asymmetric"},
    )
    clip: Literal["none", "mse"] = Field(
        default="mse",
        description="Range of the grid; mse: the one with the least squared error, none: from the smallest to the "
        "largest weight.",
    )
    layout: Literal["auto", "compressed-tensors", "modelzip"] = Field(
        default="auto",
        description="Layout of the output; auto: compressed-tensors where it holds the result, else modelzip.",
    )
    embeddings: bool = Field(
        default=False,
        description="Also round the tables of embeddings, and a head that is tied to one; needs modelzip's layout.",
    )
    strict_groups: bool = Field(
        default=False,
        description="Stop where group_size doesn't divide a matrix's columns; off, the largest group that fits is "
        "taken and reported.",
    )

    @property
    def label(self) -> str:
        """Method and bits, such as gptq-4bit."""
        return f"{self.method}-{self.bits}bit"


class Rtn(QuantizeSettings):
    """Round to nearest: each weight to the closest value of its group's grid."""

    summary: ClassVar[str] = "Round every weight to the nearest grid value; needs no data."
    citation: ClassVar[str] = 'Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.2'
    example: ClassVar[str] = "- quantize: {method: rtn, bits: 8, group_size: channel}"

    method: Literal["rtn"] = Field(default="rtn", description="Name of the method.")


class Gptq(QuantizeSettings):
    """GPTQ: column by column, each column's error spread over the columns still to come."""

    summary: ClassVar[str] = "Round column by column and make up for each error in the columns still to come."
    citation: ClassVar[str] = (
        'Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"'
    )
    example: ClassVar[str] = (
        '- quantize:\n    method: gptq\n    bits: 4\n    group_size: 64\n    rules: [{match: "*.down_proj", bits: 8}]'
    )

    method: Literal["gptq"] = Field(default="gptq", description="Name of the method.")
    order: Literal["activation", "none"] = Field(
        default="activation",
        description="Order of the columns; activation: those with the largest inputs first, none: as they are.",
    )
    block_size: int = Field(
        default=128, ge=1, description="Columns worked on before the rest of the matrix is updated."
    )
    damping: float = Field(
        default=0.01, gt=0, lt=1, description="Share of the Hessian's mean diagonal that is added to its diagonal."
    )
    max_damping: float = Field(
        default=1.0, gt=0, le=10, description="Last damping that is tried when the Hessian can't be factored."
    )
    propagate: Literal["compressed", "original"] = Field(
        default="compressed", description="Which output of a block is the next block's calibration input."
    )

    @model_validator(mode="after")
    def _ladder_goes_up(self) -> Self:
        if self.max_damping < self.damping:
            raise ValueError(f"max_damping ({self.max_damping}) must not be less than damping ({self.damping})")
        return self
