"""Classifiers measured on labelled examples, each model fed by its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from modelzip.checkpoints.errors import CheckpointError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.classification import classified
from modelzip.evaluation.latency import interleaved
from modelzip.recipes.schema import Evaluation
from modelzip.weights.exits import ExitsConfig

from .called import Called
from .early_exits import exits_section
from .feeding import Fed, class_logits, feed, open_classifier, open_whole, outputs
from .labelled import Examples, read_examples
from .latency import TIMED, timed
from .progress import Progress
from .rows import read_table
from .text import check_source

HEAD: Final = "ForSequenceClassification"


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with classes for whole texts."""
    return any(str(name).endswith(HEAD) for name in config.get("architectures") or ())


def by_labels(evaluation: Evaluation, config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json is to be evaluated on labelled examples. Raises RecipeError if it can't."""
    if evaluation.task == "classification" and not is_classifier(config):
        named = ", ".join(config.get("architectures") or ()) or "of no named architecture"
        raise RecipeError(
            f"evaluate.task is classification, but the model is {named}, which has no classes: take one that ends in "
            f"{HEAD}, or leave the task out."
        )
    if evaluation.task != "auto" or evaluation.data is None:
        return evaluation.task == "classification"
    return is_classifier(config) and _is_labelled(evaluation)


def check_evaluation(
    evaluation: Evaluation, results: Sequence[Checkpoint], original: Checkpoint | None, *, called: Called
) -> None:
    """Raise an error if what is planned, or there, can't be measured on `evaluation.data`, before any work is done.

    Labelled examples are read to their end. results: what will be measured, the last one for certain; the others where
    they have classes. original: what they are compared with. called: how the user knows the settings.
    """
    if evaluation.data is None:
        if evaluation.task == "classification":
            raise RecipeError("evaluate.task is classification, which needs evaluate.data: labelled examples.")
        return
    labelled = [one for one in results if by_labels(evaluation, one.config)]
    for names, result in {class_names(one): one for one in labelled}.items():
        _check_original(evaluation, result, original)
        read_examples(evaluation.data, names=names, called=called, **_columns(evaluation))
    if results[-1] not in labelled:
        check_source(evaluation.data, field=evaluation.field, called=called)


def _check_original(evaluation: Evaluation, result: Checkpoint, original: Checkpoint | None) -> None:
    """Raise RecipeError if an original can't be compared with, or is lacking where times are to be."""
    if original is not None and is_classifier(original.config):
        _same_order(class_names(original), class_names(result), original, result)
    elif evaluation.latency:
        raise RecipeError("evaluate.latency compares two classifiers, and no original with classes is named.")


def _is_labelled(evaluation: Evaluation) -> bool:
    """Whether the data look like labelled examples: by their kind, by the columns that are named or there."""
    assert evaluation.data is not None
    kind = Path(evaluation.data).suffix
    if evaluation.text or evaluation.pair or evaluation.label or kind in (".tsv", ".csv"):
        return True
    if kind in (".txt", ".md", ".json"):
        return False
    return bool({"label", "labels", "class"} & set(read_table(evaluation.data, split=evaluation.split).columns))


def _columns(evaluation: Evaluation) -> dict[str, Any]:
    named = {"text": evaluation.text, "pair": evaluation.pair, "label": evaluation.label}
    return {"split": evaluation.split} | {key: value or "" for key, value in named.items()}


@dataclass
class Counted:
    """Tells how many examples are done, over all models."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, more: int) -> None:
        self.done += more
        self.progress.step("evaluate", self.done, self.total)


def classification_section(
    compressed: Checkpoint,
    original: Checkpoint | None,
    evaluation: Evaluation,
    *,
    dtype: str,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """The report's `evaluation` for classifiers. Runs in fp32 unless told. Gradients must be off.

    An `original` that has no classes (a stage may have given the model its head) isn't compared with.
    """
    number = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    if original is not None and not is_classifier(original.config):
        original = None
    _check_original(evaluation, compressed, original)
    names = class_names(compressed)
    assert evaluation.data is not None
    examples = read_examples(evaluation.data, names=names, count=evaluation.examples, **_columns(evaluation))
    size = evaluation.batch_size
    sources = [compressed] if original is None else [compressed, original]
    fed = [
        feed(one, open_classifier(one, number, device), examples, seq_len=evaluation.seq_len, batch_size=size)
        for one in sources
    ]
    report = Counted(progress, len(examples) * len(sources))
    logits = [class_logits(one, report) for one in fed]
    if original is not None:
        logits[1] = logits[1][:, _same_order(class_names(original), names, original, compressed)]
    labels = torch.tensor(examples.labels)
    figures = classified(logits[1] if original is not None else None, logits[0], labels)
    if evaluation.latency and original is not None:
        figures["latency"] = latency_section(compressed, original, examples, evaluation, dtype=number, device=device)
    if evaluation.exit_threshold and compressed.config.get("model_type") == ExitsConfig.model_type:
        figures["exits"] = exits_section(compressed, examples, evaluation, dtype=number, device=device)
    return {
        "protocol": {
            "source": examples.source,
            "sha256": examples.sha256,
            "examples": len(examples),
            "cut": max(one.cut for one in fed),
            "seq_len": min(one.length for one in fed),
            "dtype": str(number).removeprefix("torch."),
        },
        "perplexity": {"original": None, "compressed": None},
        **figures,
    }


def class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The model's classes in the order of its logits. Raises CheckpointError for one that predicts a number."""
    stated = checkpoint.config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if len(stated) == 1 or checkpoint.config.get("problem_type") in ("regression", "multi_label_classification"):
        raise CheckpointError(
            f"{checkpoint.source} predicts numbers or several labels at once, which has no accuracy: name a "
            "classifier of one class a text."
        )
    return tuple(str(stated[key]) for key in sorted(stated, key=int))


def _same_order(names: Sequence[str], wanted: Sequence[str], model: Checkpoint, other: Checkpoint) -> list[int]:
    """The columns of the model's logits in the order of the other's classes. Raises RecipeError if they differ."""
    if len(names) != len(wanted):
        raise RecipeError(
            f"{model.source} has {len(names)} classes and {other.source} has {len(wanted)}: name the original that it "
            "was made from with --against."
        )
    places = {name.casefold(): place for place, name in enumerate(names)}
    if places.keys() != {name.casefold() for name in wanted}:
        return list(range(len(names)))
    return [places[name.casefold()] for name in wanted]


def latency_section(
    compressed: Checkpoint,
    original: Checkpoint,
    examples: Examples,
    evaluation: Evaluation,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Times of both models, opened whole, over the first examples: one by one, and in batches."""
    first = examples.split(TIMED)[0]
    pairs = [(checkpoint, open_whole(checkpoint, dtype, device)) for checkpoint in (original, compressed)]
    found = {}
    for name, size in (("single", 1), ("batched", evaluation.batch_size)):
        fed = [feed(*pair, first, seq_len=evaluation.seq_len, batch_size=size) for pair in pairs]
        times = interleaved(*(_work(one, device) for one in fed))
        found[name] = timed(times, batch_size=size, count=len(first))
    return found


def _work(fed: Fed, device: torch.device) -> Callable[[], None]:
    def run() -> None:
        for _ in outputs(fed):
            pass
        if device.type != "cpu":
            getattr(torch, device.type).synchronize(device)

    return run
