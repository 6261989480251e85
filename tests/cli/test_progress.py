"""Progress on stderr."""

from __future__ import annotations

import io

from modelzip.cli.progress import QUIET_S, PlainProgress


class Closed(io.StringIO):
    """A stream whose reader went away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_plain_lines_are_thinned_out_but_never_the_first_and_last():
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(stream, clock=lambda: now[0])
    for done in range(1, 31):
        now[0] += QUIET_S / 4
        progress.step("quantize", done, 30)
    progress.step("evaluate", 1, 2, "window 1")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "quantize 1/30"
    assert "quantize 30/30" in lines
    assert lines[-1] == "evaluate 1/2  window 1"
    assert len(lines) == 10  # 1, 5, 9 ... 29, 30 and the other stage


def test_work_goes_on_when_nobody_reads_the_progress():
    progress = PlainProgress(Closed())
    progress.say("first")
    progress.step("quantize", 1, 1)
    assert progress._closed
