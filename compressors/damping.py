"""How much is added to a Hessian's diagonal until it can be factorised."""

from __future__ import annotations

import math


def ladder(damping: float, max_damping: float) -> list[float]:
    """The shares of the mean diagonal to try: from `damping` by factors of √10 to the larger of the two."""
    most = max(damping, max_damping)
    steps = math.ceil(2 * math.log10(most / damping) - 1e-9)
    return [*(damping * 10 ** (step / 2) for step in range(steps)), most]
