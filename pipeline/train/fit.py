"""Whether student, teacher, task and tokens fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from modelzip.checkpoints.errors import CalibrationError, CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.compressors.distill.settings import DistillSettings, Logits, TaughtSettings
from modelzip.compressors.distill.settings_students import BiLstm, FastBert, Sequence
from modelzip.compressors.distill.signals import SIGNALS, layer_map

from ..calibrate import is_causal, longest, tokenizer_of
from ..padding import padding_of
from ..tokens import is_retokenized, same_tokens, vocabulary_size
from .data import Data
from .lesson import Objective, Predicts
from .student import Student, class_names, is_classifier

T = TypeVar("T")


class Problems:
    """Mistakes that were found, so that all of them are told at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.sentences: list[str] = []

    def add(self, sentence: str) -> None:
        """Note a mistake."""
        line = f"{self.where}: {sentence}"
        if line not in self.sentences:
            self.sentences.append(line)

    def tried(self, action: Callable[[], T]) -> T | None:
        """What the action gives, or None if it finds a mistake."""
        try:
            return action()
        except (CheckpointError, CalibrationError) as error:
            self.add(str(error))
            return None


def shell(student: Student) -> Checkpoint:
    """The student's config over its origin's tensors: enough for a skeleton."""
    return Checkpoint(student.origin.folder, dict(student.config), student.origin.tensors, student.origin.source)


def objective_of(
    settings: DistillSettings, student: Student, teacher: Checkpoint | None, problems: Problems
) -> Objective | None:
    """What the loss will be made of; None if the models don't fit together."""
    model = skeleton(shell(student))
    predicts = _predicts(model)
    if predicts is None:
        problems.add(
            f"{student.origin.source} is a {type(model).__name__}, which has neither classes nor tokens to predict: "
            "give labelled data, or a model with a head."
        )
        return None
    if isinstance(settings, FastBert):
        return Objective(predicts, direction=settings.divergence, exits=True)
    if teacher is None:
        return Objective(predicts)
    judge = problems.tried(lambda: skeleton(teacher))
    if judge is None:
        return None
    if _predicts(judge) != predicts:
        problems.add(
            f"the teacher {teacher.source} is a {type(judge).__name__} and the student a {type(model).__name__}: both "
            "must predict the same."
        )
        return None
    if predicts == "class" and [one.casefold() for one in class_names(judge)] != [
        one.casefold() for one in class_names(model)
    ]:
        problems.add(
            f"the teacher's classes are {', '.join(class_names(judge))} and the student's "
            f"{', '.join(class_names(model))}: name a teacher of the same classes."
        )
    if isinstance(settings, TaughtSettings):
        return Objective(predicts, alpha=settings.alpha, temperature=settings.temperature)
    if isinstance(settings, BiLstm):
        return Objective(predicts, alpha=settings.alpha, temperature=settings.temperature, compares=settings.objective)
    if not isinstance(settings, Logits):
        return Objective(predicts)
    layers: tuple[int, ...] = ()
    if settings.signals:
        layers = _check_signals(settings, model, judge, problems)
    return Objective(
        predicts,
        alpha=settings.alpha,
        temperature=settings.temperature,
        direction=settings.divergence,
        signals=dict(settings.signals),
        layers=layers,
    )


def _check_signals(settings: Logits, model: Any, judge: Any, problems: Problems) -> tuple[int, ...]:
    unknown = [name for name in settings.signals if name not in SIGNALS]
    if unknown:
        problems.add(f"signals names {unknown[0]}, which isn't one; known: {', '.join(SIGNALS)}.")
        return ()
    mine, theirs = (one.config.get_text_config() for one in (model, judge))
    for name in settings.signals:
        signal = SIGNALS[name]
        if signal.reads == "attention" and mine.num_attention_heads != theirs.num_attention_heads:
            problems.add(
                f"the signal {name} compares heads, and the student has {mine.num_attention_heads}, the teacher "
                f"{theirs.num_attention_heads}: leave it out."
            )
        if signal.reads == "inner" and mine.num_hidden_layers == 1:
            problems.add(f"the signal {name} leaves out the last layer, and the student has no other: take hidden.")
        if signal.reads != "attention" and not signal.projected and mine.hidden_size != theirs.hidden_size:
            problems.add(
                f"the signal {name} needs equal widths, and the student has {mine.hidden_size}, the teacher "
                f"{theirs.hidden_size}: take hidden, which has a projection."
            )
    try:
        return layer_map(mine.num_hidden_layers, theirs.num_hidden_layers, settings.layer_map)
    except ValueError as error:
        problems.add(f"{error}: give another layer_map.")
        return ()


def _predicts(model: Any) -> Predicts | None:
    if is_classifier({"architectures": [type(model).__name__]}):
        return "class" if class_names(model) else "number"
    if is_causal(model):
        return "next-token"
    return "masked-token" if type(model).__name__.endswith("ForMaskedLM") else None


