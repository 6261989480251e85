"""Where the kept entries of a sparse matrix lie: one bit an entry, or two 2-bit indices for each group of four."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TWO_OF_FOUR = (2, 4)


def pack_mask(kept: Tensor) -> Tensor:
    """bool [out, in] -> uint8 [out, ceil(in/8)]; column 8 i + j is bit j of byte i."""
    rows = kept.shape[0]
    eights = pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8)).reshape(rows, -1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """Undo `pack_mask`."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits & 1).bool().reshape(mask.shape[0], -1)[:, :columns]


def two_of_four(kept: Tensor) -> Tensor:
    """bool [out, in], at most two in each four -> int64 [out, in/4, 2]: the two columns inside each four, ascending.

    Where fewer are kept, the first ones that aren't fill up.
    """
    fours = kept.reshape(kept.shape[0], -1, 4)
    first = (~fours).to(torch.uint8).argsort(stable=True, dim=-1)[..., :2]
    return first.sort(-1).values


def pack_fours(columns: Tensor) -> Tensor:
    """[out, in/4, 2] -> uint8 [out, ceil(in/8)]: 4 bits a group; the lower column, the even group in the low bits."""
    rows = columns.shape[0]
    nibbles = (columns[..., 0] | columns[..., 1] << 2).to(torch.uint8)
    pairs = pad(nibbles, (0, nibbles.shape[1] % 2)).reshape(rows, -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_fours(packed: Tensor, groups: int) -> Tensor:
    """Undo `pack_fours`: int64 [out, groups, 2]."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)[:, :groups]
    return torch.stack([nibbles & 3, nibbles >> 2], -1).to(torch.int64)


def check_pattern(kept: Tensor, pattern: tuple[int, int]) -> None:
    """Raises ValueError unless each group of m columns of `kept` [out, in] has at most n True; pattern: (n, m)."""
    n, m = pattern
    if kept.shape[1] % m:
        raise ValueError(f"{kept.shape[1]} columns can't be split into groups of {m}")
    most = int(kept.reshape(kept.shape[0], -1, m).sum(-1).max())
    if most > n:
        raise ValueError(f"a group of {m} columns keeps {most} entries; the pattern is {n}:{m}")
