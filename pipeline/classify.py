"""Classifiers measured on labelled examples, each model fed by its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.agreement import divergence_figures
from modelzip.evaluation.classification import classified
from modelzip.evaluation.scores import class_scores, number_scores
from modelzip.recipes.schema import Evaluation
from modelzip.weights.exits import ExitsConfig

from .bench import Bench
from .called import Called
from .data_kind import Counted, columns_of, is_classifier
from .early_exits import exits_section
from .feeding import class_logits, feed, open_classifier
from .labelled import Examples, read_examples
from .latency import latency_section


def check_classification(
    evaluation: Evaluation, results: Sequence[Checkpoint], original: Checkpoint | None, *, called: Called
) -> None:
    """Raise an error if classifiers can't be measured on `evaluation.data`, which is read to its end."""
    assert evaluation.data is not None
    for names, result in {class_names(one): one for one in results}.items():
        _check_original(evaluation, result, original)
        read_examples(evaluation.data, names=names, called=called, **columns_of(evaluation))


def _check_original(evaluation: Evaluation, result: Checkpoint, original: Checkpoint | None) -> None:
    """Raise RecipeError if an original can't be compared with, or is lacking where times are to be."""
    if original is not None and is_classifier(original.config):
        _same_order(class_names(original), class_names(result), original, result)
    elif evaluation.latency:
        raise RecipeError("evaluate.latency compares two classifiers, and no original with classes is named.")


def classification_section(
    compressed: Checkpoint,
    original: Checkpoint | None,
    evaluation: Evaluation,
    bench: Bench,
) -> dict[str, Any]:
    """The report's `evaluation` for classifiers. Gradients must be off.

    An `original` that has no classes (a stage may have given the model its head) isn't compared with.
    """
    if original is not None and not is_classifier(original.config):
        original = None
    _check_original(evaluation, compressed, original)
    names = class_names(compressed)
    assert evaluation.data is not None
    examples = read_examples(evaluation.data, names=names, count=evaluation.examples, **columns_of(evaluation))
    taken = {"seq_len": evaluation.seq_len, "batch_size": evaluation.batch_size}
    sources = [compressed] if original is None else [compressed, original]
    fed = [feed(one, open_classifier(one, bench.exact, bench.device), examples, **taken) for one in sources]
    report = Counted(bench.progress, len(examples) * len(sources))
    logits = [class_logits(one, report) for one in fed]
    if original is not None and names:
        logits[1] = logits[1][:, _same_order(class_names(original), names, original, compressed)]
    figures = figures_of(logits[1] if original is not None else None, logits[0], examples)
    if evaluation.latency and original is not None:
        figures["latency"] = latency_section(compressed, original, examples, evaluation, bench)
    if evaluation.exit_threshold and compressed.config.get("model_type") == ExitsConfig.model_type:
        figures["exits"] = exits_section(compressed, examples, evaluation, bench)
    return {
        "protocol": {
            "source": examples.source,
            "sha256": examples.sha256,
            "examples": len(examples),
            "cut": max(one.cut for one in fed),
            "seq_len": min(one.length for one in fed),
            "dtype": str(bench.exact).removeprefix("torch."),
        },
        "perplexity": {"original": None, "compressed": None},
        **figures,
    }


def figures_of(original: Tensor | None, compressed: Tensor, examples: Examples) -> dict[str, Any]:
    """The report's figures for logits [examples, classes] of both models, or for the numbers [examples, 1] they say."""
    labels = torch.tensor(examples.labels)
    if examples.names:
        return classified(original, compressed, labels) | class_scores(original, compressed, labels)
    both = (None if original is None else original[:, 0], compressed[:, 0])
    return {**divergence_figures(None), "top1_agreement": None, **number_scores(*both, labels)}


def class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The model's classes in the order of its logits, none where it predicts a number. Raises CheckpointError."""
    stated = checkpoint.config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    kind = checkpoint.config.get("problem_type")
    if kind == "multi_label_classification" or (kind == "regression" and len(stated) > 1):
        raise CheckpointError(
            f"{checkpoint.source} predicts several labels or numbers at once, which modelzip doesn't measure: name a "
            "model of one class, or one number, a text."
        )
    return () if len(stated) == 1 else tuple(str(stated[key]) for key in sorted(stated, key=int))


def _same_order(names: Sequence[str], wanted: Sequence[str], model: Checkpoint, other: Checkpoint) -> list[int]:
    """The columns of the model's logits in the order of the other's classes. Raises RecipeError if they differ."""
    if len(names) != len(wanted):
        mine, theirs = (f"has {len(one)} classes" if one else "predicts a number" for one in (names, wanted))
        raise RecipeError(
            f"{model.source} {mine} and {other.source} {theirs}: name the original that it was made from with "
            "--against."
        )
    places = {name.casefold(): place for place, name in enumerate(names)}
    if places.keys() != {name.casefold() for name in wanted}:
        return list(range(len(names)))
    return [places[name.casefold()] for name in wanted]
