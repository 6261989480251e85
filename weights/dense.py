"""A plain matrix: a factor of other weights, and what is left of a linear that lost rows or columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .value import dtype_name, named_dtype, shape_of


@dataclass(frozen=True)
class Dense:
    """weight: [out, in], of a floating dtype."""

    weight: Tensor

    kind: ClassVar[str] = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix as it is stored."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.weight.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in], cast."""
        return self.weight.to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]."""
        return self.weight[index].to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype."""
        return x @ self.weight.to(x.dtype).T

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""
        return {"weight": self.weight}

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, dtype."""
        return {"kind": self.kind, "shape": list(self.shape), "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Dense:
        """Read back what `tensors` gave. Raises KeyError if the tensor is missing."""
        return cls(tensors["weight"])

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Dense:
        """A matrix of this shape and dtype on the meta device."""
        return cls(torch.empty(shape_of(meta), dtype=named_dtype(meta["dtype"]), device="meta"))
