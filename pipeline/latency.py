"""What the report says of two workloads that were timed in turns."""

from __future__ import annotations

from statistics import median
from typing import Any, Final

from modelzip.evaluation.latency import Pair

TIMED: Final = 64
"""Examples over which latency is taken: the first ones."""


def timed(times: Pair, *, batch_size: int, count: int) -> dict[str, Any]:
    """One part of the report's `latency`. count: examples of a repetition."""
    return {
        "batch_size": batch_size,
        "examples": count,
        "original_ms": 1e3 * median(times.first) / count,
        "compressed_ms": 1e3 * median(times.second) / count,
        "speedup": times.ratio,
    }
