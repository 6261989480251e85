"""The formats that a checkpoint can be written in, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint

from . import dense


@dataclass(frozen=True)
class Format:
    """write: a checkpoint into a folder. refusal: why it can't be written so, from headers alone, or None."""

    write: Callable[..., Path]
    refusal: Callable[[Checkpoint], str | None]


FORMATS: Final[Mapping[str, Format]] = MappingProxyType({"dense": Format(dense.export_dense, dense.refusal)})


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
    return FORMATS[format].write(checkpoint, output, dtype=number, overwrite=overwrite, report=report)
