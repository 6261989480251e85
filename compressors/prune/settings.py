"""The settings of the pruning methods: ranges, defaults, citation and a sample stage. No torch here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from modelzip.compressors.settings import CalibratedSettings, DampedSettings, GridSettings, MethodSettings

Sparsity = Annotated[float, Field(gt=0, lt=1)] | Literal["2:4", "4:8"]


class SparsitySettings(MethodSettings):
    """How many single weights become zero."""

    sparsity: Sparsity = Field(
        default=0.5, description="Share of the weights that become zero, or so many kept of so many in a row: 2:4, 4:8."
    )


class PruneSettings(GridSettings, SparsitySettings):
    """What all methods share that set single weights to zero."""

    whole_stage: ClassVar[frozenset[str]] = frozenset({"method", "propagate"})

    method: str = Field(description="Name of the method.")
    bits: Annotated[int, Field(ge=2, le=8)] | None = Field(
        default=None, description="Bits of one kept weight, on the grid that the other settings name; without, floats."
    )

    @property
    def label(self) -> str:
        """Method, sparsity and bits, such as sparsegpt-50, wanda-2of4 or sparsegpt-50-4bit."""
        share = self.sparsity
        told = share.replace(":", "of") if isinstance(share, str) else format(100 * share, "g")
        return f"{self.method}-{told}" + (f"-{self.bits}bit" if self.bits else "")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) if n of each m columns in a row are kept."""
        if not isinstance(self.sparsity, str):
            return None
        most, wide = self.sparsity.split(":")
        return int(most), int(wide)


class Random(PruneSettings):
    """Weights picked by chance become zero."""

    summary: ClassVar[str] = "Set weights to zero by chance: the baseline that every other method must beat."
    citation: ClassVar[str] = 'Blalock et al. 2020, "What is the State of Neural Network Pruning?", section 7.2'
    example: ClassVar[str] = "- prune: {method: random, sparsity: 0.1}"

    method: Literal["random"] = Field(default="random", description="Name of the method.")


class Magnitude(PruneSettings):
    """The smallest weights become zero."""

    summary: ClassVar[str] = "Set the smallest weights to zero; needs no data."
    citation: ClassVar[str] = 'Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"'
    example: ClassVar[str] = "- prune: {method: magnitude, sparsity: 0.5}"

    method: Literal["magnitude"] = Field(default="magnitude", description="Name of the method.")
    scope: Literal["local", "global"] = Field(
        default="local",
        description="What is compared; local: the weights of one matrix, global: those of all matrices of the stage.",
    )

    @model_validator(mode="after")
    def _a_pattern_is_local(self) -> Self:
        if self.scope == "global" and self.pattern:
            raise ValueError(f"scope global needs a share of the weights as sparsity, not {self.sparsity}")
        return self


class Wanda(CalibratedSettings, PruneSettings):
    """The weights become zero that add least to the outputs by themselves."""

    summary: ClassVar[str] = "Set the weights to zero whose size times the size of their input is smallest in a row."
    citation: ClassVar[str] = 'Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models"'
    example: ClassVar[str] = "- prune: {method: wanda, sparsity: 0.5}"

    method: Literal["wanda"] = Field(default="wanda", description="Name of the method.")


class SparseGpt(DampedSettings, PruneSettings):
    """SparseGPT: column by column, what each column loses spread over the columns still to come."""

    summary: ClassVar[str] = "Prune column by column and make up for each loss in the columns still to come."
    citation: ClassVar[str] = (
        'Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"'
    )
    example: ClassVar[str] = '- prune:\n    method: sparsegpt\n    sparsity: "2:4"\n    bits: 4\n    group_size: 64'

    method: Literal["sparsegpt"] = Field(default="sparsegpt", description="Name of the method.")
    threshold: Literal["matrix", "block"] = Field(
        default="matrix",
        description="Where a share is counted; matrix: over all columns still to come, block: in each block alone.",
    )
    order: Literal["auto", "rising", "activation", "none"] = Field(
        default="auto",
        description="Order of the columns; rising: those with the smallest inputs first, activation: with the largest, "
        "none: as they are, auto: activation for 2:4, 4:8 and bits, else rising, or none with threshold block.",
    )
    block_size: int = Field(
        default=128, ge=1, description="Columns whose weights are chosen and worked on before the rest is updated."
    )

    @model_validator(mode="after")
    def _blocks_hold_whole_groups(self) -> Self:
        if self.pattern and self.block_size % self.pattern[1]:
            raise ValueError(
                f"block_size ({self.block_size}) must be a multiple of {self.pattern[1]} with {self.sparsity}"
            )
        return self

    @property
    def columns_order(self) -> str:
        """The order, decided: a share goes from little to much use, groups and grids the other way round."""
        if self.order != "auto":
            return self.order
        if self.threshold == "block" and not self.pattern:
            return "none"
        return "activation" if self.pattern or self.bits else "rising"
