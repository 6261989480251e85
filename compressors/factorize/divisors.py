"""Into how many equal parts a dimension falls."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
