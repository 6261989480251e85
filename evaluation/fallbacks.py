"""Fallbacks for people: what many modules have in common is said once."""

from __future__ import annotations

from collections.abc import Iterable


def gathered(sentences: Iterable[str]) -> list[str]:
    """One line for all sentences `module: reason` of the same reason, which names the first module."""
    modules: dict[str, list[str]] = {}
    for sentence in sentences:
        module, colon, reason = sentence.partition(": ")
        modules.setdefault(reason if colon else sentence, []).append(f"{module}: " if colon else "")
    return [
        f"{first}{reason}" if not others else f"{first.removesuffix(': ')} and {len(others)} more: {reason}"
        for reason, (first, *others) in modules.items()
    ]
