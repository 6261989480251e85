"""The plan of a stage that trains: everything that can be known before a weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.compressors.distill.settings import DistillSettings, Logits, TaughtSettings
from modelzip.compressors.distill.settings_students import BiLstm, Lsq, Sequence
from modelzip.compressors.prune.settings_training import PruneTrainingSettings
from modelzip.recipes.schema import Recipe, Stage

from ..calibrate import is_causal, longest
from ..room import BASE_BYTES
from .changes import forms, plan_changes
from .checks import check_cache, check_origin, check_patterns, check_stage, check_windows
from .data import Data, is_running_text, read_data, running_text
from .fit import Problems, check_extras, check_tokens, objective_of, shell
from .lesson import Objective
from .made import is_new, student_of
from .spread import check_spread
from .student import (
    Student,
    architecture,
    class_names,
    is_classifier,
    parameters_of,
    untrainable,
)

LENGTH: Final = 128
"""Tokens of a text or window where nobody said."""


@dataclass(frozen=True, eq=False)
class TrainingPlan:
    """One stage that trains, checked. Sizes are of all weights, in bytes; memory and disk are what the run will need.

    frozen: patterns of modules that aren't trained; those that pruning ignores are trained, but stay dense.
    result: what will be written, as far as headers go.
    """

    kind: str
    source: str
    output: Path
    settings: DistillSettings
    student: Student
    teacher: Checkpoint | None
    objective: Objective
    data: Data
    validation: Data | None
    frozen: tuple[str, ...]
    max_length: int
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    disk_bytes: int
    notes: tuple[str, ...]
    result: Checkpoint
    needs_data: bool = False

    def rows(self) -> list[tuple[str, str, str, int, int, str]]:
        """One for the whole model: name, method, form, bytes before and after, note."""
        form = forms(self.student.changes)
        return [("the whole model", self.settings.label, form, self.bytes_before, self.bytes_after, "")]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `--dry-run --json` prints it."""
        keys = ("source", "kind", "bytes_before", "bytes_after", "memory_bytes", "disk_bytes", "needs_data")
        return {
            "method": self.settings.method,
            **{key: getattr(self, key) for key in keys},
            "output": str(self.output),
            "notes": list(self.notes),
            "modules": [],
            "settings": self.settings.model_dump(mode="json"),
            "task": self.objective.predicts,
            "student": {"architecture": architecture(self.student.config), "start": self.student.start},
            "teacher": None if self.teacher is None else self.teacher.source,
            "examples": self.data.count,
        }


def plan_training(
    stage: Stage, source: Checkpoint, *, recipe: Recipe, output: Path, where: str = "distill"
) -> TrainingPlan:
    """The plan of one stage on what the one before it leaves. Raises ProblemsError with all mistakes.

    source: its headers; of an earlier stage's result, which isn't there yet, `folder` must hold the tokenizer.
    """
    settings = stage.settings
    assert isinstance(settings, DistillSettings)
    problems = Problems(where)
    check_stage(stage, source, problems)
    check_spread(settings, problems)
    teacher = _teacher(settings, recipe, source, problems)
    origin = _origin(settings, source, teacher)
    check_origin(stage, source, teacher, recipe=recipe, problems=problems)
    if isinstance(settings, Logits):
        folders = {"the model": source.folder, "the teacher": (teacher or source).folder, "the output": output}
        check_cache(settings, folders, problems)
    data, validation = _data(settings, origin, teacher, problems)
    student = None if origin is None or data is None else student_of(settings, origin, teacher, data, problems)
    objective = None if student is None else objective_of(settings, student, teacher, problems)
    if student is not None:
        check_tokens(settings, student, teacher, problems)
        check_windows(student, recipe, problems)
        check_patterns(stage, student, problems)
    if objective is not None and data is not None:
        check_extras(settings, objective, data, validation, problems)
    changes = None
    if student is not None and not problems.sentences:
        planned = student
        changes = problems.tried(lambda: plan_changes(stage, planned.checkpoint(), problems))
    if problems.sentences:
        raise ProblemsError(problems.sentences)
    assert student is not None
    assert objective is not None
    assert data is not None
    assert changes is not None
    student = replace(student, changes=changes.of, layout=changes.layout)
    result = student.checkpoint()
    length = settings.text_length if isinstance(settings, Sequence) else settings.max_length
    length = length or _length(student, teacher)
    return TrainingPlan(
        kind=stage.kind,
        source=source.source,
        output=output,
        settings=settings,
        student=student,
        teacher=teacher,
        objective=objective,
        data=data,
        validation=validation,
        frozen=() if isinstance(settings, PruneTrainingSettings) else stage.ignore,
        max_length=length,
        bytes_before=source.nbytes,
        bytes_after=result.nbytes,
        memory_bytes=_memory(settings, student, result, teacher, length=length),
        disk_bytes=result.nbytes + 2 * 12 * _trained(student, result),
        notes=(*_own_teacher(settings, recipe), *changes.notes, *_notes(settings, student, teacher, data)),
        result=result,
    )


def _length(student: Student, teacher: Checkpoint | None) -> int:
    """Tokens of a text where nobody said: no more than both models take."""
    models = [shell(student), *([] if teacher is None else [teacher])]
    return min(LENGTH, *(longest(skeleton(one)) for one in models))


