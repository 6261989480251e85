"""The same student trained on labels alone: what the teacher's share of a result is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from .. import ranks
from ..progress import Progress
from .lesson import Lesson, Objective
from .material import Material
from .rhythm import kept_row, last_checkpoint
from .trainer import Course, train

FOLDER: Final = "baseline"
"""The folder of its checkpoints in the workspace."""


@dataclass(frozen=True)
class Beside:
    """What both trainings share: course, tokens, and where their checkpoints lie."""

    course: Course
    material: Material
    measured: Material | None
    work: Path


def labels_alone(
    shared: Beside, student: Callable[[], Any], objective: Objective, *, seed: int, progress: Progress
) -> Mapping[str, Any]:
    """Train another copy, with the same start, order and course, without a teacher; returns its kept measurement.

    student: opens the copy.
    """
    lesson = Lesson(student(), replace(objective, alpha=None, signals={}, layers=()), seed=seed)
    work = shared.work / FOLDER
    resume_from = ranks.told(last_checkpoint(work) if ranks.is_main() else None)
    learned = train(
        lesson,
        shared.course,
        material=shared.material,
        measured=shared.measured,
        work=work,
        resume_from=resume_from,
        progress=progress,
    )
    row = kept_row(learned.curve, learned.kept)
    assert row is not None, "the plan sees to it that there is something to measure on"
    return {"steps": learned.steps, **row}
