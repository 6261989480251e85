"""All methods: a family's table of names and settings classes, and their union. A new method is one line in each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import Field

from modelzip.compressors.distill.settings import DistillSettings, Labels, Logits
from modelzip.compressors.factorize.settings import FactorizeSettings, Svd
from modelzip.compressors.prune.settings import Magnitude
from modelzip.compressors.quantize.settings import Gptq, QuantizeSettings, Rtn
from modelzip.compressors.settings import MethodSettings

QUANTIZE: Final[Mapping[str, type[QuantizeSettings]]] = MappingProxyType({"rtn": Rtn, "gptq": Gptq})
QuantizeMethod = Annotated[Rtn | Gptq, Field(discriminator="method")]

PRUNE: Final[Mapping[str, type[MethodSettings]]] = MappingProxyType({"magnitude": Magnitude})
PruneMethod = Magnitude

FACTORIZE: Final[Mapping[str, type[FactorizeSettings]]] = MappingProxyType({"svd": Svd})
FactorizeMethod = Svd

DISTILL: Final[Mapping[str, type[DistillSettings]]] = MappingProxyType({"labels": Labels, "logits": Logits})
DistillMethod = Annotated[Labels | Logits, Field(discriminator="method")]
