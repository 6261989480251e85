"""What report.md says of the keys and values that a model caches, from the stages' `details`. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from .schema import StageResult

CACHE: Final = "cache of keys and values"
"""The key of this among a stage's details."""


def cache_lines(stages: Sequence[StageResult]) -> str:
    """A sentence for the stage that rounds what is cached, if there is one."""
    found: list[Any] = [stage.details[CACHE] for stage in stages if CACHE in stage.details]
    return "\n\n".join(map(_line, found))


def _line(one: Any) -> str:
    return (
        f"Cache: keys and values as {one['codes']}, a scale a {one['scales']}, {one['bits']} bits a number instead of "
        f"{one['bits_before']}: {one['bytes_per_token']:,} bytes a token instead of "
        f"{one['bytes_per_token_before']:,} where an engine stores the codes. Keys are off by "
        f"{one['error_of_keys']:.2%} on the calibration text, values by {one['error_of_values']:.2%}."
    )
