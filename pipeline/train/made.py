"""Which model becomes the student: what came in, a smaller teacher, or one of our own kinds."""

from __future__ import annotations

from typing import Any

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.compressors.distill.settings import DistillSettings, Logits
from modelzip.compressors.distill.settings_students import BiLstm, FastBert

from ..calibrate import tokenizer_of
from ..padding import padding_of
from .data import Data
from .fit import Problems, shell
from .own import bilstm_config, exits_config
from .sizes import with_sizes
from .student import Start, Student, class_names, is_classifier, with_classes, with_layers


def is_new(settings: DistillSettings) -> bool:
    """Whether the student is made from the teacher, not what came in."""
    return isinstance(settings, BiLstm) or _is_smaller(settings)


def _is_smaller(settings: DistillSettings) -> bool:
    """Whether the student is the teacher with fewer layers or smaller sizes."""
    return isinstance(settings, Logits) and (settings.layers is not None or settings.student_config is not None)


def _own_student(settings: BiLstm | FastBert, origin: Checkpoint, data: Data, problems: Problems) -> Student | None:
    """A student of our own kind; its origin is the classifier that it learns from, or gets the exits."""
    model = problems.tried(lambda: skeleton(origin))
    tokenizer = problems.tried(lambda: tokenizer_of(origin))
    if model is None or tokenizer is None:
        return None
    if not is_classifier(origin.config) or data.examples is None:
        problems.add(
            f"{origin.source} is a {type(model).__name__}, which has no logits for a whole text: train it with method "
            "labels first."
        )
        return None
    padding = padding_of(tokenizer, model.config)
    more = (origin, class_names(model), None if padding is None else padding.token)
    start: Start
    if isinstance(settings, BiLstm):
        config = problems.tried(lambda: bilstm_config(settings, *more))
        start = "principal" if settings.start == "teacher" else "random"
    else:
        config, start = problems.tried(lambda: exits_config(settings, *more)), "exits"
    return None if config is None else Student(config, origin, start)


def student_of(
    settings: DistillSettings, origin: Checkpoint, teacher: Checkpoint | None, data: Data, problems: Problems
) -> Student | None:
    if isinstance(settings, BiLstm | FastBert):
        return _own_student(settings, origin, data, problems)
    config: dict[str, Any] = dict(origin.config)
    start: Start = "whole"
    layers: tuple[int, ...] = ()
    if isinstance(settings, Logits) and settings.layers is not None:
        start, layers = "layers", settings.layers
        config = problems.tried(lambda: with_layers(origin, layers)) or config
    elif isinstance(settings, Logits) and settings.student_config is not None:
        start, sizes = settings.start, settings.student_config
        config = problems.tried(lambda: with_sizes(origin, sizes)) or config
    student = Student(config, origin, start, layers)
    if data.examples is None or is_classifier(config):
        model = problems.tried(lambda: skeleton(shell(student)))
        return None if model is None else student
    names = data.examples.names
    if teacher is not None:
        judge = problems.tried(lambda: skeleton(teacher))
        if judge is None:
            return None
        if not is_classifier(teacher.config):
            problems.add(
                f"the teacher {teacher.source} is a {type(judge).__name__}, which has no logits for a whole text: "
                "train it with method labels first, or take task: language-modelling."
            )
            return None
        names = class_names(judge)
    tokenizer = problems.tried(lambda: tokenizer_of(origin))
    if tokenizer is None:
        return None
    made = problems.tried(lambda: with_classes(shell(student), names, tokenizer.pad_token_id))
    return None if made is None else Student(made, origin, start, layers, has_new_head=True)
