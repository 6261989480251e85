"""8-bit integers, a scale to each row, for inputs that are rounded to 8 bits as they come: W8A8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from .inputs import TOKEN_INT8, IntegerInputs, integer_form
from .value import dtype_name, named_dtype, payload, shape_of

LAYOUT: Final = "int-quantized"
"""compressed-tensors' word for it."""


@dataclass(frozen=True)
class Int8:
    """A matrix [out, in] of codes * scale. codes: int8 [out, in]. scale: [out, 1].

    inputs: how its inputs are rounded to integers when it is multiplied with them.
    """

    codes: Tensor
    scale: Tensor
    inputs: IntegerInputs = TOKEN_INT8

    kind: ClassVar[str] = "int8"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def round_inputs(self, x: Tensor) -> Tensor:
        """x [..., in] as it is multiplied."""
        return self.inputs.rounded(x)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in] it stands for, computed in the scale's dtype as the runtimes do, then cast."""
        return (self.codes.to(self.scale.dtype) * self.scale).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index]."""
        return (self.codes[index].to(self.scale.dtype) * self.scale[index]).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in], rounded, @ dense().T -> [..., out], in x's dtype: a product of integers, plus that of columns
        of x that stay exact."""
        codes, scale = self.inputs.codes(x)
        flat = codes.reshape(-1, codes.shape[-1]).to(torch.int8)
        if x.device.type == "cpu":
            whole = torch._int_mm(flat, self.codes.T).float()
        else:  # other devices multiply int8 in certain shapes only; sums of so many products are exact to 2**-24
            whole = flat.float() @ self.codes.float().T
        made = (whole.reshape(*x.shape[:-1], self.shape[0]) * scale.float() * self.scale.float().T).to(x.dtype)
        columns = self.inputs.exact(x)
        if columns is None or not len(columns):
            return made
        exact = self.codes[:, columns].to(self.scale.dtype) * self.scale
        return made + x[..., columns] @ exact.to(x.dtype).T

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors in modelzip's layout, with what says how inputs are rounded."""
        return {"weight_codes": self.codes, "weight_scale": self.scale, **self.inputs.tensors()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Int8:
        """Read back what `tensors` gave, bit for bit, or what compressed-tensors calls it: `weight` for the codes.

        Raises KeyError if a tensor is missing.
        """
        codes = tensors["weight" if "weight" in tensors else "weight_codes"]
        return cls(codes, tensors["weight_scale"], integer_form(meta["inputs"]).from_tensors(tensors, meta["inputs"]))

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, bits, the type of the scales, and of the inputs."""
        own = {"kind": self.kind, "shape": list(self.shape), "bits": 8, "dtype": dtype_name(self.dtype)}
        return {**own, "inputs": self.inputs.meta()}

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Int8:
        """A weight of this shape on the meta device."""
        rows, columns = shape_of(meta)
        codes = torch.empty(rows, columns, dtype=torch.int8, device="meta")
        scale = torch.empty(rows, 1, dtype=named_dtype(meta["dtype"]), device="meta")
        return cls(codes, scale, integer_form(meta["inputs"]).empty(meta["inputs"]))
