"""Indices into a table of values (k-means, NormalFloat and other small floats), with one scale a group or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from modelzip.kernels.bitpack import pack, unpack
from modelzip.kernels.table_linear import Values, table_linear, table_values

from .scales import empty_words
from .value import dtype_name, named_dtype, payload, shape_of


@dataclass(frozen=True)
class Codebook:
    """A matrix [out, in] of values table[index] * scale + offset, computed in fp32 and rounded to `dtype`.

    packed: int32 words [out, words] (see `modelzip.kernels.bitpack`). table: [1, 2**bits] for the whole matrix, or
    [out, 2**bits], one a row. scale: [bands, groups], one for each tile that these cut the matrix into; None for
    1. offset: the shape of scale; None for 0.
    """

    packed: Tensor
    table: Tensor
    scale: Tensor | None
    bits: int
    shape: tuple[int, int]
    dtype: torch.dtype
    offset: Tensor | None = None

    kind: ClassVar[str] = "codebook"

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        table: Tensor,
        scale: Tensor | None,
        *,
        bits: int,
        dtype: torch.dtype,
        offset: Tensor | None = None,
    ) -> Codebook:
        """Pack indices [out, in], whole numbers of any dtype in 0 ... 2**bits - 1."""
        shape = (indices.shape[0], indices.shape[1])
        return cls(pack(indices.to(torch.uint8), bits), table, scale, bits, shape, dtype, offset)

    @property
    def values(self) -> Values:
        """What the indices stand for."""
        return Values(self.table, self.scale, self.offset)

    @property
    def group_size(self) -> int | None:
        """Columns that share one scale; None without scales."""
        return None if self.scale is None else self.shape[1] // self.scale.shape[1]

    @property
    def group_rows(self) -> int:
        """Rows that share one scale; 1 without scales."""
        return 1 if self.scale is None else self.shape[0] // self.scale.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def indices(self) -> Tensor:
        """uint8 [out, in]."""
        return unpack(self.packed, self.bits, self.shape[1])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for."""
        return table_values(self.indices(), self.values, dtype=self.dtype).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]; only these rows are decoded."""
        flat = index.reshape(-1)
        indices = unpack(self.packed[flat], self.bits, self.shape[1])
        return (
            table_values(indices, self.values.rows(flat, self.shape[0]), dtype=self.dtype)
            .to(dtype)
            .reshape(*index.shape, self.shape[1])
        )

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype."""
        return table_linear(x, self.packed, self.values, bits=self.bits, columns=self.shape[1], dtype=self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""
        tensors = {"weight_packed": self.packed, "weight_table": self.table}
        by_group = {"weight_scale": self.scale, "weight_offset": self.offset}
        return tensors | {name: tensor for name, tensor in by_group.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Codebook:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""
        scale = tensors["weight_scale"] if meta["group_size"] is not None else None
        offset = tensors["weight_offset"] if meta["offset"] else None
        packed, table = tensors["weight_packed"], tensors["weight_table"]
        return cls(packed, table, scale, int(meta["bits"]), shape_of(meta), named_dtype(meta["dtype"]), offset)

    def meta(self) -> dict[str, Any]:
        """Plain data; tables: 1, or one a row; the types of table and scale where they aren't `dtype`."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "bits": self.bits,
            "tables": self.table.shape[0],
            "table_dtype": dtype_name(self.table.dtype),
            "group_size": self.group_size,
            "group_rows": self.group_rows,
            "offset": self.offset is not None,
            "scale_dtype": None if self.scale is None else dtype_name(self.scale.dtype),
            "dtype": dtype_name(self.dtype),
        }

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Codebook:
        """A weight of this shape and these tables on the meta device."""
        (rows, columns), bits = shape_of(meta), int(meta["bits"])
        table = torch.empty(int(meta["tables"]), 1 << bits, dtype=named_dtype(meta["table_dtype"]), device="meta")
        scale = None
        if meta["group_size"] is not None:
            bands, groups = rows // int(meta.get("group_rows", 1)), columns // int(meta["group_size"])
            scale = torch.empty(bands, groups, dtype=named_dtype(meta["scale_dtype"]), device="meta")
        offset = None if scale is None or not meta["offset"] else torch.empty_like(scale)
        packed = empty_words(rows, columns, bits)
        return cls(packed, table, scale, bits, (rows, columns), named_dtype(meta["dtype"]), offset)
