"""What report.md says of a model with exits: what each threshold costs and wins. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import share, table
from .schema_quality import ExitsTaken
from .wording import SPEED, compared


def exits_table(rows: Sequence[ExitsTaken]) -> str:
    """A line for each threshold; nothing if there are none."""
    if not rows:
        return ""
    header = ["threshold", "accuracy (95 % interval)", "layers"]
    for timed in (rows[0].latency.single, rows[0].latency.batched):
        header += [f"ms an example, {timed.batch_size} at once", "than the whole"]
    lines = []
    for row in rows:
        cells = [f"{row.threshold:g}", share(row.accuracy, row.low, row.high), f"{row.layers:.2f}"]
        for timed in (row.latency.single, row.latency.batched):
            cells += [f"{timed.compressed_ms:.2f}", compared(timed.speedup, SPEED, times="×")]
        lines.append(cells)
    return f"Exits by threshold:\n\n{table(header, lines)}"
