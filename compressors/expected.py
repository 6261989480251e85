"""What a method will make of a matrix, known from shapes alone: grids."""

from __future__ import annotations

from typing import Any


def group_misfit(group_size: int | str, count: int, what: str = "columns") -> str | None:
    """Why a group size doesn't fit so many columns, or what else, a part of a sentence; None if it does."""
    if isinstance(group_size, int) and count % group_size:
        return f"group {group_size} doesn't divide {count} {what}"
    return None


def grid_meta(bits: int, group_size: int | str, symmetric: bool, *, shape: tuple[int, int]) -> dict[str, Any]:
    """What the `meta` of a weight [out, in] says of its grid."""
    rows, columns = shape
    grouped = isinstance(group_size, int) and group_size < columns
    strategy = "group" if grouped else "tensor" if group_size == "tensor" and rows > 1 else "channel"
    return {
        "bits": bits,
        "strategy": strategy,
        "group_size": group_size if grouped else None,
        "symmetric": symmetric,
    }
