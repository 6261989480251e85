"""Our modules run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class FreshProcessError(Exception):
    """A fresh process failed; the text is the last line that it wrote to stderr."""


@contextmanager
def fresh(module: str, *arguments: str, place: Path) -> Iterator[IO[str]]:
    """Run `python -m module arguments` in the empty folder `place`; gives its lines of output while it runs.

    The process doesn't reach for the network. On leaving, it is waited for, or killed if the body failed.
    Raises FreshProcessError if it fails.
    """
    errors = place / "errors.txt"
    with (
        errors.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            cwd=place,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield process.stdout
            process.communicate()
        finally:
            process.kill()  # has no effect on one that has ended
    if process.returncode < 0:
        raise FreshProcessError(f"it was killed by signal {-process.returncode}, maybe for want of memory")
    if process.returncode > 0:
        raise FreshProcessError((errors.read_text(errors="replace").strip().splitlines() or ["no message"])[-1])
