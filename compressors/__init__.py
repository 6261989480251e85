"""All methods: a family's table of names and settings classes, and their union. A new method is one line in each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import Field

from modelzip.compressors.distill.settings import DistillSettings, Labels
from modelzip.compressors.factorize.settings import FactorizeSettings, Svd
from modelzip.compressors.prune.settings import Magnitude, PruneSettings, Random, SparseGpt, Wanda
from modelzip.compressors.quantize.settings import Gptq, QuantizeSettings, Rtn

QUANTIZE: Final[Mapping[str, type[QuantizeSettings]]] = MappingProxyType({"rtn": Rtn, "gptq": Gptq})
QuantizeMethod = Annotated[Rtn | Gptq, Field(discriminator="method")]

PRUNE: Final[Mapping[str, type[PruneSettings]]] = MappingProxyType(
    {"random": Random, "magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGpt}
)
PruneMethod = Annotated[Random | Magnitude | Wanda | SparseGpt, Field(discriminator="method")]

FACTORIZE: Final[Mapping[str, type[FactorizeSettings]]] = MappingProxyType({"svd": Svd})
FactorizeMethod = Svd

DISTILL: Final[Mapping[str, type[DistillSettings]]] = MappingProxyType({"labels": Labels})
DistillMethod = Labels
