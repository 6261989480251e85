"""The order in which examples are learned from: shuffled anew for every epoch, those of like length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

POOL = 50
"""Batches that are sorted by length at once: more would pad less, and shuffle less."""


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all of these."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 63)
    return torch.Generator().manual_seed(seed)


def epoch_order(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> Tensor:
    """All examples once, int64 [examples]; cut into batches of `batch_size`, each holds like lengths.

    The examples are shuffled, sorted by length within pools of `POOL` batches, and the batches shuffled; one that
    isn't full stays last.
    """
    generator = seeded(seed, epoch)
    shuffled = torch.randperm(len(lengths), generator=generator)
    length = torch.tensor(lengths)
    pools = [pool[torch.sort(length[pool], stable=True).indices] for pool in torch.split(shuffled, POOL * batch_size)]
    batches = list(torch.split(torch.cat(pools), batch_size))
    full = len(lengths) // batch_size
    drawn = torch.randperm(full, generator=generator).tolist()
    return torch.cat([*(batches[place] for place in drawn), *batches[full:]])


class EpochOrder(Sampler[int]):
    """`epoch_order` of the epoch that was last set."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self._lengths, batch_size=self._batch_size, seed=self._seed, epoch=self.epoch)
        return iter(order.tolist())


class LongestFirst(Sampler[int]):
    """All examples by falling length, so that little is padded and memory peaks at the start."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._order = sorted(range(len(lengths)), key=lambda place: -lengths[place])

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)
