"""What the parts of one run share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.schema import Recipe

from .classify import by_labels
from .clock import Clock
from .plan import Plan
from .progress import Progress


@dataclass(frozen=True)
class Context:
    """fingerprint: of all that the output's bytes depend on (see `identity`)."""

    recipe: Recipe
    device: torch.device
    fingerprint: str
    clock: Clock
    progress: Progress


@dataclass(frozen=True)
class Run:
    """A run that has been planned. started: time.perf_counter() at its start."""

    context: Context
    checkpoint: Checkpoint
    plans: list[Plan]
    output: Path
    started: float

    @cached_property
    def by_labels(self) -> bool:
        """Whether the result is evaluated on labelled examples."""
        evaluation = self.context.recipe.evaluate
        return evaluation.enabled and by_labels(evaluation, self.checkpoint.config)

    @property
    def between(self) -> list[Path]:
        """The hidden folders beside the output to which all stages but the last write."""
        whole = Path(os.path.abspath(self.output))
        return [whole.with_name(f".{whole.name}.stage{number}") for number in range(1, len(self.plans))]
