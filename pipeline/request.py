"""What a stage's planner is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.schema import Recipe, Stage


@dataclass(frozen=True)
class Request:
    """One stage to be planned.

    checkpoint: what it starts from; only its config and its tensors' names, types and shapes count. where: how problems
    name the stage. problems: a list to which all that is wrong is added, one sentence each. disk_before: bytes of what
    earlier stages have written, which lies beside this one's output until the run is done.
    """

    recipe: Recipe
    stage: Stage
    checkpoint: Checkpoint
    output: Path
    where: str
    problems: list[str]
    disk_before: int = 0
