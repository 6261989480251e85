"""The settings of the quantization methods: ranges, defaults, citation and a sample stage. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from modelzip.compressors.settings import DampedSettings, GridSettings, GroupSettings

from .settings_activations import STAGE, ActivationSettings
from .settings_budget import BudgetSettings
from .settings_grids import BITS, Grid, disagreement, settled, unsettled


class QuantizeSettings(GroupSettings):
    """What all methods share that write few bits a weight."""

    whole_stage: ClassVar[frozenset[str]] = frozenset(
        {"method", "layout", "propagate", "embeddings", "rotate", "kv_cache"}
    )

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
    rotate: Literal["none", "heads", "residual", "all"] = Field(
        default="none",
        description="First turn what flows between modules by random Hadamard matrices, folded into the weights on "
        "both sides; heads: the values of attention, residual: what all blocks read and write (models with RMSNorm; a "
        "tied output head gets a matrix of its own), all: both.",
    )
    kv_cache: Literal["none", "fp8", "int8", "int4"] = Field(
        default="none",
        description="Round keys and values as they go into the cache, by scales found on the calibration text; fp8: "
        "8-bit floats E4M3, one scale for a layer's keys and one for its values; int8, int4: integers, scales of each "
        "head.",
    )

    @property
    def label(self) -> str:
        """Method and bits, such as gptq-4bit."""
        return f"{self.method}-{self.bits}bit"


class OnGrid(ActivationSettings, BudgetSettings, QuantizeSettings, GridSettings):
    """What methods share that round to any grid."""

    whole_stage: ClassVar[frozenset[str]] = BudgetSettings.whole_stage | STAGE

    bits: int = Field(
        default=4,
        ge=1,
        le=8,
        description="Bits of one stored weight.",
        json_schema_extra={"allowed": "2 to 8, or 1 on the grid binary"},
    )
    grid: Grid = Field(
        default="int",
        description="Where values may lie; int: evenly; nf: NormalFloat, quantiles of a normal distribution (NF4 of 4 "
        "bits); af: AbnormalFloat, of least absolute error for the group's size; fp4: 4-bit floats E2M1; kmeans: "
        "a table of its own for each row (group_size channel) or matrix (tensor); binary: -1 and 1; ternary: -1, 0 "
        "and 1; fp8-e4m3, fp8-e5m2: 8-bit floats; mxfp4, nvfp4: 4-bit floats in blocks of 32 and 16 with scales of a "
        "byte.",
    )

    @model_validator(mode="before")
    @classmethod
    def _what_the_grid_settles(cls, data: Any) -> Any:
        return settled(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _grid_agrees(self) -> Self:
        grid, bits, clip = self.grid, self.bits, self.clip
        wrong = disagreement(grid, bits=bits, group_size=self.group_size, symmetric=self.symmetric, clip=clip)
        if wrong is None and self.is_open and grid in BITS:
            wrong = f"the grid {grid} has {BITS[grid]} bits and leaves nothing to choose: leave the target out"
        if wrong is not None:
            raise ValueError(wrong)
        return self

    @classmethod
    def overlaid(cls, data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """As of all settings; what a grid has settled goes where another one is named."""
        grid = overrides.get("grid")
        changed = grid is not None and grid != data.get("grid", "int")
        return super().overlaid(unsettled(data, str(grid)) if changed else data, overrides)

    @property
    def label(self) -> str:
        """Method, grid, bits and activations, such as gptq-4bit, rtn-nf-4bit, rtn-mxfp4 and rtn-8bit-int8-inputs."""
        grid = () if self.grid == "int" else (self.grid,)
        bits = () if self.grid in BITS else (self.asked,)
        inputs = () if self.activations == "none" else (f"{self.activations}-inputs",)
        return "-".join([self.method, *grid, *bits, *inputs])


class Rtn(OnGrid):
    """Round to nearest: each weight to the closest value of its group's grid."""

    summary: ClassVar[str] = "Round every weight to the nearest grid value; needs no data."
    citation: ClassVar[str] = 'Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.2'
    example: ClassVar[str] = "- quantize: {method: rtn, bits: 8, group_size: channel}"

    method: Literal["rtn"] = Field(default="rtn", description="Name of the method.")


class Hqq(BudgetSettings, QuantizeSettings):
    """Half-quadratic quantization: evenly spaced values with an offset that serves most weights, found without data."""

    summary: ClassVar[str] = (
        "Fit each group's offset to most of its weights, leaving the error to a few; needs no data."
    )
    citation: ClassVar[str] = 'Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"'
    example: ClassVar[str] = "- quantize: {method: hqq, bits: 4, group_size: 64}"

    method: Literal["hqq"] = Field(default="hqq", description="Name of the method.")
    group_size: Annotated[int, Field(ge=1)] | Literal["channel"] = Field(
        default=64,
        description="Rows or columns, see group_along, that share one scale and one offset; channel: all of them.",
    )
    group_along: Literal["rows", "columns"] = Field(
        default="rows",
        description="What a group is of; rows: weights of one column, the source's axis 0; columns: of one row.",
    )
    norm: float = Field(default=0.7, gt=0, lt=2, description="p of the l_p norm of the error that is made small.")
    beta: float = Field(default=10.0, gt=0, description="How little errors are shrunk at first.")
    kappa: float = Field(default=1.01, ge=1, description="By how much beta grows a step.")
    steps: int = Field(default=20, ge=1, le=1000, description="Steps of the search.")

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a matrix [out, in] that share one scale."""
        axis = 0 if self.group_along == "rows" else 1
        size = shape[axis] if self.group_size == "channel" else self.group_size
        return (size, 1) if axis == 0 else (1, size)


class Gptq(DampedSettings, OnGrid):
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
