"""The settings of the quantization methods: ranges, defaults, citation and a sample stage. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from modelzip.compressors.settings import DampedSettings, GridSettings


class QuantizeSettings(GridSettings):
    """What all methods share that write integers on an affine grid."""

    whole_stage: ClassVar[frozenset[str]] = frozenset({"method", "layout", "propagate", "embeddings"})

    method: str = Field(description="Name of the method.")
    bits: int = Field(default=4, ge=2, le=8, description="Bits of one stored weight.")
    layout: Literal["auto", "compressed-tensors", "modelzip"] = Field(
        default="auto",
        description="Layout of the output; auto: compressed-tensors where it holds the result, else modelzip.",
    )
    embeddings: bool = Field(
        default=False,
        description="Also round what lies outside the blocks: the tables of embeddings, a head that is tied to one, a "
        "pooler; needs modelzip's layout.",
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


class Gptq(DampedSettings, QuantizeSettings):
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
