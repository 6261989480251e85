"""The ratio at which a model fits its target size. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

CLOSEST: Final = 1 - 1e-6
SMALLEST: Final = 1e-6


def already_small(nbytes: int, budget: int) -> str | None:
    """What is said where the model's bytes are within the budget before anything is done; None where they aren't."""
    if nbytes > budget:
        return None
    return f"the model weighs {nbytes / 1e6:,.2f} MB already, and target_size is {budget / 1e6:,.2f} MB: ask for less"


def ratio_for_budget(bytes_at: Callable[[float], int], budget: int) -> float | None:
    """The largest ratio above 0 and below 1 at which the model's bytes are within the budget; None if none is.

    bytes_at: what the whole file takes at this ratio of all matrices that have no size of their own; it mustn't fall as
    the ratio rises. It is asked about twenty times.
    """
    if bytes_at(SMALLEST) > budget:
        return None
    if bytes_at(CLOSEST) <= budget:
        return CLOSEST
    low, high = SMALLEST, CLOSEST
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if bytes_at(middle) <= budget else (low, middle)
    return low
