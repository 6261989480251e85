"""A model's quality, measured on whatever the evaluation's data are taken for, and checked before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.schema import Evaluation

from .called import Called
from .classify import check_classification, classification_section
from .data_kind import Kind, kind_of, writes
from .measure import evaluation_section
from .progress import Progress
from .similarity import check_similarity, similarity_section
from .speed import check_room, speed_section
from .tasks import check_tasks
from .text import Windows, check_source


def check_evaluation(
    evaluation: Evaluation, results: Sequence[Checkpoint], original: Checkpoint | None, *, called: Called
) -> None:
    """Raise an error if what is planned, or there, can't be measured on `evaluation.data`, before any work is done.

    Examples are read to their end. results: what will be measured, the last one for certain; the others where they are
    of a kind that can be. original: what they are compared with. called: how the user knows the settings.
    """
    if evaluation.data is None and evaluation.task in ("classification", "similarity"):
        raise RecipeError(f"evaluate.task is {evaluation.task}, which needs evaluate.data: a file of examples.")
    check_tasks(evaluation, results[-1])
    kinds = [kind_of(evaluation, one.config) for one in results]
    if evaluation.latency and kinds[-1] != "classification":
        if not writes(results[-1].config):
            raise RecipeError("evaluate.latency times classifiers on labelled examples, and models that write text.")
        check_room(results[-1], evaluation)
    if evaluation.data is None:
        return
    classifiers = [one for one, kind in zip(results, kinds, strict=True) if kind == "classification"]
    check_classification(evaluation, classifiers, original, called=called)
    if "similarity" in kinds:
        check_similarity(evaluation, results[kinds.index("similarity")], original, called=called)
    if kinds[-1] == "tokens":
        check_source(evaluation.data, field=evaluation.field, called=called)


def windows_section(
    compressed: Checkpoint,
    original: Checkpoint | None,
    windows: Windows,
    evaluation: Evaluation,
    *,
    dtype: str,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """The report's `evaluation` of what is measured on windows of tokens."""
    machine: dict[str, Any] = {"dtype": dtype, "device": device, "progress": progress}
    masked = 0 if evaluation.data is None else evaluation.masked
    section = evaluation_section(compressed, original, windows, masked=masked, **machine)
    if evaluation.latency and writes(compressed.config):
        section["speed"] = speed_section(compressed, original, windows.tokens, evaluation, **machine)
    return section


def examples_section(
    kind: Kind,
    compressed: Checkpoint,
    original: Checkpoint | None,
    evaluation: Evaluation,
    *,
    dtype: str,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """The report's `evaluation` of what isn't measured on windows of tokens."""
    section = classification_section if kind == "classification" else similarity_section
    return section(compressed, original, evaluation, dtype=dtype, device=device, progress=progress)
