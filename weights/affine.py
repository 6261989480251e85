"""Integers on an affine grid: value = (code - zero point) * scale, with one scale for each group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelzip.kernels.bitpack import pack, unpack


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

    kind = "affine"

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int) -> Affine:
        """Pack signed codes [out, in], whole numbers of any dtype in -2**(bits-1) ... 2**(bits-1)-1."""
        return cls(pack(_unsigned(codes, bits), bits), scale, zero_point, bits, (codes.shape[0], codes.shape[1]))

    @property
    def group_size(self) -> int:
        """Columns that share one scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def strategy(self) -> str:
        """`tensor`, `channel` or `group`: what shares one scale."""
        if self.scale.numel() == 1 and self.shape[0] > 1:
            return "tensor"
        return "channel" if self.scale.shape[1] == 1 else "group"

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def codes(self) -> Tensor:
        """The signed codes, int8 [out, in]."""
        return _signed(unpack(self.packed, self.bits, self.shape[1]), self.bits)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for, computed in the scale's dtype as the runtimes do, then cast."""
        rows, columns = self.shape
        codes = self.codes().to(self.scale.dtype).reshape(rows, self.scale.shape[1], -1)
        if self.zero_point is not None:
            codes = codes - self.zero_point.to(self.scale.dtype).unsqueeze(-1)
        return (codes * self.scale.unsqueeze(-1)).reshape(rows, columns).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype."""
        from modelzip.kernels.affine_linear import affine_linear

        return affine_linear(
            x, self.packed, self.scale, zero_point=self.zero_point, bits=self.bits, columns=self.shape[1]
        )

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors, under the suffixes of compressed-tensors' `pack-quantized` layout."""
        single = self.strategy == "tensor"
        out = {
            "weight_packed": self.packed,
            "weight_scale": self.scale.reshape(1) if single else self.scale,
            "weight_shape": torch.tensor(self.shape),
        }
        if self.zero_point is not None:
            out["weight_zero_point"] = self.zero_point.reshape(1) if single else _pack_rows(self.zero_point, self.bits)
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Affine:
        """Read back what `tensors` gave, bit for bit. meta: {"bits": int}.

        Raises KeyError if a tensor is missing.
        """
        bits = int(meta["bits"])
        rows, columns = (int(size) for size in tensors["weight_shape"])
        scale = tensors["weight_scale"]
        zero_point = tensors.get("weight_zero_point")
        if scale.numel() == 1 and scale.ndim < 2:
            scale = scale.reshape(1, 1)
            zero_point = None if zero_point is None else zero_point.reshape(1, 1).to(torch.int8)
        elif zero_point is not None:
            zero_point = _unpack_rows(zero_point, bits, rows)
        return cls(tensors["weight_packed"], scale, zero_point, bits, (rows, columns))

    def meta(self) -> dict[str, Any]:
        """What `from_tensors` must know beside the tensors."""
        return {"bits": self.bits}


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """-2**(bits-1) ... to uint8 0 ...; the sum wraps as it must."""
    return codes.to(torch.int8).view(torch.uint8) + (1 << (bits - 1))


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes - (1 << (bits - 1))).view(torch.int8)


def _pack_rows(zero_point: Tensor, bits: int) -> Tensor:
    """[out, groups] int8 -> [words, groups] int32: zero points are packed down the rows."""
    return pack(_unsigned(zero_point, bits).T, bits).T.contiguous()


def _unpack_rows(packed: Tensor, bits: int, rows: int) -> Tensor:
    return _signed(unpack(packed.T.contiguous(), bits, rows), bits).T.contiguous()
