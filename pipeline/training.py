"""One stage of the training engine: from a checkpoint to a checkpoint, by transformers' Trainer.

Started by `accelerate launch`, every process runs this; one of them writes and speaks. The trainer's own checkpoints
lie in the workspace of the hidden folder beside the target, so a killed run goes on after the last of them, on the
same curve and to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.target import workspace_of
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.distill.settings import DistillSettings, Logits
from modelzip.compressors.distill.settings_students import BiLstm
from modelzip.compressors.prune.settings_training import Lottery, ScheduledSettings
from modelzip.recipes.match import matches

from . import ranks
from .context import Context
from .identity import PROVENANCE, header_hash
from .text import Windows
from .train.beside import Beside, labels_alone
from .train.data import Data
from .train.growing import Growing, span
from .train.judge import open_teacher
from .train.lesson import Lesson
from .train.lessons import Lessons, lessons_of
from .train.made import is_new
from .train.opening import open_student
from .train.plan import TrainingPlan, plan_training
from .train.rhythm import Beat, best_row, kept_row, last_checkpoint
from .train.rounds import Named, Rounds, rewind_step
from .train.student import Student
from .train.trainer import Course, Learned, train
from .train.written import PART, write_student

__all__ = ["TrainingPlan", "plan_training", "run_training", "training_fingerprint", "training_section"]

ATTENTION_DROPOUT: Final = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""What models of transformers call the share of attention probabilities that training drops."""


def training_fingerprint(context: Context, plan: TrainingPlan) -> str:
    """What a resumed stage must share with the interrupted one: data, teacher and number of processes among it."""
    of = [plan.data.sha256(), plan.validation.sha256() if plan.validation else "", ranks.count()]
    is_source = plan.teacher is plan.student.origin and plan.student.start == "whole"
    of.append(header_hash(plan.teacher) if plan.teacher and not is_source else "")
    return context.fingerprint + hashlib.sha256(json.dumps(of).encode()).hexdigest()


def run_training(
    plan: TrainingPlan,
    source: Checkpoint,
    *,
    target: Path,
    describe: Callable[[dict[str, Any]], bytes],
    overwrite: bool,
    resume: bool,
    context: Context,
    windows: Windows | None = None,
    callbacks: Iterable[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train what the plan names and publish it at `target`; returns the record, with the loss curve.

    source: the checkpoint that was planned on, its weights there by now. describe: makes modelzip.json from the
    record. windows: aren't looked at. callbacks: a method's own schedule. Every process gets the record, when the
    output is there. Raises what the writer raises, RecipeError if the loss is no number any more.
    """
    ranks.join(context.device)
    student = _on(plan.student, plan, source)
    with _writing(plan, student.origin, target, overwrite=overwrite, resume=resume, context=context) as writer:
        record = ranks.told(writer.done[PART]["training"] if writer and PART in writer.done else None)
        if record is None:
            learned, record = _learned(plan, student, target=target, context=context, callbacks=callbacks)
            if writer:
                write_student(writer, student, learned, record)
        if writer:
            config = student.written_config(writer.done[PART]["forms"])
            writer.finish(config=config, files={PROVENANCE: describe(record)})
        ranks.wait()
    return dict(record)


def training_section(record: Mapping[str, Any]) -> dict[str, Any]:
    """The report's plain data: the curve, its best measurement and what was kept."""
    curve = record["curve"]
    settled = [row for row in curve if row["step"] >= record["settled"]]
    best = best_row(settled, record["keep"] if record["keep"] != "last" else "loss")
    names = ("step", "eval_loss", "accuracy")
    return {
        "method": record["method"],
        "task": record["task"],
        "teacher": record["teacher"],
        "data": record["data"],
        "steps": record["steps"],
        "epochs": curve[-1]["epoch"] if curve else 0.0,
        "stopped_early": record["stopped_early"],
        "first_loss": curve[0]["loss"] if curve else None,
        "last_loss": curve[-1]["loss"] if curve else None,
        "best": None if best is None else {name: best[name] for name in names if name in best},
        "kept": kept_row(curve, record["kept_step"]),
        **({"baseline": record["baseline"]} if "baseline" in record else {}),
        "curve": curve,
        "runs": record["runs"],
    }


def _on(student: Student, plan: TrainingPlan, source: Checkpoint) -> Student:
    """The planned student, with the weights that are there now in place of headers that were foreseen."""
    return student if is_new(plan.settings) else replace(student, origin=source)


@contextmanager
def _writing(
    plan: TrainingPlan, origin: Checkpoint, target: Path, *, overwrite: bool, resume: bool, context: Context
) -> Iterator[CheckpointWriter | None]:
    """The writer in the main process, None in all others, which go on when it has prepared the folder."""
    if not ranks.is_main():
        ranks.wait()
        yield None
        return
    fingerprint = training_fingerprint(context, plan)
    with CheckpointWriter.open(
        target, source=origin, fingerprint=fingerprint, overwrite=overwrite, resume=resume
    ) as writer:
        ranks.wait()
        yield writer


def _learned(
    plan: TrainingPlan, student: Student, *, target: Path, context: Context, callbacks: Iterable[TrainerCallback]
) -> tuple[Learned, dict[str, Any]]:
    """Train, and say how it went."""
    settings, seed = plan.settings, context.recipe.seed
    make = _teaching(plan, student, seed=seed)
    lesson = make()
    work = workspace_of(target)
    lessons = lessons_of(plan, student, lesson.config, work=work, context=context)
    steps = _steps(plan, len(lessons.material))
    course = Course(
        settings,
        steps,
        _beat(plan, steps, len(lessons.material), measures=lessons.measured is not None),
        seed,
        context.device,
    )
    progress = ranks.voice(context.progress)

    def trial(lesson: Lesson, work: Path, *, name: str = "train", schedules: Iterable[TrainerCallback] = ()) -> Learned:
        return train(
            lesson,
            course,
            material=lessons.material,
            measured=lessons.measured,
            work=work,
            resume_from=ranks.told(last_checkpoint(work) if ranks.is_main() else None),
            progress=Named(progress, name),
            callbacks=[*_boards(plan, name), *schedules, *callbacks],
        )

    runs: list[dict[str, Any]] = []
    if isinstance(settings, Lottery):
        matrices, rewind = tuple(student.changes), rewind_step(settings.rewind, steps)
        learned, runs = Rounds(settings, matrices, rewind, seed, work=work, make=make, trial=trial).train()
    else:
        learned = trial(lesson, work, schedules=_schedules(settings, lesson, steps))
    record = _record(plan, learned, course, lessons) | {"runs": runs}
    if isinstance(settings, Logits | BiLstm) and settings.baseline:
        shared = Beside(course, lessons.material, lessons.measured, work)
        voice = ranks.voice(context.progress)
        voice.say("training the same student on labels alone")
        record["baseline"] = labels_alone(
            shared, lambda: _trainable(plan, student, seed=seed), plan.objective, seed=seed, progress=voice
        )
    return learned, record


def _record(plan: TrainingPlan, learned: Learned, course: Course, lessons: Lessons) -> dict[str, Any]:
    """How the training went, as plain data."""
    measured, validation = lessons.measured, plan.validation
    return {
        "method": plan.settings.method,
        "task": plan.objective.predicts,
        "teacher": None if plan.teacher is None else plan.teacher.source,
        "data": _described(plan.data, len(lessons.material)),
        "validation": None if validation is None or measured is None else _described(validation, len(measured)),
        "steps": learned.steps,
        "planned_steps": course.steps,
        "processes": ranks.count(),
        "keep": plan.settings.kept,
        "settled": course.beat.settled,
        "kept_step": learned.kept,
        "stopped_early": learned.stopped_early,
        "curve": learned.curve,
        "notes": list(lessons.notes),
    }


def _beat(plan: TrainingPlan, steps: int, examples: int, *, measures: bool) -> Beat:
    settings = plan.settings
    epoch = max(1, math.ceil(examples / _batch(plan)))
    return Beat(
        log=settings.log_every,
        save=settings.save_every,
        measure=settings.eval_every or epoch if measures else None,
        patience=settings.early_stopping,
        keep=settings.kept,
        settled=span(settings, steps)[1] if isinstance(settings, ScheduledSettings) else 0,
    )


def _schedules(settings: DistillSettings, lesson: Lesson, steps: int) -> list[TrainerCallback]:
    """What a method changes from step to step."""
    return [Growing(settings, lesson, steps=steps)] if isinstance(settings, ScheduledSettings) else []


def _described(data: Data, count: int) -> dict[str, Any]:
    return {"source": data.source, "examples": count, "sha256": data.sha256()}


def _batch(plan: TrainingPlan) -> int:
    """Examples that one step of the optimizer sees, in all processes."""
    return plan.settings.train_batch_size * plan.settings.gradient_accumulation * ranks.count()


def _steps(plan: TrainingPlan, examples: int) -> int:
    """Steps of the optimizer: as many as were asked for, or as the epochs have."""
    settings = plan.settings
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(examples / (settings.train_batch_size * ranks.count()))
    return max(1, math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation)))


