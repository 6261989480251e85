"""Integer matrices in the layout of onnxruntime's MatMulNBits.

Format: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits: the input columns of each row are cut into
blocks that share a scale and a zero point; codes are unsigned, those of 4 bits two to a byte, the first one low.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.weights.affine import Affine

BLOCKS: Final = (256, 128, 64, 32, 16)
"""Sizes of blocks that onnxruntime's kernels know."""


@dataclass(frozen=True)
class Layout:
    """How a matrix [rows, columns] is cut: `bits` (4 or 8) a code, `block` columns to a scale, the last one padded.

    symmetric: every zero point is the middle of the codes, and none is stored.
    """

    rows: int
    columns: int
    bits: int
    block: int
    symmetric: bool

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Layout | None:
        """For an affine weight of this meta; None if its groups are no whole number of blocks.

        Narrower codes are widened to 4 or 8 bits. One scale for more columns is repeated, for blocks of the size that
        takes the fewest bytes.
        """
        rows, columns = meta["shape"]
        group, bits = meta["group_size"], 4 if meta["bits"] <= 4 else 8
        fitting = [block for block in BLOCKS if group is None or group % block == 0]
        layouts = [cls(rows, columns, bits, block, bool(meta["symmetric"])) for block in fitting]
        return min(layouts, key=lambda one: one.nbytes, default=None)

    @property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.columns // self.block)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """codes: uint8 [rows, blocks, bytes]; scales: float32 [rows, blocks]; zeros: uint8 [rows, bytes]."""
        found: dict[str, tuple[int, ...]] = {
            "codes": (self.rows, self.blocks, self.block * self.bits // 8),
            "scales": (self.rows, self.blocks),
        }
        return found if self.symmetric else {**found, "zeros": (self.rows, -(-self.blocks * self.bits // 8))}

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        zeros = 0 if self.symmetric else -(-self.blocks * self.bits // 8)
        return self.rows * (self.blocks * (self.block * self.bits // 8 + 4) + zeros)

    def pack(self, weight: Affine) -> dict[str, Tensor]:
        """The tensors of `shapes`. weight: of as many rows, and of as many columns or those of all blocks."""
        half = 1 << (self.bits - 1)
        scale, zero_point = (self._to_blocks(one) for one in (weight.scale.float(), weight.zero_point))
        assert scale is not None
        codes = torch.zeros(self.rows, self.blocks * self.block, dtype=torch.int16)  # what is padded is 0 or unused
        codes[:, : weight.shape[1]] = weight.codes()
        packed = _narrowed((codes + half).to(torch.uint8), self.bits).reshape(self.shapes["codes"])
        made = {"codes": packed, "scales": scale.contiguous()}
        if zero_point is not None:
            made["zeros"] = _narrowed((zero_point.to(torch.int16) + half).to(torch.uint8), self.bits)
        return made

    def _to_blocks(self, grouped: Tensor | None) -> Tensor | None:
        """[rows, groups], or [1, 1] for all, -> [rows, blocks], repeated for blocks that lie in the same group."""
        if grouped is None:
            return None
        groups = grouped.shape[1]
        return grouped.repeat_interleave(self.blocks // groups, dim=1).expand(self.rows, -1)


def _narrowed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [rows, columns] of 4 bits two to a byte, the first low; of 8 bits as they are."""
    if bits == 8:
        return codes.contiguous()
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)
