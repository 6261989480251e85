"""The processes of one training, as `accelerate launch` starts them: all of them train, one writes and speaks."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .progress import Progress

T = TypeVar("T")


class Silent:
    """The progress of a process that doesn't speak."""

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


def join(device: torch.device) -> None:
    """Meet the other processes, if there are any; what follows may ask who is who."""
    PartialState(cpu=device.type == "cpu")


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return bool(PartialState().is_main_process)


def count() -> int:
    """How many processes train together."""
    return int(PartialState().num_processes)


def wait() -> None:
    """Go on when all processes have come here."""
    PartialState().wait_for_everyone()


def told(value: T) -> T:
    """The main process's value, in all of them."""
    box: list[Any] = [value]
    found: T = broadcast_object_list(box)[0] if count() > 1 else value
    return found


def voice(progress: Progress) -> Progress:
    """The progress to show: only the main process's."""
    return progress if is_main() else Silent()
