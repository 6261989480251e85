"""Two workloads timed side by side in one process, in turns, so that what else the machine does hits both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Pair:
    """Seconds of each repetition of two workloads, in the order in which they ran."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the repetitions of first / second: how many times faster the second is."""
        return median(one / two for one, two in zip(self.first, self.second, strict=True))


def interleaved(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    repetitions: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Pair:
    """Run both in turns, after one turn that isn't counted. Each must have finished its work when it returns."""
    first()
    second()
    times: tuple[list[float], list[float]] = [], []
    for repetition in range(repetitions):
        order = (0, 1) if repetition % 2 == 0 else (1, 0)  # neither is always the one that finds the caches warm
        for place in order:
            begin = clock()
            (first, second)[place]()
            times[place].append(clock() - begin)
    return Pair(tuple(times[0]), tuple(times[1]))
