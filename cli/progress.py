"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from modelzip.pipeline.progress import Progress

QUIET_S: Final = 5.0
"""Least time between two plain lines of one stage."""


class PlainProgress:
    """A line at a stage's beginning and end, and in between not more than one every few seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._last: tuple[str, float] = ("", 0.0)
        self._closed = False

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Print a line, unless one was printed a moment ago."""
        now = self._clock()
        last_stage, last_time = self._last
        if stage == last_stage and done < total and now - last_time < QUIET_S:
            return
        self._last = (stage, now)
        self._print(f"{stage} {done}/{total}" + (f"  {note}" if note else ""))

    def say(self, line: str) -> None:
        """Print the line."""
        self._print(line)

    def _print(self, line: str) -> None:
        if self._closed:
            return
        try:
            print(line, file=self._stream, flush=True)
        except OSError:  # nobody reads any more; the work goes on
            self._closed = True


class BarProgress:
    """One bar a stage."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move the stage's bar."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, note="")
        self._bars.update(self._tasks[stage], completed=done, total=total, note=note)

    def say(self, line: str) -> None:
        """Print the line above the bars."""
        self._bars.console.print(line, markup=False)


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """The progress that fits stderr: bars on a terminal, else plain lines."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainProgress(sys.stderr)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Bars(*columns, console=console, refresh_per_second=4) as bars:
        yield BarProgress(bars)