def reads_whole_texts(model: Any) -> bool:
    """Whether the model says one thing of a whole text, so that its token ids may mean others than its teacher's."""
    return _predicts(model) in ("class", "number")


def check_tokens(settings: DistillSettings, student: Student, teacher: Checkpoint | None, problems: Problems) -> None:
    """One tokenizer for both models, with what the task needs, and texts no longer than the model takes."""
    model = skeleton(shell(student))
    if isinstance(settings, Sequence) and settings.text_length > (limit := longest(model)):
        problems.add(f"text_length is {settings.text_length}, but the model takes at most {limit} tokens.")
    if settings.max_length is not None and settings.max_length > (limit := longest(model)):
        problems.add(f"max_length is {settings.max_length}, but the model takes at most {limit} tokens.")
    tokenizer = problems.tried(lambda: tokenizer_of(student.origin))
    if tokenizer is None:
        return
    if reads_whole_texts(model) and padding_of(tokenizer, model.config) is None:
        problems.add(
            f"{student.origin.source} has no padding token, without which texts can't be learned in batches: set "
            "pad_token in its tokenizer_config.json."
        )
    if reads_whole_texts(model) and _lacks_end(tokenizer, model.config):
        problems.add(
            f"a {type(model).__name__} reads a text by its end, and the tokenizer of {student.origin.source} appends "
            "no end-of-sequence token: let the post_processor in its tokenizer.json append one."
        )
    if isinstance(settings, FastBert) and tokenizer.padding_side != "right":
        problems.add(
            f"the tokenizer of {student.origin.source} fills texts up on the left, and exits read the first token: set "
            "padding_side to right in its tokenizer_config.json."
        )
    if _predicts(model) == "masked-token" and tokenizer.mask_token_id is None:
        problems.add(f"{student.origin.source} has no mask token in its tokenizer, so no tokens can be hidden.")
    if teacher is None or teacher is student.origin:
        return
    is_changed = is_retokenized(student.origin) and not same_tokens(student.origin, teacher)
    if is_changed and not reads_whole_texts(model):
        problems.add(
            f"an earlier stage changes the student's tokens, and the teacher {teacher.source} has "
            f"{vocabulary_size(teacher.config)} of them in place of {vocabulary_size(student.origin.config)}: put the "
            "stage vocabulary after this one, or heal with method labels."
        )
    elif teacher.folder != student.origin.folder:
        other = problems.tried(lambda: tokenizer_of(teacher))
        if other is not None:
            _check_vocabularies(student, teacher, tokenizer.get_vocab(), other.get_vocab(), problems)


def _lacks_end(tokenizer: Any, config: Any) -> bool:
    """Whether texts end without the token at whose place transformers' encoder-decoder classifiers read them."""
    return config.is_encoder_decoder and config.eos_token_id not in tokenizer("a")["input_ids"]


def _check_vocabularies(
    student: Student, teacher: Checkpoint, mine: dict[str, int], theirs: dict[str, int], problems: Problems
) -> None:
    """A teacher of whole texts must know the student's tokens, one that predicts tokens no others."""
    if reads_whole_texts(skeleton(shell(student))):
        strange = mine.keys() - theirs.keys()
    else:
        strange = {token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)}
    if strange:
        token = min(strange, key=lambda token: min(one.get(token, 1 << 60) for one in (mine, theirs)))
        problems.add(
            f"the teacher {teacher.source} and the student speak of other tokens: {token!r} is "
            f"{theirs.get(token, 'missing')} for the teacher and {mine.get(token, 'missing')} for the student; name a "
            "teacher with the student's tokenizer."
        )


def check_extras(
    settings: DistillSettings, objective: Objective, data: Data, validation: Data | None, problems: Problems
) -> None:
    """What a cache, a baseline and a choice by accuracy need."""
    if settings.kept == "accuracy" and objective.predicts == "number":
        problems.add("keep: accuracy: this model predicts a number, which has a loss alone: take keep: loss.")
    if isinstance(settings, Logits) and settings.cache is not None:
        if objective.predicts == "masked-token":
            problems.add("cache: every epoch hides other tokens, of which the teacher says other things: leave it out.")
        if objective.predicts == "number":
            problems.add(
                "cache: it keeps the probabilities of classes, and this model predicts a number: leave it out."
            )
    if isinstance(settings, Logits | BiLstm) and settings.baseline:
        unlabelled = [one for one in (data, validation) if one is not None and one.examples and not one.is_labelled]
        if validation is None:
            problems.add("baseline: accuracies are compared on validation: give that as well.")
        if unlabelled:
            problems.add(f"baseline: {unlabelled[0].source} has no labels, which it learns from: leave it out.")
        if objective.predicts == "number":
            problems.add("baseline: accuracies are compared, and this model predicts a number: leave it out.")
