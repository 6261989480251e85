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
    def dtype(self) -> torch.dtype:
        """Of stored values, or of the scales of stored codes: the precision that the matrix has."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for."""

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index], [..., in] for an index [...], without the rows that aren't asked for."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype."""

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors, by suffix; each begins with `weight` and holds no dot."""

    def meta(self) -> dict[str, Any]:
        """Plain data for config.json, `kind` and `shape` among them: all that `from_tensors` and `empty` must know."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Self:
        """A value of this kind on the meta device: right in shapes and dtypes, and so in `nbytes`."""


def payload(weight: CompressedWeight) -> int:
    """Bytes of all tensors of a weight."""
    return sum(tensor.nbytes for tensor in weight.tensors().values())


def dtype_name(dtype: torch.dtype) -> str:
    """As it stands in config.json: `float32`, `bfloat16`, ..."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """Undo `dtype_name`. Raises ValueError for a name that isn't a dtype's."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


def shape_of(meta: Mapping[str, Any]) -> tuple[int, int]:
    """(out, in) as `meta` has it, a list of two after a round trip through JSON."""
    rows, columns = meta["shape"]
    return int(rows), int(columns)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The precision in which factors are multiplied to give a matrix in `dtype`: fp32, or fp64 where that is asked."""
    return torch.promote_types(dtype, torch.float32)
