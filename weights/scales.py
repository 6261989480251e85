"""What turns integer codes into values: value = (code - zero point) * scale, one scale for each group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelzip.kernels.bitpack import pack, packed_words, unpack

from .value import dtype_name, named_dtype


@dataclass(frozen=True)
class GroupScales:
    """Scales, and zero points where the grid is asymmetric, of codes [out, in].

    scale: [out, groups], or [1, 1] for one scale a tensor; its dtype is the precision of the products.
    zero_point: int8, the shape of scale, in the signed range of the codes; None if symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None
    bits: int
    shape: tuple[int, int]

    @property
    def strategy(self) -> str:
        """`tensor`, `channel` or `group`: what shares one scale."""
        if self.scale.numel() == 1 and self.shape[0] > 1:
            return "tensor"
        return "channel" if self.scale.shape[1] == 1 else "group"

    @property
    def group_size(self) -> int:
        """Columns that share one scale."""
        return self.shape[1] // self.scale.shape[1]

    def values(self, codes: Tensor) -> Tensor:
        """Codes int8 [rows, in] -> values in the scale's dtype, as the runtimes compute them; rows as in `scale`."""
        grouped = codes.to(self.scale.dtype).reshape(codes.shape[0], self.scale.shape[1], -1)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.to(self.scale.dtype).unsqueeze(-1)
        return (grouped * self.scale.unsqueeze(-1)).reshape(codes.shape)

    def rows(self, index: Tensor) -> GroupScales:
        """Of codes [len(index), in], the rows of an index."""
        if self.scale.shape[0] == 1:
            return self
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return GroupScales(self.scale[index], zero_point, self.bits, (index.shape[0], self.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors, under the suffixes of compressed-tensors' `pack-quantized` layout."""
        single = self.strategy == "tensor"
        out = {"weight_scale": self.scale.reshape(1) if single else self.scale}
        if self.zero_point is not None:
            out["weight_zero_point"] = self.zero_point.reshape(1) if single else _pack_rows(self.zero_point, self.bits)
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, bits: int, shape: tuple[int, int]) -> GroupScales:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if the scale is missing."""
        scale = tensors["weight_scale"]
        zero_point = tensors.get("weight_zero_point")
        if scale.numel() == 1 and scale.ndim < 2:
            scale = scale.reshape(1, 1)
            zero_point = None if zero_point is None else zero_point.reshape(1, 1).to(torch.int8)
        elif zero_point is not None:
            zero_point = _unpack_rows(zero_point, bits, shape[0])
        return cls(scale, zero_point, bits, shape)

    def meta(self) -> dict[str, Any]:
        """Plain data: all that `empty` must know beside the shape. group_size is None unless groups share a scale."""
        return {
            "bits": self.bits,
            "strategy": self.strategy,
            "group_size": self.group_size if self.strategy == "group" else None,
            "symmetric": self.zero_point is None,
            "dtype": dtype_name(self.scale.dtype),
        }

    @classmethod
    def empty(cls, meta: Mapping[str, Any], shape: tuple[int, int]) -> GroupScales:
        """Scales on the meta device."""
        rows, columns = shape
        groups = columns // int(meta["group_size"]) if meta["strategy"] == "group" else 1
        size = (1, 1) if meta["strategy"] == "tensor" else (rows, groups)
        scale = torch.empty(size, dtype=named_dtype(meta["dtype"]), device="meta")
        zero_point = None if meta["symmetric"] else torch.empty(size, dtype=torch.int8, device="meta")
        return cls(scale, zero_point, int(meta["bits"]), shape)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [rows, columns], whole numbers of any dtype in -2**(bits-1) ... 2**(bits-1)-1, to int32 words.

    The sum to unsigned wraps as it must.
    """
    return pack(codes.to(torch.int8).view(torch.uint8) + (1 << (bits - 1)), bits)


def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_codes`: int8 [rows, columns]."""
    return (unpack(words, bits, columns) - (1 << (bits - 1))).view(torch.int8)


def empty_words(rows: int, columns: int, bits: int) -> Tensor:
    """Room for packed codes [rows, columns], on the meta device."""
    return torch.empty(rows, packed_words(columns, bits), dtype=torch.int32, device="meta")


def _pack_rows(zero_point: Tensor, bits: int) -> Tensor:
    """[out, groups] int8 -> [words, groups] int32: zero points are packed down the rows."""
    return pack_codes(zero_point.T, bits).T.contiguous()


def _unpack_rows(packed: Tensor, bits: int, rows: int) -> Tensor:
    return unpack_codes(packed.T.contiguous(), bits, rows).T.contiguous()
