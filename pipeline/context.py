"""What all parts of one run share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelzip.recipes.schema import Recipe

from .clock import Clock
from .progress import Progress


@dataclass(frozen=True)
class Context:
    """fingerprint: of all that the output's bytes depend on (see `identity`)."""

    recipe: Recipe
    device: torch.device
    fingerprint: str
    clock: Clock
    progress: Progress
