"""The formats that a checkpoint can be written in, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint

from .dense import export_dense

FORMATS: Final[Mapping[str, Callable[..., Path]]] = MappingProxyType({"dense": export_dense})


def export(
    checkpoint: Checkpoint,
    format: str,
    output: Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the checkpoint in a format of FORMATS, and give what was written.

    dtype: of floating tensors, `auto` as they are. report: told how many bytes of all are written. Raises RecipeError
    for a format that isn't there, and what the format's own function raises.
    """
    if format not in FORMATS:
        raise RecipeError(f"There is no format {format}: take {' or '.join(FORMATS)}.")
    number = None if dtype == "auto" else getattr(torch, dtype)
    return FORMATS[format](checkpoint, output, dtype=number, overwrite=overwrite, report=report)
