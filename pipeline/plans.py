"""The plans of all stages: what the engines' plans have in common, and the chain in which each sees the last's result.

A stage is planned on a checkpoint that may not exist yet: the one before it gives a config, and names, types and shapes
of tensors, as they will be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from modelzip.checkpoints.cached import scheme_of
from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.compressors.settings import Engine
from modelzip.recipes.schema import Recipe

from .folders import folder_problems
from .layer_plan import plan_layers
from .request import Request
from .structural import plan_structural
from .text import is_file
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
        disk_before=request.disk_before,
    )
    if plan is None:
        raise ProblemsError(())
    return plan


def _training(request: Request) -> Plan:
    plan = plan_training(
        request.stage, request.checkpoint, recipe=request.recipe, output=request.output, where=request.where
    )
    return replace(plan, disk_bytes=plan.disk_bytes + request.disk_before)


PLANNERS: Final[Mapping[Engine, Callable[[Request], Plan]]] = MappingProxyType(
    {"layerwise": plan_layers, "structural": _structural, "training": _training}
)


def make_plans(recipe: Recipe, checkpoint: Checkpoint, *, output: Path) -> list[Plan]:
    """A plan for each stage, the later ones on what the earlier ones leave. Raises ProblemsError with all mistakes,
    CheckpointError if the model can't be compressed. Whether the machine has room: `room.check_machine`."""
    plans: list[Plan] = []
    problems = folder_problems(recipe, checkpoint, output)
    for number in range(len(recipe.stages)):
        written = sum(plan.bytes_after for plan in plans)
        try:
            plan = _planned(recipe, number, checkpoint, output, problems, disk_before=written)
        except ProblemsError as error:
            problems += error.sentences
            problems += _lacking_files(recipe, number + 1)  # all that can be said of stages on an unknown input
            break
        plans.append(plan)
        checkpoint = plan.result
    if problems:
        raise ProblemsError(problems)
    return plans


def plan_again(foreseen: Plan, recipe: Recipe, number: int, source: Checkpoint, *, before: Checkpoint) -> Plan:
    """The plan of a later stage on what the one before it has left: the foreseen one where that is as it was planned.

    Sizes may depend on what was measured, as those of layers pruned together or of ranks chosen by energy do. before:
    what the stage was planned on. Raises ProblemsError if the stage can't be done on what there is.
    """
    if _sizes(source) == _sizes(before):
        return foreseen
    problems: list[str] = []
    plan = _planned(recipe, number, source, foreseen.output, problems)
    if problems:
        raise ProblemsError(problems)
    return plan


def unforeseen(plan: Plan, foreseen: Plan) -> list[str]:
    """The notes of a plan that was made again which the first one didn't have."""
    return [note for note in plan.notes if note not in foreseen.notes]


def _sizes(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}


def _planned(
    recipe: Recipe, number: int, source: Checkpoint, output: Path, problems: list[str], *, disk_before: int = 0
) -> Plan:
    stage = recipe.stages[number]
    where = f"stages[{number}].{stage.kind}" if len(recipe.stages) > 1 else stage.kind
    if stage.settings.engine != "layerwise" and scheme_of(source) is not None:
        raise ProblemsError(
            [
                f"{where}: the stage changes keys or values, and those of {source.source} are rounded by known scales: "
                "give kv_cache to the last stage alone."
            ]
        )
    return PLANNERS[stage.settings.engine](Request(recipe, stage, source, output, where, problems, disk_before))


def _lacking_files(recipe: Recipe, first: int) -> list[str]:
    """Sentences about the data files that aren't there, of the stages from `first` on."""
    problems = []
    for number, stage in enumerate(recipe.stages[first:], first):
        for key in ("data", "validation", "corpus"):
            source = getattr(stage.settings, key, None)
            if source is not None and is_file(source) and not Path(source).is_file():
                problems.append(f"stages[{number}].{stage.kind}: {key}: there is no file {source}.")
    return problems
