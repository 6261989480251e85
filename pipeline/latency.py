"""How fast models that take texts whole are: opened as a user opens them, and timed in turns in one process."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Final

import numpy as np

from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.latency import Pair, Work, interleaved
from modelzip.recipes.schema import Evaluation

from .bench import Bench
from .clock import device_clock
from .feeding import Fed, feed, outputs
from .labelled import Examples
from .opened import open_by_transformers

TIMED: Final = 64
"""Examples over which times are taken: the first ones."""


def latency_section(
    compressed: Checkpoint, original: Checkpoint, examples: Examples, evaluation: Evaluation, bench: Bench
) -> dict[str, Any]:
    """The report's `latency`: both models over the first examples, alone and in batches of texts of like length."""
    first = examples.split(TIMED)[0]
    pairs = [(one, open_by_transformers(one, bench.device, dtype=bench.exact)) for one in (original, compressed)]
    single, batched, *sizes = (min(size, len(first)) for size in (1, evaluation.batch_size, *evaluation.batch_sizes))
    found: dict[int, Pair] = {}
    for number, size in enumerate(wanted := sorted({single, batched, *sizes})):
        bench.progress.step("time", number, len(wanted), f"texts, {size} at once")
        fed = (feed(*pair, first, seq_len=evaluation.seq_len, batch_size=size) for pair in pairs)
        found[size] = interleaved(*(_work(one) for one in fed), clock=device_clock(bench.device))
    bench.progress.step("time", len(wanted), len(wanted))
    return {
        "single": timed(found[single], batch_size=single, count=len(first)),
        "batched": timed(found[batched], batch_size=batched, count=len(first)),
        "text": _alone(found[single]),
        "throughput": [_throughput(found[size], size, len(first)) for size in dict.fromkeys(sizes)],
    }


def timed(times: Pair, *, batch_size: int, count: int) -> dict[str, Any]:
    """One part of the report's `latency`. count: examples of a repetition."""
    original, compressed = (1e3 * _seconds(side) / count for side in (times.first, times.second))
    sides = {"original_ms": original, "compressed_ms": compressed}
    return {"batch_size": batch_size, "examples": count, **sides, "speedup": times.ratio}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds, by linear interpolation."""
    p50, p90, p99 = 1e3 * np.quantile(seconds, (0.5, 0.9, 0.99))
    return {"p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99)}


def _alone(times: Pair) -> dict[str, Any]:
    """Percentiles over all texts of all repetitions."""
    original, compressed = (spread([one for steps in side for one in steps]) for side in (times.first, times.second))
    return {"original": original, "compressed": compressed, "speedup": times.ratio}


def _throughput(times: Pair, size: int, count: int) -> dict[str, Any]:
    original, compressed = (count / _seconds(side) for side in (times.first, times.second))
    return {"batch_size": size, "original": original, "compressed": compressed, "speedup": times.ratio}


def _seconds(side: Sequence[Sequence[float]]) -> float:
    """Of a repetition, the median."""
    return median(map(sum, side))


def _work(fed: Fed) -> Work:
    return lambda: outputs(fed)
