"""How the engines tell what they are doing; the command line decides what to show."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps of a stage are finished."""

    def say(self, line: str) -> None:
        """One line for the user."""
