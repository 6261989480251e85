"""A matrix most of whose entries are zero: which are kept, and their values or their codes on an affine grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .affine import Affine
from .positions import TWO_OF_FOUR, check_pattern, pack_fours, pack_mask, two_of_four, unpack_fours, unpack_mask
from .scales import GroupScales, empty_words, pack_codes, unpack_codes
from .value import dtype_name, named_dtype, payload, shape_of


@dataclass(frozen=True)
class Sparse:
    """The kept entries of a matrix [out, in]; all others are exactly 0.

    Of 2:4, exactly two entries of each four are stored, row by row: values [out, in/2], positions uint8
    [out, ceil(in/8)], two 2-bit column indices a group. Where a group keeps fewer, entries of value 0 fill up, which
    `kept` then counts in. Of anything else: values [count], positions a bitmask uint8 [out, ceil(in/8)].
    values: floats; or, with `scales`, packed codes: int32 words [out, words], or [1, words] with a bitmask.
    pattern: (n, m) if at most n entries of each m columns are kept, None if unstructured. count: entries stored.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, int]
    pattern: tuple[int, int] | None
    count: int
    scales: GroupScales | None = None

    kind: ClassVar[str] = "sparse"

    @classmethod
    def of_dense(
        cls, weight: Tensor, kept: Tensor, *, pattern: tuple[int, int] | None = None, dtype: torch.dtype
    ) -> Sparse:
        """The entries of weight [out, in] where kept (bool [out, in]) is True, stored in `dtype`.

        Raises ValueError if `kept` isn't of the pattern.
        """
        positions, columns = _encode(kept, pattern)
        shape = (weight.shape[0], weight.shape[1])
        values = weight[kept] if columns is None else _gather(weight.masked_fill(~kept, 0), columns)
        return cls(values.to(dtype), positions, shape, pattern, values.numel())

    @classmethod
    def of_affine(cls, affine: Affine, kept: Tensor, *, pattern: tuple[int, int] | None = None) -> Sparse:
        """The codes of `affine` where kept (bool [out, in]) is True, with its scales and zero points.

        dense() of kept entries is that of `affine` bit for bit. Raises ValueError if `kept` isn't of the pattern.
        """
        positions, columns = _encode(kept, pattern)
        codes, scales = affine.codes(), affine.scales
        if columns is None:
            stored = codes[kept].unsqueeze(0)
        else:
            # An entry that fills up has its group's zero point for a code, which stands for 0.
            blank = torch.zeros_like(codes) if scales.zero_point is None else _spread(scales.zero_point, codes)
            stored = _gather(torch.where(kept, codes, blank), columns)
        words = pack_codes(stored, scales.bits)
        return cls(words, positions, affine.shape, pattern, stored.numel(), scales)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, or of the scales of codes."""
        return self.values.dtype if self.scales is None else self.scales.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    @property
    def kept(self) -> Tensor:
        """bool [out, in]: which entries are stored, also those whose value happens to be 0."""
        if self.pattern != TWO_OF_FOUR:
            return unpack_mask(self.positions, self.shape[1])
        rows, columns = self.shape
        mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool, device=self.positions.device)
        return mask.scatter_(-1, self._columns(), True).reshape(self.shape)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for; codes become values in the scale's dtype as the runtimes do."""
        if self.scales is None:
            return self._spread(self.values).to(dtype)
        if self.pattern == TWO_OF_FOUR:
            codes = unpack_codes(self.values, self.scales.bits, self.shape[1] // 2)
        else:
            codes = unpack_codes(self.values, self.scales.bits, self.count).reshape(-1)
        return self.scales.values(self._spread(codes)).masked_fill_(~self.kept, 0).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]. The whole matrix is made dense on the way: where a row begins isn't stored."""
        return self.dense(dtype)[index]

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype. The matrix is dense while this runs."""
        return x @ self.dense(x.dtype).T

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""
        scales = {} if self.scales is None else self.scales.tensors()
        return {"weight_values": self.values, "weight_positions": self.positions, **scales}

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, pattern ([n, m] or None), nnz (entries stored), dtype, and of codes their grid."""
        grid = {} if self.scales is None else self.scales.meta()
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "pattern": None if self.pattern is None else list(self.pattern),
            "nnz": self.count,
            "dtype": dtype_name(self.dtype),
            **grid,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Sparse:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""
        shape, scales = shape_of(meta), None
        if "bits" in meta:
            scales = GroupScales.from_tensors(tensors, bits=int(meta["bits"]), shape=shape)
        values, positions = tensors["weight_values"], tensors["weight_positions"]
        return cls(values, positions, shape, _pattern(meta), int(meta["nnz"]), scales)

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Sparse:
        """A weight of this shape and number of entries on the meta device."""
        rows, columns = shape_of(meta)
        pattern, count = _pattern(meta), int(meta["nnz"])
        lines = (rows, columns // 2) if pattern == TWO_OF_FOUR else (1, count)
        positions = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device="meta")
        scales = None
        if "bits" in meta:
            scales = GroupScales.empty(meta, (rows, columns))
            values = empty_words(*lines, scales.bits)
        else:
            size = lines if pattern == TWO_OF_FOUR else (count,)
            values = torch.empty(size, dtype=named_dtype(meta["dtype"]), device="meta")
        return cls(values, positions, (rows, columns), pattern, count, scales)

    def _columns(self) -> Tensor:
        return unpack_fours(self.positions, self.shape[1] // 4)

    def _spread(self, entries: Tensor) -> Tensor:
        """Stored entries, [out, in/2] or [count] -> [out, in] with zeros between."""
        rows, columns = self.shape
        if self.pattern != TWO_OF_FOUR:
            return entries.new_zeros(rows, columns).masked_scatter(self.kept, entries)
        fours = entries.new_zeros(rows, columns // 4, 4)
        return fours.scatter(-1, self._columns(), entries.reshape(rows, -1, 2)).reshape(rows, columns)


def _encode(kept: Tensor, pattern: tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
    """The packed positions, and of 2:4 the columns [out, in/4, 2] inside each four."""
    if pattern is not None:
        check_pattern(kept, pattern)
    if pattern != TWO_OF_FOUR:
        return pack_mask(kept), None
    columns = two_of_four(kept)
    return pack_fours(columns), columns


def _gather(matrix: Tensor, columns: Tensor) -> Tensor:
    """[out, in] at columns [out, in/4, 2] inside each four -> [out, in/2]."""
    rows = matrix.shape[0]
    return matrix.reshape(rows, -1, 4).gather(-1, columns).reshape(rows, -1)


def _spread(zero_point: Tensor, codes: Tensor) -> Tensor:
    """[out or 1, groups] -> [out, in]."""
    return zero_point.repeat_interleave(codes.shape[1] // zero_point.shape[1], 1).expand_as(codes)


def _pattern(meta: Mapping[str, Any]) -> tuple[int, int] | None:
    if meta["pattern"] is None:
        return None
    n, m = meta["pattern"]
    return int(n), int(m)
