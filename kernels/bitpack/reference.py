"""Bit packing in plain torch: eight codes make one 64-bit integer whose first `bits` bytes go to the stream."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    lanes = pad(codes, (0, -columns % 32)).reshape(rows, -1, 8)
    joined = torch.zeros(lanes.shape[:2], dtype=torch.int64, device=codes.device)
    for lane in range(8):
        joined |= lanes[..., lane].to(torch.int64) << (bits * lane)
    stream = joined.view(torch.uint8).reshape(rows, -1, 8)[..., :bits].reshape(rows, -1).contiguous()
    return stream.view(torch.int32)[:, : -(-columns * bits // 32)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    rows = words.shape[0]
    stream = pad(words, (0, -words.shape[1] % bits)).contiguous().view(torch.uint8).reshape(rows, -1, bits)
    joined = pad(stream, (0, 8 - bits)).contiguous().view(torch.int64)
    mask = (1 << bits) - 1
    codes = torch.empty(rows, joined.shape[1], 8, dtype=torch.uint8, device=words.device)
    for lane in range(8):
        codes[..., lane] = ((joined >> (bits * lane)) & mask).to(torch.uint8).squeeze(-1)
    return codes.reshape(rows, -1)[:, :columns].contiguous()
