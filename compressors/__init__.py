"""All methods: a family's table of names and settings classes, and their union. A new method is one line in each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import Field

from modelzip.compressors.quantize.settings import Gptq, QuantizeSettings, Rtn

QUANTIZE: Final[Mapping[str, type[QuantizeSettings]]] = MappingProxyType({"rtn": Rtn, "gptq": Gptq})

QuantizeMethod = Annotated[Rtn | Gptq, Field(discriminator="method")]
