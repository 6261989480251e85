"""Matrices as rows of GGML's blocks: the codes of a grid packed as they are, or values rounded to a type.

Of 32 columns: Q4_0, Q5_0 and Q8_0 are `code * scale`, Q4_1 and Q5_1 are `code * scale + minimum`, all with scale and
minimum in fp16. Of 256 columns: Q4_K, see `gguf_super_blocks`. The layouts are those of the block structs of ggml
(Gerganov et al., 2023), which the gguf library's own dequantizers read.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from modelzip.weights.affine import Affine

from .gguf_super_blocks import SUPER, pack_grid, round_to_super_blocks

BLOCK: Final = 32
SIGNED: Final[Mapping[Type, int]] = MappingProxyType({Type.Q4_0: 8, Type.Q5_0: 16, Type.Q8_0: 128})
"""Codes go from minus this to one less than it."""
UNSIGNED: Final[Mapping[Type, int]] = MappingProxyType({Type.Q4_1: 16, Type.Q5_1: 32, Type.Q4_K: 16})
"""Codes go from 0 to one less than this."""
FLOATS: Final = MappingProxyType({Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16})


def smallest(weight: Affine) -> Type | None:
    """The smallest type that takes the codes and scales as they are, by shape and grid alone; None if a scale isn't
    shared by whole blocks.

    Asymmetric grids of 8 bits may turn out to have codes that fit no type, which `packed` finds.
    """
    symmetric, shared = weight.zero_point is None, weight.group_size
    if shared % BLOCK:
        return None
    if weight.bits > 5:
        return Type.Q8_0
    if weight.bits == 5:
        return Type.Q5_0 if symmetric else Type.Q5_1
    if symmetric:
        return Type.Q4_0
    return Type.Q4_1 if shared % SUPER else Type.Q4_K


def fits(columns: int, type: Type) -> bool:
    """Whether rows of so many columns are whole blocks of the type."""
    return columns % GGML_QUANT_SIZES[type][0] == 0


def packed(weight: Affine, type: Type) -> Tensor | None:
    """The codes of a weight [out, in] as blocks: uint8 [out, bytes]. None if the type can't take them as they are.

    Scales are rounded to fp16, and so are minima; Q4_K takes only what needs no rounding at all.
    """
    rows, columns = weight.shape
    if weight.group_size % BLOCK or not fits(columns, type) or type not in {*SIGNED, *UNSIGNED}:
        return None
    codes = weight.codes().to(torch.int16).reshape(rows, -1, BLOCK)
    scale = _by_block(weight.scale.float(), weight)
    zero = _by_block(torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point, weight)
    if type in SIGNED:
        signed, half = codes - zero.to(torch.int16).unsqueeze(-1), SIGNED[type]
        if int(signed.min()) < -half or int(signed.max()) >= half:
            return None
        if type == Type.Q8_0:
            return torch.cat([_half(scale), signed.to(torch.int8).view(torch.uint8)], -1).reshape(rows, -1)
        parts = [_half(scale), *_split(signed + half, high=type == Type.Q5_0)]
        return torch.cat(parts, -1).reshape(rows, -1)
    if 2**weight.bits > UNSIGNED[type]:
        return None
    lowest = -(2 ** (weight.bits - 1))
    below = zero.float() - lowest  # steps from the lowest code to zero: 0 ... 2**bits - 1
    if type == Type.Q4_K:
        return pack_grid((codes - lowest).to(torch.uint8), scale, below)
    parts = [_half(scale), _half((0 - below) * scale), *_split(codes - lowest, high=type == Type.Q5_1)]
    return torch.cat(parts, -1).reshape(rows, -1)


def rounded(values: Tensor, type: Type) -> Tensor:
    """Values fp32 [out, in], or any shape for the float types, in a type: uint8 [out, bytes]."""
    if type in FLOATS:
        return values.to(FLOATS[type]).contiguous().view(torch.uint8)
    if type == Type.Q4_K:
        return round_to_super_blocks(values)
    with np.errstate(over="ignore"):  # a scale beyond fp16 becomes infinite, which the caller finds
        return torch.from_numpy(quants.quantize(values.numpy(), type))


def values_of(data: Tensor, type: Type) -> Tensor:
    """What the gguf library makes of blocks uint8 [out, bytes]: fp32 [out, in]."""
    return torch.from_numpy(quants.dequantize(data.numpy(), type))


def _by_block(numbers: Tensor, weight: Affine) -> Tensor:
    """[out, groups] or [1, 1] -> [out, blocks]."""
    return numbers.expand(weight.shape[0], -1).repeat_interleave(weight.group_size // BLOCK, 1)


def _half(numbers: Tensor) -> Tensor:
    """[...] -> the bytes of each as fp16, uint8 [..., 2]."""
    return numbers.to(torch.float16).unsqueeze(-1).view(torch.uint8)


def _split(codes: Tensor, *, high: bool) -> list[Tensor]:
    """Codes [..., 32] of 4 bits, or 5 if `high`: the fifth bits as 4 bytes, then two codes to a byte, the first half
    of the block in the lower nibbles."""
    codes = codes.to(torch.uint8)
    low = codes & 15
    nibbles = low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4
    if not high:
        return [nibbles]
    place = 2 ** torch.arange(8, dtype=torch.uint8)
    fifth = ((codes >> 4).reshape(*codes.shape[:-1], 4, 8) * place).sum(-1, dtype=torch.uint8)
    return [fifth, nibbles]
