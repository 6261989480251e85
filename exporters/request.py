"""What an export is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.export_formats import AUTO
from modelzip.recipes.schema import Export

from .source import Source

WEIGHTS: Final = ("*.gguf", "*.onnx", "*.onnx_data*", "*.pt2")
"""Files that hold weights and aren't safetensors."""


@dataclass(frozen=True, eq=False)
class Request:
    """A checkpoint to be written in another format.

    output: the folder. scheme: a word of the format, or `auto`. dtype: of floating tensors, None as they are. report:
    told how many bytes of all are written.
    """

    checkpoint: Checkpoint
    output: Path
    scheme: str = AUTO
    dtype: torch.dtype | None = None
    overwrite: bool = False
    report: Callable[[int, int], None] = lambda done, total: None

    @cached_property
    def source(self) -> Source:
        """The checkpoint, weight by weight. Raises CheckpointError for what modelzip doesn't know."""
        return Source.of(self.checkpoint)


def request_of(
    asked: Export,
    checkpoint: Checkpoint,
    output: Path,
    *,
    overwrite: bool,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Request:
    """The request of an entry of a recipe's `export`."""
    dtype = None if asked.dtype == AUTO else getattr(torch, asked.dtype)
    return Request(checkpoint, output, asked.scheme, dtype, overwrite, report)


@dataclass(frozen=True)
class Written:
    """path: of the folder. rounded: sentences on what was rounded anew; none if every weight is what it was. notes:
    sentences on what else isn't there as it was."""

    path: Path
    rounded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of its weights."""
        own = [file for pattern in WEIGHTS for file in self.path.rglob(pattern)]
        return sum(file.stat().st_size for file in own) if own else Checkpoint.open(str(self.path)).nbytes
