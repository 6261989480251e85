"""A compressed matrix whose inputs are rounded to 8 bits before they are multiplied with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeAlias

import torch
from torch import Tensor

from .affine import Affine
from .codebook import Codebook
from .float import Float
from .inputs import InputRounding
from .value import payload

Inner: TypeAlias = Affine | Codebook | Float

_INNER: Final[Mapping[str, type[Inner]]] = MappingProxyType({kind.kind: kind for kind in (Affine, Codebook, Float)})


@dataclass(frozen=True)
class RoundedInputs:
    """`inner`, multiplied with inputs as `inputs` rounds them."""

    inner: Inner
    inputs: InputRounding

    kind: ClassVar[str] = "rounded_inputs"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the inner matrix."""
        return self.inner.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def round_inputs(self, x: Tensor) -> Tensor:
        """x [..., in] as it is multiplied."""
        return self.inputs.rounded(x)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for."""
        return self.inner.dense(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]."""
        return self.inner.rows(index, dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in], rounded, @ dense().T -> [..., out], in x's dtype."""
        return self.inner.matmul(self.inputs.rounded(x))

    def tensors(self) -> dict[str, Tensor]:
        """Those of inner, and the scale of the inputs if they have one."""
        return {**self.inner.tensors(), **self.inputs.tensors()}

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, and the meta of inner and of the inputs."""
        own = {"kind": self.kind, "shape": list(self.shape)}
        return {**own, "inner": self.inner.meta(), "inputs": self.inputs.meta()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> RoundedInputs:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""
        inner = _inner(meta).from_tensors(tensors, meta["inner"])
        return cls(inner, InputRounding.from_tensors(tensors, meta["inputs"]))

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> RoundedInputs:
        """A weight of this inner kind on the meta device."""
        return cls(_inner(meta).empty(meta["inner"]), InputRounding.empty(meta["inputs"]))


def _inner(meta: Mapping[str, Any]) -> type[Inner]:
    """Raises ValueError for a kind whose inputs can't be rounded so."""
    kind = meta["inner"]["kind"]
    if kind not in _INNER:
        raise ValueError(f"rounded inputs of a weight of kind {kind!r}; it must be one of {', '.join(_INNER)}")
    return _INNER[kind]
