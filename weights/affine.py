"""Integers on an affine grid: value = (code - zero point) * scale, with one scale for each group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from modelzip.kernels.affine_linear import affine_linear

from .scales import GroupScales, empty_words, pack_codes, unpack_codes
from .value import payload, shape_of


@dataclass(frozen=True)
class Affine:
    """A matrix [out, in] of `bits`-bit integer codes with scales, and zero points where the grid is asymmetric.

    packed: int32 words [out, words], codes offset to be unsigned (see `modelzip.kernels.bitpack`).
    scale: [out, groups], or [1, 1] for one scale a tensor; its dtype is the precision of the products.
    zero_point: int8, the shape of scale, in the signed range of the codes; None if symmetric.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    shape: tuple[int, int]

    kind: ClassVar[str] = "affine"

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int) -> Affine:
        """Pack signed codes [out, in], whole numbers of any dtype in -2**(bits-1) ... 2**(bits-1)-1."""
        return cls(pack_codes(codes, bits), scale, zero_point, bits, (codes.shape[0], codes.shape[1]))

    @property
    def scales(self) -> GroupScales:
        """What turns the codes into values."""
        return GroupScales(self.scale, self.zero_point, self.bits, self.shape)

    @property
    def group_size(self) -> int:
        """Columns that share one scale."""
        return self.scales.group_size

    @property
    def strategy(self) -> str:
        """`tensor`, `channel` or `group`: what shares one scale."""
        return self.scales.strategy

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def codes(self) -> Tensor:
        """The signed codes, int8 [out, in]."""
        return unpack_codes(self.packed, self.bits, self.shape[1])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for, computed in the scale's dtype as the runtimes do, then cast."""
        return self.scales.values(self.codes()).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]; only these rows are decoded."""
        flat = index.reshape(-1)
        codes = unpack_codes(self.packed[flat], self.bits, self.shape[1])
        return self.scales.rows(flat).values(codes).to(dtype).reshape(*index.shape, self.shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype."""
        return affine_linear(
            x, self.packed, self.scale, zero_point=self.zero_point, bits=self.bits, columns=self.shape[1]
        )

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors, under the suffixes of compressed-tensors' `pack-quantized` layout."""
        return {"weight_packed": self.packed, "weight_shape": torch.tensor(self.shape), **self.scales.tensors()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Affine:
        """Read back what `tensors` gave, bit for bit. Of meta, only `bits` is needed; without `shape`, the shape is
        that of `weight_shape`, as in files of compressed-tensors.

        Raises KeyError if a tensor is missing.
        """
        rows, columns = shape_of(meta) if "shape" in meta else (int(size) for size in tensors["weight_shape"])
        scales = GroupScales.from_tensors(tensors, bits=int(meta["bits"]), shape=(rows, columns))
        return cls(tensors["weight_packed"], scales.scale, scales.zero_point, scales.bits, scales.shape)

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, bits, strategy, group_size (None unless groups share a scale), symmetric, dtype."""
        return {"kind": self.kind, "shape": list(self.shape), **self.scales.meta()}

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Affine:
        """A weight of this shape and grid on the meta device."""
        rows, columns = shape_of(meta)
        scales = GroupScales.empty(meta, (rows, columns))
        return cls(
            empty_words(rows, columns, scales.bits), scales.scale, scales.zero_point, scales.bits, (rows, columns)
        )
