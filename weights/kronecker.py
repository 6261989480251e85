"""A matrix as a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .value import at_least_single, dtype_name, named_dtype, payload


@dataclass(frozen=True)
class Kronecker:
    """W = Σ_t a_t ⊗ b_t. a: [terms, m1, n1]. b: [terms, m2, n2]. W: [m1 m2, n1 n2].

    Raises ValueError if a and b haven't as many terms.
    """

    a: Tensor
    b: Tensor

    kind: ClassVar[str] = "kronecker"

    def __post_init__(self) -> None:
        if self.a.ndim != 3 or self.b.ndim != 3 or self.a.shape[0] != self.b.shape[0]:
            raise ValueError(f"a {tuple(self.a.shape)} and b {tuple(self.b.shape)} must be [terms, out, in] alike")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the sum."""
        return self.a.shape[1] * self.b.shape[1], self.a.shape[2] * self.b.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.a.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sum [out, in], computed in fp32 (fp64 where that is asked), then cast."""
        wide = at_least_single(dtype)
        # [m1, m2, n1, n2]: row i1 m2 + i2, column j1 n2 + j2
        return torch.einsum("tij,tkl->ikjl", self.a.to(wide), self.b.to(wide)).reshape(self.shape).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index], from one row of each a_t and b_t."""
        wide = at_least_single(dtype)
        flat, inner = index.reshape(-1), self.b.shape[1]
        a, b = self.a[:, flat // inner].to(wide), self.b[:, flat % inner].to(wide)  # [terms, len, n1 or n2]
        return torch.einsum("tri,trj->rij", a, b).reshape(*index.shape, self.shape[1]).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype, by way of x as matrices [n1, n2].

        The side that makes the smaller intermediate result goes first.
        """
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        (terms, m1, n1), (_, m2, n2) = a.shape, b.shape
        tokens = x.reshape(-1, n1, n2)
        if n1 * m2 * (n2 + m1) <= n2 * m1 * (n1 + m2):  # multiplications a term
            inner = (tokens @ b.reshape(terms * m2, n2).T).reshape(-1, n1, terms, m2)
            outer = inner.permute(0, 3, 1, 2).reshape(-1, m2, n1 * terms)
            y = (outer @ a.permute(2, 0, 1).reshape(n1 * terms, m1)).transpose(1, 2)
        else:
            inner = (tokens.transpose(1, 2) @ a.reshape(terms * m1, n1).T).reshape(-1, n2, terms, m1)
            outer = inner.permute(0, 3, 1, 2).reshape(-1, m1, n2 * terms)
            y = outer @ b.permute(2, 0, 1).reshape(n2 * terms, m2)
        return y.reshape(*x.shape[:-1], m1 * m2)

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""
        return {"weight_a": self.a, "weight_b": self.b}

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, the shapes of a and b, dtype."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "a": list(self.a.shape),
            "b": list(self.b.shape),
            "dtype": dtype_name(self.dtype),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Kronecker:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""
        return cls(tensors["weight_a"], tensors["weight_b"])

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> Kronecker:
        """Both factors on the meta device."""
        dtype = named_dtype(meta["dtype"])
        return cls(*(torch.empty(meta[name], dtype=dtype, device="meta") for name in ("a", "b")))
