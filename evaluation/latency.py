"""Two workloads timed side by side in one process, in turns, so that what else the machine does hits both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

Work: TypeAlias = Callable[[], Iterable[object]]
"""What is timed: each step that it yields must be finished by then."""


@dataclass(frozen=True)
class Pair:
    """Seconds of each step of each repetition of two workloads, in the order in which the repetitions ran."""

    first: tuple[tuple[float, ...], ...]
    second: tuple[tuple[float, ...], ...]

    @property
    def ratio(self) -> float:
        """Median over the repetitions of first / second: how many times faster the second is."""
        return median(sum(one) / sum(two) for one, two in zip(self.first, self.second, strict=True))


def interleaved(
    first: Work, second: Work, *, repetitions: int = 5, clock: Callable[[], float] = time.perf_counter
) -> Pair:
    """Run both in turns, after one turn that isn't counted."""
    times: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = [], []
    for repetition in range(repetitions + 1):
        order = (0, 1) if repetition % 2 else (1, 0)  # neither is always the one that finds the caches warm
        for place in order:
            steps = tuple(_steps((first, second)[place], clock))
            if repetition:
                times[place].append(steps)
    return Pair(tuple(times[0]), tuple(times[1]))


def _steps(work: Work, clock: Callable[[], float]) -> Iterable[float]:
    begin = clock()
    for _ in work():
        now = clock()
        yield now - begin
        begin = now
