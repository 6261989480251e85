"""Ratios in words that stay true on either side of one."""

from __future__ import annotations

from typing import Final

SIZE: Final = ("smaller", "larger", "the same size")
SPEED: Final = ("faster", "slower", "the same speed")


def compared(ratio: float, words: tuple[str, str, str], *, times: str = "times") -> str:
    """How often the original's figure holds the new one: `2.92 times smaller`, or below one `1.61 times larger`.

    words: for more than one, for less, and for what rounds to one.
    """
    more, less, same = words
    if ratio <= 0:
        return ""
    factor = f"{max(ratio, 1 / ratio):.2f}"
    return same if factor == "1.00" else f"{factor} {times} {more if ratio > 1 else less}"
