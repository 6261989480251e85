"""All layer-wise methods as the engine sees them, by the class of their settings, and what stands in for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from .factorize import methods as factorize
from .layer import LayerMethod
from .prune import methods as prune
from .quantize import methods as quantize
from .settings import MethodSettings

METHODS: Final[Mapping[type[MethodSettings], LayerMethod]] = MappingProxyType(
    dict([*quantize.METHODS.items(), *prune.METHODS.items(), *factorize.METHODS.items()])
)

FALLBACK: Final[Mapping[type[MethodSettings], Callable[[Any], MethodSettings]]] = MappingProxyType(
    {**quantize.FALLBACK, **prune.FALLBACK}
)
"""Where a method doesn't serve: from its settings those of a plainer one that always does."""

ON_TABLES: Final[Mapping[type[MethodSettings], Callable[[Any], MethodSettings]]] = MappingProxyType(
    {**FALLBACK, **quantize.ON_TABLES}
)
"""From a method's settings those that a table of embeddings is compressed with; the others take tables as they are."""
