"""What every compressed weight can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor


class CompressedWeight(Protocol):
    """What is left of a matrix [out, in]: an immutable value, whatever its kind."""

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix it stands for."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype."""

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors, by suffix; each begins with `weight`."""

    def meta(self) -> dict[str, Any]:
        """Plain data for config.json, `kind` and `shape` among them: all that `from_tensors` and `empty` must know."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Self:
        """A value of this kind on the meta device: right in shapes and dtypes, and so in `nbytes`."""
