"""Q4_K, GGML's blocks of 256 columns: 8 sub-blocks of 32, value = d * s * code - dmin * m.

d and dmin are fp16 and belong to the whole block; s and m are 6-bit integers of each sub-block, codes have 4 bits.
The layout is that of ggml's block_q4_K (Kawrakow, 2023).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

SUPER: Final = 256
PARTS: Final = 8
LARGEST: Final = 63
"""Of the 6-bit multiples."""
TOP: Final = 15
"""Of the codes."""
WIDTHS: Final = tuple(TOP + shift / 4 for shift in range(-5, 3))
"""In how many steps a sub-block's range is divided: a grid a little narrower or wider than the range may fit better."""
CHUNK: Final = 1 << 13
"""Blocks at a time: about 100 MB of temporaries."""


def pack_grid(codes: Tensor, scale: Tensor, below: Tensor) -> Tensor | None:
    """A grid of value = (code - below) * scale as blocks, uint8 [out, bytes], without rounding anything; None if it
    doesn't lie on the super-blocks' grid.

    codes: uint8 [out, sub-blocks, 32]. scale: fp32 [out, sub-blocks]. below: whole numbers, the same shape.
    """
    steps, starts = scale.reshape(-1, PARTS), (below * scale).reshape(-1, PARTS)
    (unit, multiple, one), (least, times, other) = _multiples(steps), _multiples(starts)
    if not bool((one & other).all()):
        return None
    return _pack(unit, least, multiple, times, codes.reshape(-1, PARTS, SUPER // PARTS)).reshape(len(codes), -1)


def round_to_super_blocks(values: Tensor) -> Tensor:
    """Values fp32 [out, in] rounded to blocks, uint8 [out, bytes].

    Each sub-block gets the scale and minimum of least weighted squares, the best of several grids; entries count by
    |value| and the sub-block's root mean square. These are rounded to 6 bits, and the codes chosen anew.
    """
    blocks = values.reshape(-1, PARTS, SUPER // PARTS)
    return torch.cat([_round(chunk) for chunk in torch.split(blocks, CHUNK)]).reshape(len(values), -1)


def _multiples(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [blocks, 8] >= 0 as multiples 0 ... 63 of one fp16 number a block: it, they, whether that is exact."""
    most = numbers.amax(1, keepdim=True)
    unit, multiple = torch.zeros_like(most), torch.zeros_like(numbers)
    found = most == 0
    for count in range(1, LARGEST + 1):
        tried = (most / count).to(torch.float16).float()
        times = (numbers / tried).round()
        exact = (times * tried == numbers).all(1, keepdim=True) & (times.amax(1, keepdim=True) <= LARGEST) & ~found
        unit, multiple, found = torch.where(exact, tried, unit), torch.where(exact, times, multiple), found | exact
    return unit, multiple, found


def _round(blocks: Tensor) -> Tensor:
    scale, low = _fit(blocks)
    unit = (scale.amax(1, keepdim=True) / LARGEST).to(torch.float16).float()
    least = (-low.amin(1, keepdim=True) / LARGEST).to(torch.float16).float()
    multiple, times = _divided(scale, unit).clamp(0, LARGEST), _divided(-low, least).clamp(0, LARGEST)
    steps, starts = (unit * multiple).unsqueeze(-1), (least * times).unsqueeze(-1)
    codes = _divided(blocks + starts, steps).clamp(0, TOP)
    return _pack(unit, least, multiple, times, codes)


def _fit(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale >= 0 and minimum <= 0, [blocks, 8] each, of the best grid for values [blocks, 8, 32]."""
    weight = blocks.abs() + blocks.square().mean(-1, keepdim=True).sqrt()
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    span = blocks.amax(-1, keepdim=True) - low
    scale, minimum = (span / TOP).squeeze(-1), low.squeeze(-1)  # stays where all codes are alike
    gain = torch.zeros_like(scale)
    total, of_values, weighted_values = weight.sum(-1), (weight * blocks).sum(-1), weight * blocks
    for width in WIDTHS:
        codes = _divided(blocks - low, span / width).clamp_(0, TOP)
        weighted = weight * codes
        of_codes, of_squares = weighted.sum(-1), weighted.mul_(codes).sum(-1)
        of_both = codes.mul_(weighted_values).sum(-1)
        determinant = total * of_squares - of_codes.square()
        start = (of_squares * of_values - of_codes * of_both) / determinant
        tried = (total * of_both - of_codes * of_values) / determinant
        tried = torch.where(start > 0, of_both / of_squares, tried)  # the format holds no minimum above zero
        start = start.clamp(max=0)
        explained = tried * of_both + start * of_values  # of the weighted squares, by the normal equations
        better = (explained > gain) & (tried >= 0)  # false also for what isn't a number
        scale, minimum = torch.where(better, tried, scale), torch.where(better, start, minimum)
        gain = torch.where(better, explained, gain)
    return scale, minimum


def _divided(numbers: Tensor, steps: Tensor) -> Tensor:
    """Numbers in whole steps, 0 where a step is 0."""
    return torch.where(steps > 0, numbers / steps, 0).round()


def _pack(unit: Tensor, least: Tensor, multiple: Tensor, times: Tensor, codes: Tensor) -> Tensor:
    """d and dmin [blocks, 1], s and m [blocks, 8], codes [blocks, 8, 32] -> uint8 [blocks, 144].

    The first four s, the first four m, then the lower nibbles of the last four s and m; the upper two bits of these
    stand above the first ones. Codes of two neighbouring sub-blocks share bytes, the first in the lower nibbles.
    """
    s, m, codes = multiple.to(torch.uint8), times.to(torch.uint8), codes.to(torch.uint8)
    first = s[:, :4] | s[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    third = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    halves = [number.to(torch.float16).view(torch.uint8) for number in (unit, least)]
    nibbles = (codes[:, ::2] | codes[:, 1::2] << 4).flatten(1)
    return torch.cat([*halves, first, second, third, nibbles], 1)
