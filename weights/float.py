"""Floats of 4 or 8 bits with scales: fp8, and the block formats mxfp4 and nvfp4, whose scales take a byte each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from modelzip.kernels.bitpack import unpack
from modelzip.kernels.table_linear import Values, table_linear, table_values

from .small_floats import SMALL_FLOATS, SmallFloat, power_of_two
from .value import dtype_name, named_dtype, payload, shape_of

BYTE_SCALES: Final = ("e8m0", "e4m3")
"""Scales of one byte: a power of two; an 8-bit float, which is divided by the one `global_scale` of the matrix."""


@dataclass(frozen=True)
class Float:
    """A matrix [out, in] of values element * scale, computed in fp32 and rounded to `dtype`.

    packed: uint8, the codes of `element` in rows: [out, in], or [out, in / 2] for those of 4 bits, of which the earlier
    is in the lower half of a byte. scale: [out, groups], or [1, 1] for one scale a tensor; uint8 if `scale_kind` is one
    of BYTE_SCALES, else of the dtype that it names. global_scale: of the scales e4m3, the bits of an fp32 number as
    int32 [1], so that no cast of a model to a narrower type can reach it; None for others.
    """

    packed: Tensor
    scale: Tensor
    global_scale: Tensor | None
    element: SmallFloat
    scale_kind: str
    shape: tuple[int, int]
    dtype: torch.dtype

    kind: ClassVar[str] = "float"

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        element: SmallFloat,
        *,
        dtype: torch.dtype,
        scale_kind: str | None = None,
        global_scale: Tensor | None = None,
    ) -> Float:
        """Pack codes uint8 [out, in]. scale_kind: None for scales that are plain numbers. global_scale: fp32 [1]."""
        packed = codes if element.bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
        found = None if global_scale is None else global_scale.reshape(1).view(torch.int32)
        kind = scale_kind or dtype_name(scale.dtype)
        return cls(packed.contiguous(), scale, found, element, kind, (codes.shape[0], codes.shape[1]), dtype)

    @property
    def strategy(self) -> str:
        """`tensor`, `channel` or `group`: what shares one scale."""
        if self.scale_kind in BYTE_SCALES:  # a format of its own, also where a row is one block
            return "group"
        if self.scale.numel() == 1 and self.shape[0] > 1:
            return "tensor"
        return "channel" if self.scale.shape[1] == 1 else "group"

    @property
    def group_size(self) -> int:
        """Columns that share one scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def codes(self) -> Tensor:
        """uint8 [out, in]."""
        return self._unpacked(self.packed)

    def scales(self) -> Tensor:
        """What the elements are multiplied by, fp32 [out, groups] or [1, 1]."""
        if self.scale_kind == "e8m0":
            return power_of_two(self.scale)
        if self.global_scale is None:
            return self.scale.float()
        return self.scale.view(torch.float8_e4m3fn).float() / self.global_scale.view(torch.float32)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for."""
        return table_values(self.codes(), self._values, dtype=self.dtype).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]; only these rows are decoded."""
        flat = index.reshape(-1)
        values = self._values.rows(flat, self.shape[0])
        found = table_values(self._unpacked(self.packed[flat]), values, dtype=self.dtype)
        return found.to(dtype).reshape(*index.shape, self.shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype."""
        words = _words(self.packed)
        return table_linear(x, words, self._values, bits=self.element.bits, columns=self.shape[1], dtype=self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors in modelzip's layout; all of it but plain scales as integers."""
        scale = self.scale.reshape(1) if self.strategy == "tensor" else self.scale
        tensors = {"weight_packed": self.packed, "weight_scale": scale}
        return tensors if self.global_scale is None else tensors | {"weight_global_scale": self.global_scale}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Float:
        """Read back what `tensors` gave, bit for bit, or what compressed-tensors calls them: `weight` for codes of 8
        bits, and floats where there are integers here. Raises KeyError if a tensor is missing."""
        name = "weight" if "weight" in tensors else "weight_packed"
        scale, kind = tensors["weight_scale"], str(meta["scale"])
        scale = scale.reshape(1, 1) if scale.ndim == 1 else scale
        return cls(
            tensors[name].view(torch.uint8),
            scale.view(torch.uint8) if kind in BYTE_SCALES else scale,
            tensors["weight_global_scale"].view(torch.int32) if kind == "e4m3" else None,
            SMALL_FLOATS[meta["element"]],
            kind,
            shape_of(meta),
            named_dtype(meta["dtype"]),
        )

    def meta(self) -> dict[str, Any]:
        """Plain data; scale: one of BYTE_SCALES or a dtype."""
        strategy = self.strategy
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "element": self.element.name,
            "bits": self.element.bits,
            "scale": self.scale_kind,
            "strategy": strategy,
            "group_size": self.group_size if strategy == "group" else None,
            "dtype": dtype_name(self.dtype),
        }

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Float:
        """A weight of this shape and these scales on the meta device."""
        (rows, columns), element, kind = shape_of(meta), SMALL_FLOATS[meta["element"]], str(meta["scale"])
        groups = columns // int(meta["group_size"]) if meta["strategy"] == "group" else 1
        dtype = torch.uint8 if kind in BYTE_SCALES else named_dtype(kind)
        return cls(
            torch.empty(rows, columns * element.bits // 8, dtype=torch.uint8, device="meta"),
            torch.empty((1, 1) if meta["strategy"] == "tensor" else (rows, groups), dtype=dtype, device="meta"),
            torch.empty(1, dtype=torch.int32, device="meta") if kind == "e4m3" else None,
            element,
            kind,
            (rows, columns),
            named_dtype(meta["dtype"]),
        )

    @property
    def _values(self) -> Values:
        return Values(self.element.values().to(self.packed.device)[None], self.scales())

    def _unpacked(self, packed: Tensor) -> Tensor:
        return packed if self.element.bits == 8 else unpack(_words(packed), self.element.bits, self.shape[1])


def _words(packed: Tensor) -> Tensor:
    """Bytes [rows, bytes] as the int32 words [rows, words] that kernels take, filled up with zeros."""
    return pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)
