"""What a stage that trains must not ask for, by itself and after the stages before it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.compressors.distill.settings import DistillSettings, Logits
from modelzip.compressors.distill.settings_students import BiLstm, FastBert, Lsq, Sequence
from modelzip.recipes.match import matches
from modelzip.recipes.schema import Recipe, Stage
from modelzip.weights.exits import ExitsConfig
from modelzip.weights.experts import UNFUSED

from ..calibrate import longest
from ..data_kind import kind_of
from .cached import cache_root
from .fit import Problems, shell
from .made import is_new
from .student import Student, untrainable


def check_stage(stage: Stage, source: Checkpoint, problems: Problems) -> None:
    """What the stage says by itself, and whether what comes in can be trained."""
    settings = stage.settings
    if stage.rules:
        problems.add("a model is trained as a whole, so rules can't change settings for some modules: leave them out.")
    if settings.data is None and not isinstance(settings, Sequence):
        problems.add("no data is named: give data, a file with labelled texts or plain text, or a hub dataset.")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        problems.add("tensorboard needs the package of that name: install it, or leave tensorboard out.")
    if isinstance(settings, BiLstm | FastBert) and settings.task == "language-modelling":
        problems.add(f"{settings.method} makes a classifier, so task can't be language-modelling: leave it out.")
    if source.config.get("model_type") == ExitsConfig.model_type and not is_new(settings):
        problems.add(f"{source.source} has exits already, and they aren't trained any further: train what it is from.")
    is_learned = isinstance(settings, Lsq)  # codes that come in are learned from there: see `changes`
    if isinstance(settings, FastBert) and source.quantization is not None:
        problems.add(f"{source.source} is compressed, and exits are put on an ordinary classifier: do that first.")
    elif (source.quantization or {}).get(UNFUSED):
        problems.add(f"{source.source} holds its experts one by one: train it first, and compress it then.")
    elif not is_new(settings) and not is_learned and (reason := untrainable(source)) is not None:
        problems.add(f"{source.source} {reason}: train it first, and compress it then.")


def check_origin(
    stage: Stage, source: Checkpoint, teacher: Checkpoint | None, *, recipe: Recipe, problems: Problems
) -> None:
    """A student that is made of the teacher would throw away what the stage was given."""
    settings = stage.settings
    assert isinstance(settings, DistillSettings)
    if teacher is None or not is_new(settings):
        return
    if settings is not recipe.stages[0].settings:
        instead = "prune before this one, by method layers" if getattr(settings, "layers", None) else "put it first"
        problems.add(
            f"its student is made anew of the teacher {teacher.source}, so what the stages before it made would be "
            f"lost: {instead}."
        )
    elif teacher.folder != source.folder:
        problems.add(
            f"its student is made of the teacher {teacher.source}, so {source.source} would not be used: give the "
            "teacher as the model, and leave teacher out."
        )


def check_cache(settings: Logits, folders: Mapping[str, Path], problems: Problems) -> None:
    """A cache must not lie in a folder of these, which are named by what they hold."""
    if settings.cache is None:
        return
    root = cache_root(settings).resolve()
    for name, folder in folders.items():
        if (place := folder.expanduser().resolve()) == root or place in root.parents:
            problems.add(f"cache: {settings.cache} lies in the folder of {name} ({place}): name another folder.")
            return


def check_windows(student: Student, recipe: Recipe, problems: Problems) -> None:
    """A student of fewer positions than its teacher must take the windows of text that it will be measured on."""
    if not recipe.evaluate.enabled or kind_of(recipe.evaluate, student.config) != "tokens":
        return
    own = recipe.evaluate.data is not None
    name, length = ("evaluate", recipe.evaluate.seq_len) if own else ("calibration", recipe.calibration.seq_len)
    mine, theirs = (longest(skeleton(one)) for one in (shell(student), student.origin))
    if mine < min(length, theirs):
        problems.add(
            f"the student takes at most {mine} tokens, and windows of {length} measure it: set {name}.seq_len to "
            f"{mine}, or leave the evaluation out."
        )


def check_patterns(stage: Stage, student: Student, problems: Problems) -> None:
    """Every pattern of what stays as it is must match a module of the student."""
    names = [name for name, _ in skeleton(shell(student)).named_modules()]
    for pattern in stage.ignore:
        if not any(matches(pattern, name) for name in names):
            problems.add(f"the pattern {pattern!r} matches no module.")
