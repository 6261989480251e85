"""What goes to stdout: text, JSON and rich tables. A reader that went away (`| head`) is no failure.

rich is imported where it is needed, here and in the other modules of this room: option errors don't wait for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modelzip.checkpoints.errors import MachineError

from .failures import silence

if TYPE_CHECKING:
    from rich.console import RenderableType


def write(text: str) -> None:
    """Text and a newline on stdout. Raises MachineError if it can't be written."""
    with _told():
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()


@contextmanager
def _told() -> Iterator[None]:
    """Nothing more is written to a stdout that takes nothing; one that nobody reads any more is no failure."""
    try:
        yield
    except BrokenPipeError:
        silence(sys.stdout.fileno())
    except OSError as error:
        silence(sys.stdout.fileno())
        raise unwritten(error) from error


def unwritten(error: OSError) -> MachineError:
    """What is said where stdout takes nothing, as on a full disk."""
    return MachineError(f"stdout can't be written: {error.strerror or error}")


def write_json(value: Any) -> None:
    """A value as JSON."""
    write(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def write_rich(*renderables: RenderableType) -> None:
    """Tables and marked-up text, in colour on a terminal (not with NO_COLOR), uncut and plain elsewhere."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=160)
    with _told():
        with console.capture() as captured:  # at whose end rich writes to stdout, if only nothing
            for one in renderables:
                console.print(one)
        write("\n".join(line.rstrip() for line in captured.get().splitlines()))
