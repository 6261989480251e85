"""A matrix as a train of small cores.

Oseledets 2011, "Tensor-Train Decomposition"; as a matrix with a pair of modes a core: Novikov et al. 2015, "Tensorizing
Neural Networks".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .value import at_least_single, dtype_name, named_dtype, payload


@dataclass(frozen=True)
class TensorTrain:
    """W[(i1 ... id), (j1 ... jd)] = core1[:, i1, j1, :] @ ... @ cored[:, id, jd, :], a product of small matrices.

    cores: [r_{k-1}, m_k, n_k, r_k] with r_0 = r_d = 1. W: [m1 ... md, n1 ... nd]. Raises ValueError if the cores don't
    fit together.
    """

    cores: tuple[Tensor, ...]

    kind: ClassVar[str] = "tensor_train"

    def __post_init__(self) -> None:
        shapes = [tuple(core.shape) for core in self.cores]
        ranks = [1, *(shape[-1] for shape in shapes)]
        if any(len(shape) != 4 for shape in shapes) or [s[0] for s in shapes] != ranks[:-1] or ranks[-1] != 1:
            raise ValueError(f"cores {shapes} must be [rank, out, in, rank], ranks alike between and 1 at the ends")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return prod(core.shape[1] for core in self.cores), prod(core.shape[2] for core in self.cores)

    @property
    def dtype(self) -> torch.dtype:
        """Of the cores."""
        return self.cores[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return payload(self)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out, in], computed in fp32 (fp64 where that is asked), then cast."""
        wide = at_least_single(dtype)
        matrix = torch.ones(1, 1, 1, dtype=wide, device=self.cores[0].device)  # [out so far, in so far, rank]
        for core in self.cores:
            joined = torch.einsum("ijr,rmns->imjns", matrix, core.to(wide))
            matrix = joined.reshape(matrix.shape[0] * core.shape[1], -1, core.shape[3])
        return matrix.squeeze(-1).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """dense(dtype)[index], from one slice of each core."""
        wide = at_least_single(dtype)
        rest = index.reshape(-1)
        below = self.shape[0]
        lines = torch.ones(len(rest), 1, 1, dtype=wide, device=self.cores[0].device)  # [len, in so far, rank]
        for core in self.cores:
            below //= core.shape[1]
            slices = core.permute(1, 0, 2, 3)[rest // below].to(wide)  # [len, r, n, s]
            rest = rest % below
            lines = torch.einsum("ljr,lrns->ljns", lines, slices).reshape(len(rest), -1, core.shape[3])
        return lines.reshape(*index.shape, self.shape[1]).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] @ dense().T -> [..., out], in x's dtype, core by core."""
        rest = self.shape[1]
        state = x.reshape(-1, 1, rest)  # [tokens and out so far, rank, in still to come]
        for core in self.cores:
            rank, m, n, following = core.shape
            rest //= n
            columns = state.reshape(-1, rank * n, rest).transpose(1, 2)
            moved = columns @ core.to(x.dtype).permute(0, 2, 1, 3).reshape(rank * n, m * following)
            state = moved.reshape(-1, rest, m, following).permute(0, 2, 3, 1).reshape(-1, following, rest)
        return state.reshape(*x.shape[:-1], self.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""
        return {f"weight_core_{number}": core for number, core in enumerate(self.cores)}

    def meta(self) -> dict[str, Any]:
        """Plain data: kind, shape, the shapes of all cores, dtype."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "cores": [list(core.shape) for core in self.cores],
            "dtype": dtype_name(self.dtype),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> TensorTrain:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""
        return cls(tuple(tensors[f"weight_core_{number}"] for number in range(len(meta["cores"]))))

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> TensorTrain:
        """All cores on the meta device."""
        dtype = named_dtype(meta["dtype"])
        return cls(tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in meta["cores"]))
