"""A compressed matrix of which a few entries are kept exactly, beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeAlias

import torch
from torch import Tensor

from modelzip.kernels.bitpack import pack

from .affine import Affine
from .bilevel import Bilevel
from .codebook import Codebook
from .scattered import decode_places, encode_places, product
from .value import at_least_single, payload

Inner: TypeAlias = Affine | Bilevel | Codebook

_INNER: Final[Mapping[str, type[Inner]]] = MappingProxyType({kind.kind: kind for kind in (Affine, Bilevel, Codebook)})


@dataclass(frozen=True)
class WithOutliers:
    """`inner` with `values` in place of some of its entries.

    values: [count], of inner's dtype, in the order of the entries' places, row by row. steps: int16 [count], from each
    place to the next (see `scattered`). At these places inner holds what is known without unpacking it: 0 if it is
    affine, the middle one of the values of its group in other kinds. So a product with the
    matrix is one with inner, plus one with what the values differ from that.
    """

    inner: Inner
    values: Tensor
    steps: Tensor

    kind: ClassVar[str] = "with_outliers"

    @classmethod
    def of(cls, inner: Inner, exact: Tensor, chosen: Tensor) -> WithOutliers:
        """inner with the entries of exact [out, in] where chosen (bool [out, in]) is True.

        A few more entries are kept if two neighbouring ones lie more than 65,535 places apart.
        """
        places, steps = encode_places(chosen)
        taken = chosen.new_zeros(chosen.numel()).index_fill_(0, places, True).view(chosen.shape)
        return cls(_blanked(inner, taken), exact.reshape(-1)[places].to(inner.dtype), steps)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the inner matrix and of the values."""
        return self.inner.dtype

    @property
    def count(self) -> int:
        """Entries that are kept."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for."""
        dense = self.inner.dense(dtype)
        places = decode_places(self.steps)
        return dense.view(-1).index_copy_(0, places, self.values.to(dtype)).view(self.shape)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]; of inner only what it decodes itself."""
        found = self.inner.rows(index, dtype)
        columns, flat = self.shape[1], index.reshape(-1)
        places = decode_places(self.steps)
        first, last = (torch.searchsorted(places, (flat + more) * columns) for more in (0, 1))
        lengths = last - first
        line = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), lengths)
        rank = torch.arange(len(line), device=flat.device) - (lengths.cumsum(0) - lengths)[line]
        entry = first[line] + rank
        lines = found.reshape(-1, columns)
        lines[line, places[entry] % columns] = self.values[entry].to(dtype)
        return lines.reshape(found.shape)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype."""
        inner = self.inner.matmul(x)
        places, wide = decode_places(self.steps), at_least_single(x.dtype)
        rows, columns = places // self.shape[1], places % self.shape[1]
        more = self.values.to(wide) - _blank(self.inner, rows, columns).to(wide)
        return (inner + product(x.to(wide), more, rows=rows, columns=columns, out=self.shape[0])).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Those of inner, and the entries beside it."""
        return {**self.inner.tensors(), "weight_outliers": self.values, "weight_outlier_steps": self.steps}

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, count, and the meta of inner."""
        return {"kind": self.kind, "shape": list(self.shape), "count": self.count, "inner": self.inner.meta()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> WithOutliers:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""
        inner = _inner(meta).from_tensors(tensors, meta["inner"])
        return cls(inner, tensors["weight_outliers"], tensors["weight_outlier_steps"])

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> WithOutliers:
        """A weight of this inner kind and number of entries on the meta device."""
        inner, count = _inner(meta).empty(meta["inner"]), int(meta["count"])
        values = torch.empty(count, dtype=inner.dtype, device="meta")
        return cls(inner, values, torch.empty(count, dtype=torch.int16, device="meta"))


def _inner(meta: Mapping[str, Any]) -> type[Inner]:
    """Raises ValueError for a kind that can't have outliers."""
    kind = meta["inner"]["kind"]
    if kind not in _INNER:
        raise ValueError(f"outliers beside a weight of kind {kind!r}; it must be one of {', '.join(_INNER)}")
    return _INNER[kind]


def _blanked(inner: Inner, taken: Tensor) -> Inner:
    """inner with what is known (see `WithOutliers`) where taken (bool [out, in]) is True."""
    if isinstance(inner, Bilevel | Codebook):
        indices = inner.indices().masked_fill(taken, 1 << (inner.bits - 1))
        return replace(inner, packed=pack(indices, inner.bits))
    codes, zero = inner.codes(), inner.zero_point
    if zero is None:
        blank = torch.zeros_like(codes)
    else:
        blank = zero.repeat_interleave(codes.shape[1] // zero.shape[1], 1).expand_as(codes)
    return Affine.from_codes(torch.where(taken, blank, codes), inner.scale, zero, bits=inner.bits)


def _blank(inner: Inner, rows: Tensor, columns: Tensor) -> Tensor:
    """What inner holds at these places, [count]."""
    if isinstance(inner, Affine):
        return torch.zeros_like(rows, dtype=inner.dtype)
    if isinstance(inner, Bilevel):
        inner = inner.codebook()
    middle = inner.table[:, 1 << (inner.bits - 1)].float()
    value = middle.expand(len(rows)) if len(middle) == 1 else middle[rows]
    if inner.scale is not None:
        tile = rows // (inner.shape[0] // inner.scale.shape[0]), columns // (inner.shape[1] // inner.scale.shape[1])
        value = value * inner.scale[tile].float()
        if inner.offset is not None:
            value = value + inner.offset[tile].float()
    return value.to(inner.dtype)
