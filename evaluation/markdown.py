"""Markdown as GitHub shows it: tables, folded parts, numbers that may be missing."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float | None, form: str) -> str:
    """The number in a format, or a dash."""
    return "–" if value is None else format(value, form)


def share(value: float | None, low: float | None, high: float | None) -> str:
    """A share of 0 to 1 in percent, with its interval."""
    if value is None or low is None or high is None:
        return "–"
    return f"{100 * value:.2f} % ({100 * low:.1f} to {100 * high:.1f})"


def within(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval, where it has one."""
    if value is None:
        return "–"
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} ({low:.3f} to {high:.3f})"


def code(text: str) -> str:
    """Text between backticks."""
    return f"`{text.replace('`', '')}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def fold(summary: str, body: str) -> str:
    """What is shown once its summary is clicked."""
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"
