"""The tokens of a training: read, written by a teacher, or with what a teacher says of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save
from torch import Tensor

from modelzip.checkpoints.shards import write_file
from modelzip.compressors.distill.settings import Logits
from modelzip.compressors.distill.settings_students import Sequence

from .. import ranks
from ..calibrate import tokenizer_of
from ..context import Context
from ..padding import Padding, padding_of
from ..teachertext import teacher_texts
from .cached import CachedTeacher, cache_of, fill, missing
from .data import masking_of, material_of, prompts_of, written_material
from .judge import open_teacher, translation
from .material import Material
from .plan import TrainingPlan
from .student import Student

TEXTS: Final = "texts.safetensors"
"""The file in the workspace that holds what the teacher wrote."""


@dataclass(frozen=True)
class Lessons:
    """Tokens to learn from and to measure on, and what had to be cut."""

    material: Material
    measured: Material | None
    notes: tuple[str, ...]


def lessons_of(plan: TrainingPlan, student: Student, config: Any, *, work: Path, context: Context) -> Lessons:
    """The tokens of the plan's data, with what a teacher writes or says where that is kept on disk.

    config: the student's. work: the workspace of the run.
    """
    seed = context.recipe.seed
    tokenizer = tokenizer_of(student.origin)
    predicts = plan.objective.predicts
    padding = padding_of(tokenizer, config) or Padding(0, 0, "right")
    masking = masking_of(tokenizer, len(tokenizer), seed) if predicts == "masked-token" else None
    made: list[Material | None] = []
    notes: list[str] = []
    for data in (plan.data, plan.validation):
        if data is None:
            made.append(None)
            continue
        if data.written:
            assert isinstance(plan.settings, Sequence)
            texts = _written(plan, plan.settings, tokenizer, work=work, context=context)
            made.append(written_material(texts, plan.settings, padding))
            continue
        material, note = material_of(
            data,
            tokenizer,
            predicts=predicts,
            padding=padding,
            max_length=plan.max_length,
            masking=masking,
        )
        made.append(material)
        notes += [note] if note else []
    first, second = made
    assert first is not None
    if isinstance(plan.settings, Logits) and plan.settings.cache is not None:
        _hear(plan, plan.settings, student, [one for one in made if one is not None], context=context)
    return Lessons(first, second, tuple(notes))


def _hear(
    plan: TrainingPlan, settings: Logits, student: Student, materials: list[Material], *, context: Context
) -> None:
    """Give each material what the teacher says of it, which runs only where its cache isn't complete."""
    assert plan.teacher is not None
    teacher: Any = None
    ids = translation(student.origin, plan.teacher)
    for material in materials:
        folder = cache_of(settings, plan.teacher, material, ids=ids)
        if ranks.is_main() and missing(folder, len(material)):
            if teacher is None:
                teacher = open_teacher(plan.teacher, student.origin).to(context.device)
            fill(folder, material, teacher, settings, report=partial(context.progress.step, "teacher"))
        ranks.wait()
        material.teacher = CachedTeacher(folder)


def _written(plan: TrainingPlan, settings: Sequence, tokenizer: Any, *, work: Path, context: Context) -> Tensor:
    """The teacher's texts, int64 [texts, length]: written once, by one process, and found again by a resumed run."""
    teacher, file = plan.teacher, work / TEXTS
    assert teacher is not None
    if ranks.is_main() and not file.exists():
        prompts = prompts_of(plan.data, tokenizer, length=settings.prompt_length) if settings.prompt_length else None
        progress = context.progress
        texts = teacher_texts(
            teacher.folder,
            prompts,
            count=settings.texts,
            length=settings.text_length,
            temperature=settings.sampling_temperature,
            seed=context.recipe.seed,
            device=context.device,
            report=lambda done, total: progress.step("write text", done, total, "the teacher's"),
        )
        work.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".partial")
        write_file(draft, save({"texts": texts}))
        os.replace(draft, file)
    ranks.wait()
    return load_file(file)["texts"]
