"""The tasks of a report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import code, number, table
from .schema_quality import TaskResult


def task_table(tasks: Sequence[TaskResult]) -> str:
    """A row for each metric, with its standard error; "" for no tasks."""
    if not tasks:
        return ""
    rows = []
    for one in tasks:
        change = ""
        if one.original is not None and one.compressed is not None:
            change = f"{one.compressed - one.original:+.4f}"
        before, after = _within(one.original, one.original_error), _within(one.compressed, one.compressed_error)
        rows.append((f"{code(one.task)}, {one.metric}", before, after, change))
    return table(("task (± standard error)", "original", "compressed", ""), rows)


def _within(value: float | None, error: float | None) -> str:
    return number(value, ".4f") + ("" if error is None else f" ± {error:.4f}")
