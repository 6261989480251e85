"""Bit packing in plain torch: eight codes make one 64-bit integer whose first `bits` bytes go to the stream."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    eights = -(-columns // 32) * 4
    lanes = pad(codes, (0, -columns % 32)).reshape(rows, eights, 8)
    joined = torch.zeros(rows, eights, dtype=torch.int64, device=codes.device)
    for lane in range(8):
        joined |= lanes[..., lane].to(torch.int64) << (bits * lane)
    stream = torch.empty(rows, eights, bits, dtype=torch.uint8, device=codes.device)
    stream.copy_(joined.view(torch.uint8).reshape(rows, eights, 8)[..., :bits])
    words = stream.reshape(-1).view(torch.int32).reshape(rows, eights * bits // 4)
    return words[:, : -(-columns * bits // 32)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    rows, count = words.shape
    eights = -(-count // bits) * 4
    stream = pad(words, (0, -count % bits)).contiguous().view(torch.uint8).reshape(rows, eights, bits)
    joined = pad(stream, (0, 8 - bits)).contiguous().view(torch.int64).reshape(rows, eights)
    mask = (1 << bits) - 1
    codes = torch.empty(rows, eights, 8, dtype=torch.uint8, device=words.device)
    for lane in range(8):
        codes[..., lane] = ((joined >> (bits * lane)) & mask).to(torch.uint8)
    return codes.reshape(rows, eights * 8)[:, :columns].contiguous()
