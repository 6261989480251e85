"""x @ W.T for W in packed affine integers, from the packed form."""

from __future__ import annotations

from torch import Tensor

from modelzip.kernels.bitpack import packed_words

from . import reference


def affine_linear(
    x: Tensor, packed: Tensor, scale: Tensor, *, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """x [..., columns] times the matrix that packed [out, words] and scale [out or 1, groups] stand for, transposed.

    Returns [..., out] in x's dtype. Never keeps a dense copy of the matrix. Raises ValueError on shapes that don't fit.
    """
    if x.shape[-1] != columns:
        raise ValueError(f"x has {x.shape[-1]} columns; the weight has {columns}")
    if packed.shape[1] != packed_words(columns, bits) or columns % scale.shape[1]:
        raise ValueError(
            f"packed {tuple(packed.shape)} and scale {tuple(scale.shape)} don't fit {columns} columns of {bits} bits"
        )
    return reference.affine_linear(x, packed, scale, zero_point=zero_point, bits=bits, columns=columns)
