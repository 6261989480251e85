"""What is checked before any work is done, beyond what the plan checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import torch

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.checkpoints.target import partial_of
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.evaluation.gates import Gate
from modelzip.kernels import dispatch

from .calibrate import is_causal
from .classify import is_classifier
from .context import Run
from .engines import stage_fingerprint
from .folders import check_left
from .identity import header_hash
from .room import check_machine
from .tokens import same_tokens, vocabulary_size

REPORT: Final = "report.json"


def check_kernels(device: torch.device) -> None:
    """Raise RecipeError if the kernels can't take the path that the environment names."""
    try:
        dispatch.product_path(torch.empty(0, device=device))
    except ValueError as error:
        raise RecipeError(f"{error}.") from None


def check_measures(gates: Sequence[Gate], checkpoint: Checkpoint, *, labelled: bool, latency: bool) -> None:
    """Raise RecipeError for a condition on what isn't measured: labelled examples have no perplexity, windows of tokens
    no accuracy, and times are taken only if asked for.
    """
    for gate in gates:
        for name in gate.needs:
            metric = name.removeprefix("original.")
            if metric == "accuracy" and not labelled:
                raise RecipeError(
                    f'The condition "{gate.text}" needs the accuracy, for which {checkpoint.source} must be a '
                    "classifier, and the evaluation's data must have labels: name a file with a column of labels."
                )
            if labelled and metric in ("perplexity", "hidden_error"):
                raise RecipeError(
                    f'The condition "{gate.text}" needs {name}, which labelled examples don\'t give: take accuracy or '
                    "kl, or evaluate.task: tokens."
                )
            if metric in ("speedup", "single_speedup") and not (labelled and latency):
                raise RecipeError(
                    f'The condition "{gate.text}" needs times, which are taken with evaluate.latency: true (--latency) '
                    "for classifiers."
                )


def check_predicts(gates: Sequence[Gate], model: Any, checkpoint: Checkpoint) -> None:
    """Raise RecipeError for a condition on the perplexity of a model that doesn't predict the next token."""
    for gate in gates:
        if any(name.endswith("perplexity") for name in gate.needs) and not is_causal(model):
            raise RecipeError(
                f'The condition "{gate.text}" needs the perplexity, but {checkpoint.source} is a '
                f"{type(model).__name__}, which doesn't predict the next token: take kl or hidden_error."
            )


def report_of(run: Run) -> dict[str, Any] | None:
    """The report of a finished output; None if it has none, or one that came along with the input."""
    file = run.output / REPORT
    if not file.exists():
        return None
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report if report["source"]["sha256"] == header_hash(run.checkpoint) else None


def check_room(run: Run, *, overwrite: bool, resume: bool) -> None:
    """Raise MachineError or OutputError if there is no room for the output, and say what the plans have to say."""
    targets = run.targets
    parts = [file for target in targets for file in partial_of(target).rglob("*") if resume and file.is_file()]
    written = sum(file.stat().st_size for file in parts)
    for plan, target in zip(run.plans, targets, strict=True):
        check_machine(target, disk_bytes=plan.disk_bytes - written, memory_bytes=plan.memory_bytes)
    if run.output.parent.exists():  # a new output's first work may be minutes of writing text: refuse it before
        last = stage_fingerprint(run.context, run.plans[-1])
        CheckpointWriter.open(
            run.output, source=run.checkpoint, fingerprint=last, overwrite=overwrite, resume=resume
        ).close()
    earlier = [stage_fingerprint(run.context, plan) for plan in run.plans[:-1]]
    check_left(run, earlier, overwrite=overwrite, resume=resume)
    for note in dict.fromkeys(note for plan in run.plans for note in plan.notes):
        run.context.progress.say(note)


def check_classes(model: Checkpoint, original: Checkpoint | None) -> None:
    """Raise RecipeError if a classifier is to be compared with a model that has no classes."""
    if original is not None and not is_classifier(original.config):
        raise RecipeError(
            f"{original.source} is a {type(skeleton(original)).__name__}, which has no classes to compare with: name "
            f"the classifier that {model.source} was made from with --against, or leave it out."
        )


def check_alone(model: Any, checkpoint: Checkpoint) -> None:
    """Raise RecipeError if windows of text say nothing of a model without another to compare it with."""
    if not is_causal(model):
        examples = "labelled examples with --data, or " if is_classifier(checkpoint.config) else ""
        raise RecipeError(
            f"{checkpoint.source} is a {type(model).__name__}, of which text alone measures nothing: name {examples}an "
            "original to compare with by --against."
        )


def check_comparable(model: Checkpoint, original: Checkpoint) -> None:
    """Raise RecipeError if the two models don't speak of the same tokens."""
    if not same_tokens(model, original):
        sizes = [vocabulary_size(one.config) for one in (model, original)]
        raise RecipeError(
            f"{model.source} has a vocabulary of {sizes[0]} tokens and {original.source} one of {sizes[1]}: name the "
            "original that it was made from with --against."
        )


def incomparable(run: Run) -> str | None:
    """Why windows of text can't show what the result has lost, as a sentence; None if they can, or aren't to."""
    result = run.plans[-1].result
    if not run.context.recipe.evaluate.enabled or run.by_labels or same_tokens(result, run.checkpoint):
        return None
    before, after = (vocabulary_size(one.config) for one in (run.checkpoint, result))
    return (
        f"the result isn't compared with the original: of {before} tokens it has {after}, so the same text is other "
        "tokens to it; labelled examples (evaluate.data) compare classifiers with different tokens"
    )


def check_comparison(gates: Sequence[Gate], run: Run) -> None:
    """Raise RecipeError for a condition on a comparison that can't be made."""
    if gates and (reason := incomparable(run)) is not None:
        raise RecipeError(f'The condition "{gates[0].text}" can\'t be checked: {reason}.')
