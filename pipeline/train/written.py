"""What a training has left, as the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modelzip.checkpoints.errors import CheckpointError, RecipeError
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.prune.settings_training import Movement
from modelzip.weights.value import CompressedWeight

from .student import Student, stored
from .trainer import Learned

PART: Final = "student"
"""The writer's part that holds the trained weights."""


def write_student(writer: CheckpointWriter, student: Student, learned: Learned, record: dict[str, Any]) -> None:
    """The student's tensors take the place of all that its origin has."""
    rest, changed = student.split(learned.state)
    tensors = stored(_named(student), state=rest)
    for module, weight in changed.items():
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in weight.tensors().items()}
    planned = student.checkpoint().tensors
    if tensors.keys() != planned.keys():
        strange = sorted(tensors.keys() ^ planned.keys())[0]
        raise CheckpointError(f"{strange} was planned or trained, but not both; nothing was written.")
    tensors = {name: tensor.to(DTYPES[planned[name].dtype]) for name, tensor in tensors.items()}
    _require_smaller(student, changed)
    forms = {module: weight.meta() for module, weight in changed.items()}
    writer.write_part(PART, tensors, replaces=student.origin.tensors, record={"training": record, "forms": forms})


def _require_smaller(student: Student, changed: Mapping[str, CompressedWeight]) -> None:
    """Raise RecipeError if a method that learns how many weights go has let too few of them go."""
    before = sum(student.changes[name].before.nbytes for name in changed)
    after = sum(weight.nbytes for weight in changed.values())
    soft = next((one.settings for one in student.changes.values() if isinstance(one.settings, Movement)), None)
    if soft is not None and soft.masking == "threshold" and after >= before:
        raise RecipeError(
            f"{soft.method} let so few weights go that the matrices ({after:,} bytes) would not be smaller than "
            f"they are ({before:,} bytes): raise penalty (it is {soft.penalty:g}), or train for longer."
        )


def _named(student: Student) -> Any:
    """The student's skeleton, for its names."""
    return skeleton(Checkpoint(student.origin.folder, dict(student.config), {}, student.origin.source))
