"""The settings of the pruning methods: ranges, defaults, citation and a sample stage. No torch here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from modelzip.compressors.settings import MethodSettings

Sparsity = Annotated[float, Field(gt=0, lt=1)] | Literal["2:4", "4:8"]


class PruneSettings(MethodSettings):
    """What all methods share that set single weights to zero."""

    whole_stage: ClassVar[frozenset[str]] = frozenset({"method", "propagate"})

    method: str = Field(description="Name of the method.")
    sparsity: Sparsity = Field(
        default=0.5, description="Share of the weights that become zero, or so many kept of so many in a row: 2:4, 4:8."
    )

    @property
    def label(self) -> str:
        """Method and sparsity, such as sparsegpt-50 or wanda-2of4."""
        share = self.sparsity
        return f"{self.method}-{share.replace(':', 'of') if isinstance(share, str) else format(100 * share, 'g')}"


class Magnitude(PruneSettings):
    """The smallest weights become zero."""

    summary: ClassVar[str] = "Set the smallest weights to zero; needs no data."
    citation: ClassVar[str] = 'Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"'
    example: ClassVar[str] = "- prune: {method: magnitude, sparsity: 0.5}"

    method: Literal["magnitude"] = Field(default="magnitude", description="Name of the method.")
