"""The settings of the factorization methods: ranges, defaults, citation and a sample stage. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from modelzip.compressors.settings import MethodSettings


class FactorizeSettings(MethodSettings):
    """What all methods share that replace a matrix by a product of smaller ones."""

    whole_stage: ClassVar[frozenset[str]] = frozenset({"method", "propagate"})

    method: str = Field(description="Name of the method.")
    ratio: float = Field(
        default=0.8, gt=0, lt=1, description="Parameters that are left of each matrix, as a share of the dense ones."
    )

    @property
    def label(self) -> str:
        """Method and ratio, such as svd-80."""
        return f"{self.method}-{100 * self.ratio:g}"


class Svd(FactorizeSettings):
    """The best low-rank approximation of the weight."""

    summary: ClassVar[str] = "Replace a matrix by its best product of two thin ones; needs no data."
    citation: ClassVar[str] = 'Eckart & Young 1936, "The Approximation of One Matrix by Another of Lower Rank"'
    example: ClassVar[str] = "- factorize: {method: svd, ratio: 0.8}"

    method: Literal["svd"] = Field(default="svd", description="Name of the method.")