def _teaching(plan: TrainingPlan, student: Student, *, seed: int) -> Callable[[], Lesson]:
    """A function that makes the lesson anew, with the student as it came in; the teacher is opened once."""
    teacher = None
    if plan.teacher is not None and plan.objective.alpha is not None and not _is_cached(plan):
        is_source = plan.teacher is plan.student.origin
        judge = student.origin if is_source else plan.teacher
        teacher = open_teacher(judge, student.origin, attention=_attention(plan))

    def make() -> Lesson:
        model = _trainable(plan, student, seed=seed)
        lesson = Lesson(model, plan.objective, teacher=teacher, seed=seed)
        for name, change in student.changes.items():
            lesson.rates |= {f"student.{name}.{leaf}": rate for leaf, rate in change.rates().items()}
        return lesson

    return make


def _is_cached(plan: TrainingPlan) -> bool:
    return isinstance(plan.settings, Logits) and plan.settings.cache is not None


def _attention(plan: TrainingPlan) -> str | None:
    return "eager" if "attention" in plan.objective.reads else None


def _trainable(plan: TrainingPlan, student: Student, *, seed: int) -> Any:
    """The student's model at its start, with what is to be left alone.

    Where attention is compared, none of it is dropped out: transformers gives out what dropout has left. The
    config.json that is written keeps its own dropout.
    """
    if "attention" in plan.objective.reads:
        student = replace(student, config={**student.config, **dict.fromkeys(ATTENTION_DROPOUT, 0.0)})
    model = open_student(student, seed=seed, attention=_attention(plan))
    for name, module in model.named_modules():
        if any(matches(pattern, name) for pattern in plan.frozen):
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("Nothing is left to train: every module is ignored.")
    return model


def _boards(plan: TrainingPlan, name: str) -> list[TrainerCallback]:
    """Curves of a training under its name: one that begins would hide those of another in the same folder."""
    if not plan.settings.tensorboard or not ranks.is_main():
        return []
    from .train.board import Board

    return [Board(plan.output.with_name(f"{plan.output.name}.tensorboard") / name)]
