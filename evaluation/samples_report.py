"""Sample texts of a report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import code
from .schema_quality import Sample


def sample_list(samples: Sequence[Sample]) -> str:
    """Each beginning with what both models wrote after it."""
    return "\n".join(line for number, sample in enumerate(samples, 1) for line in _lines(number, sample))


def _lines(number: int, sample: Sample) -> list[str]:
    lines = [f"{number}. {_shown(sample.prompt)}"]
    if sample.original is None:
        return [*lines, f"   - goes on: {_shown(sample.compressed)}"]
    if sample.same_tokens == sample.tokens:
        return [*lines, f"   - both go on: {_shown(sample.compressed)}"]
    alike = f"alike for {sample.same_tokens} of {sample.tokens} tokens"
    lines.append(f"   - the original goes on: {_shown(sample.original)}")
    return [*lines, f"   - the compressed one, {alike}: {_shown(sample.compressed)}"]


def _shown(text: str) -> str:
    """Any text as one line in which nothing is markup."""
    line = " ".join(text.split())
    return code(line) if line.replace("`", "").strip() else "(nothing)"