def _teacher(settings: DistillSettings, recipe: Recipe, source: Checkpoint, problems: Problems) -> Checkpoint | None:
    """Who is learned from; the source itself where the model as it came in is."""
    if isinstance(settings, Lsq) and settings.teacher is None and settings.alpha > 0:
        if codes := untrainable(source):
            problems.add(f"{source.source} {codes}: it can't teach itself; name a teacher, or set alpha to 0.")
        return source
    if not isinstance(settings, Logits | BiLstm | Sequence | TaughtSettings):
        return None
    if isinstance(settings, TaughtSettings) and settings.teacher is None:
        return None
    name = settings.teacher or recipe.model
    revision = None if settings.teacher else recipe.revision
    assert name is not None
    teacher = problems.tried(lambda: Checkpoint.open(name, revision=revision))
    if teacher is not None and teacher.quantization is not None:
        problems.add(f"the teacher {teacher.source} is compressed: name the original.")
    return teacher


def _origin(settings: DistillSettings, source: Checkpoint, teacher: Checkpoint | None) -> Checkpoint | None:
    """Where the student's weights come from."""
    return teacher if is_new(settings) else source


def _data(
    settings: DistillSettings, origin: Checkpoint | None, teacher: Checkpoint | None, problems: Problems
) -> tuple[Data | None, Data | None]:
    if isinstance(settings, Sequence):
        return _written(settings, teacher, problems), _running(settings, problems)
    if settings.data is None or origin is None:
        return None, None
    judge = teacher if teacher is not None else origin
    heads = [one for one in (judge, origin) if is_classifier(one.config)]
    model = problems.tried(lambda: skeleton(heads[0])) if heads else None
    names = None if model is None else class_names(model)
    found: list[Data | None] = []
    for source, split in ((settings.data, settings.data_split), (settings.validation, settings.validation_split)):
        if source is None:
            found.append(None)
            continue
        known = found[0].examples.names if found and found[0] is not None and found[0].examples else names

        def read(source: str = source, split: str = split, known: Any = known) -> Data:
            needs_labels = True if settings.needs_labels and teacher is None else None
            runs = settings.task == "language-modelling" or (
                settings.task == "auto" and not heads and is_running_text(settings, source, split)
            )
            if runs:
                return running_text(settings, source, split)
            return read_data(settings, source, split, names=known or None if not heads else known, labels=needs_labels)

        found.append(problems.tried(read))
    first, second = found
    if first is not None and second is not None and (first.examples is None) != (second.examples is None):
        problems.add(f"{first.source} and {second.source} aren't alike: one holds labelled texts, one plain text.")
    if second is not None and settings.kept == "accuracy" and not second.is_labelled:
        problems.add(f"keep: accuracy needs labels, which {second.source} hasn't got; take keep: loss.")
    return first, second


def _written(settings: Sequence, teacher: Checkpoint | None, problems: Problems) -> Data | None:
    """The texts that the teacher will write, and where their beginnings come from."""
    if teacher is None:
        return None
    model = problems.tried(lambda: skeleton(teacher))
    if model is not None and not is_causal(model):
        problems.add(f"the teacher {teacher.source} is a {type(model).__name__}, which can't write text.")
    if model is not None and settings.text_length > (limit := longest(model)):
        problems.add(f"text_length is {settings.text_length}, but the teacher takes at most {limit} tokens.")
    if settings.data is None or not settings.prompt_length:
        return Data(f"written by {teacher.source}", "", "", None, written=settings.texts)
    source, split = settings.data, settings.data_split
    prompts = problems.tried(lambda: running_text(settings, source, split))
    return None if prompts is None else replace(prompts, written=settings.texts)


def _running(settings: Sequence, problems: Problems) -> Data | None:
    source, split = settings.validation, settings.validation_split
    return None if source is None else problems.tried(lambda: running_text(settings, source, split))


def _memory(
    settings: DistillSettings, student: Student, result: Checkpoint, teacher: Checkpoint | None, *, length: int
) -> int:
    """Bytes: weights, gradients and two moments in fp32, the teacher, and activations of one batch."""
    config = skeleton(shell(student)).config.get_text_config()
    tokens = settings.train_batch_size * length
    heads, layers = (getattr(config, name, 1) for name in ("num_attention_heads", "num_hidden_layers"))
    wide = 18 * config.hidden_size + 3 * heads * length
    activations = 4 * tokens * wide * layers
    if not is_classifier(student.config):
        activations += 12 * tokens * config.vocab_size * (1 if teacher is None else 2)
    return int(
        BASE_BYTES + 16 * _trained(student, result) + 4 * (parameters_of(teacher) if teacher else 0) + activations
    )


def _trained(student: Student, result: Checkpoint) -> int:
    """How many numbers are trained: a changed linear's weight is dense until the end, and its scores are as many."""
    inside = tuple(f"{name}." for name in student.changes)
    plain = sum(math.prod(info.shape) for name, info in result.tensors.items() if not name.startswith(inside))
    changes = student.changes.values()
    return plain + sum(math.prod(change.after.shape) * (1 + ("scores" in change.rates())) for change in changes)


def _own_teacher(settings: DistillSettings, recipe: Recipe) -> list[str]:
    """What is said of a student that starts as the very model it learns from."""
    is_first = settings is recipe.stages[0].settings
    if not isinstance(settings, Logits) or settings.teacher or is_new(settings) or not is_first:
        return []
    return ["the student starts as its own teacher: name layers, student_config or another teacher"]


def _notes(settings: DistillSettings, student: Student, teacher: Checkpoint | None, data: Data) -> list[str]:
    notes = []
    if student.has_new_head:
        count = len(student.config["id2label"])
        notes.append(f"{student.origin.source} gets a new classifier of {count} outputs, with random weights")
    if teacher is not None and data.examples is not None and not data.is_labelled:
        notes.append(f"{data.source} has no labels: only the teacher is learned from")
    return notes
