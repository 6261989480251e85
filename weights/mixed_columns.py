"""A matrix with some exact columns beside integers of few bits, for inputs that are rounded in the other columns alone.

Ashkboos, Markov, Frantar, Zhong, Wang, Ren, Hoefler, Alistarh 2023, "QUIK: Towards End-to-End 4-Bit Inference on
Generative Large Language Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .affine import Affine
from .inputs import PREFIX
from .value import at_least_single, dtype_name, payload, shape_of

COLUMNS = f"{PREFIX}columns"


@dataclass(frozen=True)
class ColumnRounding:
    """Inputs as `bits`-bit integers times a scale a token, but for the columns named, which stay as they are.

    columns: int32 [count], rising. A token's scale spans its smallest to its largest other input, and zero; zero lies
    on an integer. Computed in fp32 at least.
    """

    bits: int
    columns: Tensor

    form: ClassVar[str] = "beside_columns"

    def others(self, width: int) -> Tensor:
        """The columns that are rounded, of `width` in all, int64, rising."""
        is_other = torch.ones(width, dtype=torch.bool, device=self.columns.device)
        return is_other.index_fill_(0, self.columns.long(), False).nonzero().flatten()

    def rounded_others(self, x: Tensor) -> Tensor:
        """x [..., others] as its integers stand for it, in x's dtype."""
        wide, top = x.to(at_least_single(x.dtype)), (1 << self.bits) - 1
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / top
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-low / scale).round()
        codes = ((wide / scale).round_() + zero).clamp_(0, top)
        return ((codes - zero) * scale).to(x.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """x [..., in] with all but its exact columns rounded."""
        others = self.others(x.shape[-1])
        return x.index_copy(-1, others, self.rounded_others(x.index_select(-1, others)))

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""
        return {COLUMNS: self.columns}

    def meta(self) -> dict[str, Any]:
        """Plain data; count: of exact columns."""
        return {"form": self.form, "bits": self.bits, "count": self.columns.numel()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> ColumnRounding:
        """Read back what `tensors` gave. Raises KeyError if it is missing."""
        return cls(int(meta["bits"]), tensors[COLUMNS])

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> ColumnRounding:
        """On the meta device."""
        return cls(int(meta["bits"]), torch.empty(int(meta["count"]), dtype=torch.int32, device="meta"))


@dataclass(frozen=True)
class MixedColumns:
    """`exact` in the columns that `inputs` names, and `inner` in all others.

    inner: [out, in - count]. exact: [out, count], of inner's dtype.
    """

    inner: Affine
    exact: Tensor
    inputs: ColumnRounding

    kind: ClassVar[str] = "mixed_columns"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, others = self.inner.shape
        return rows, others + self.exact.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the exact columns and of inner's scales."""
        return self.inner.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def round_inputs(self, x: Tensor) -> Tensor:
        """x [..., in] as it is multiplied."""
        return self.inputs.rounded(x)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for."""
        return self._joined(self.inner.dense(dtype), self.exact.to(dtype))

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]; only these rows are decoded."""
        return self._joined(self.inner.rows(index, dtype), self.exact[index].to(dtype))

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in], rounded, @ dense().T -> [..., out], in x's dtype: inner from its packed form, plus the exact
        columns."""
        others = x.index_select(-1, self.inputs.others(x.shape[-1]))
        made = self.inner.matmul(self.inputs.rounded_others(others))
        return made + x.index_select(-1, self.inputs.columns.long()) @ self.exact.to(x.dtype).T

    def tensors(self) -> dict[str, Tensor]:
        """Those of inner, the exact columns and which they are."""
        return {**self.inner.tensors(), "weight_exact": self.exact, **self.inputs.tensors()}

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, bits, dtype, and the meta of inner and of the inputs."""
        own = {"kind": self.kind, "shape": list(self.shape), "bits": self.inner.bits, "dtype": dtype_name(self.dtype)}
        return {**own, "inner": self.inner.meta(), "inputs": self.inputs.meta()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> MixedColumns:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""
        inner = Affine.from_tensors(tensors, meta["inner"])
        return cls(inner, tensors["weight_exact"], ColumnRounding.from_tensors(tensors, meta["inputs"]))

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> MixedColumns:
        """A weight of this shape on the meta device."""
        inner, inputs = Affine.empty(meta["inner"]), ColumnRounding.empty(meta["inputs"])
        exact = torch.empty(shape_of(meta)[0], inputs.columns.numel(), dtype=inner.dtype, device="meta")
        return cls(inner, exact, inputs)

    def _joined(self, inner: Tensor, exact: Tensor) -> Tensor:
        """[..., others] and [..., count] -> [..., in], each in its columns."""
        width = self.shape[1]
        made = inner.new_empty(*inner.shape[:-1], width)
        made.index_copy_(-1, self.inputs.others(width), inner)
        return made.index_copy_(-1, self.inputs.columns.long(), exact)
