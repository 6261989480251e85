"""What the parts of one run share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.schema import Recipe

from .bench import Bench
from .clock import Clock
from .data_kind import Kind, kind_of
from .progress import Progress

if TYPE_CHECKING:  # the engines, on whose plans these are, take a Context
    from .plans import Plan


@dataclass(frozen=True)
class Context:
    """fingerprint: of all that the output's bytes depend on (see `identity`)."""

    recipe: Recipe
    device: torch.device
    fingerprint: str
    clock: Clock
    progress: Progress

    @property
    def bench(self) -> Bench:
        return Bench(self.recipe.dtype, self.device, self.progress)


@dataclass(frozen=True)
class Run:
    """A run that has been planned. started: time.perf_counter() at its start."""

    context: Context
    checkpoint: Checkpoint
    plans: list[Plan]
    output: Path
    started: float

    @cached_property
    def kind(self) -> Kind:
        """How the result is evaluated, if it is; without an evaluation nobody looks at its data."""
        evaluation = self.context.recipe.evaluate
        return kind_of(evaluation, self.plans[-1].result.config) if evaluation.enabled else "tokens"

    @property
    def targets(self) -> list[Path]:
        """Where each stage writes to: where it is kept, or a hidden folder beside the output; the last, the output."""
        whole = Path(os.path.abspath(self.output))
        stages = self.context.recipe.stages
        return [
            Path(stage.output).expanduser() if stage.output else whole.with_name(f".{whole.name}.stage{number}")
            for number, stage in enumerate(stages[:-1], 1)
        ] + [self.output]

    @property
    def passing(self) -> list[Path]:
        """The hidden ones among them, which are gone at the end."""
        stages = self.context.recipe.stages[:-1]
        return [target for stage, target in zip(stages, self.targets, strict=False) if not stage.output]
