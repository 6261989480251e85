"""The plans of all stages: what the engines' plans have in common, and the chain in which each sees the last's result.

A stage is planned on a checkpoint that may not exist yet: the one before it gives a config, and names, types and shapes
of tensors, as they will be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.compressors.settings import Engine
from modelzip.recipes.schema import Recipe

from .layer_plan import plan_layers
from .request import Request
from .structural import plan_structural
from .train.plan import plan_training


class Plan(Protocol):
    """One stage, checked. Sizes are of all weights, in bytes; memory and disk are what the run will need.

    result: the checkpoint that the stage will leave, as far as headers go; its tensors lie nowhere yet.
    """

    @property
    def kind(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def output(self) -> Path: ...
    @property
    def bytes_before(self) -> int: ...
    @property
    def bytes_after(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def disk_bytes(self) -> int: ...
    @property
    def needs_data(self) -> bool: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def result(self) -> Checkpoint: ...

    def rows(self) -> list[tuple[str, str, str, int, int, str]]:
        """For the table of `--dry-run`: name, method, form, bytes before and after, note."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `--dry-run --json` prints it."""


def _structural(request: Request) -> Plan:
    plan = plan_structural(
        request.stage,
        request.checkpoint,
        recipe=request.recipe,
        output=request.output,
        where=request.where,
        problems=request.problems,
        later=request.number > 0,
    )
    if plan is None:
        raise ProblemsError(())
    return plan


def _training(request: Request) -> Plan:
    return plan_training(
        request.stage, request.checkpoint, recipe=request.recipe, output=request.output, where=request.where
    )


PLANNERS: Final[Mapping[Engine, Callable[[Request], Plan]]] = MappingProxyType(
    {"layerwise": plan_layers, "structural": _structural, "training": _training}
)


def make_plans(recipe: Recipe, checkpoint: Checkpoint, *, output: Path) -> list[Plan]:
    """A plan for each stage, the later ones on what the earlier ones leave. Raises ProblemsError with all mistakes,
    CheckpointError if the model can't be compressed. Whether the machine has room: `room.check_machine`."""
    plans: list[Plan] = []
    problems: list[str] = []
    for number, stage in enumerate(recipe.stages):
        where = f"stages[{number}].{stage.kind}" if len(recipe.stages) > 1 else stage.kind
        request = Request(recipe, stage, checkpoint, output, where, number, problems)
        try:
            plan = PLANNERS[stage.settings.engine](request)
        except ProblemsError as error:
            problems += error.sentences
            break
        plans.append(plan)
        checkpoint = plan.result
    if problems:
        raise ProblemsError(problems)
    return plans
