"""A classifier with exits measured at several thresholds: how right, how deep, and how fast it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.classification import wilson
from modelzip.evaluation.latency import Work, interleaved
from modelzip.recipes.schema import Evaluation
from modelzip.weights.departures import exits_taken
from modelzip.weights.exits import ExitsConfig

from .bench import Bench
from .clock import device_clock
from .feeding import Fed, feed
from .labelled import Examples
from .latency import TIMED, timed
from .opened import open_by_transformers

SIZES: Final = ("single", "batched")


def check_exits(evaluation: Evaluation, config: dict[str, Any], *, labelled: bool) -> None:
    """Raise RecipeError if thresholds are asked for where there are no exits or no labels."""
    if not evaluation.exit_threshold:
        return
    if config.get("model_type") != ExitsConfig.model_type:
        named = ", ".join(config.get("architectures") or ()) or "of no named architecture"
        raise RecipeError(
            f"evaluate.exit_threshold needs a model with exits, and the model is {named}: make one by "
            "`modelzip distill --method fastbert`, or leave the thresholds out."
        )
    if not labelled:
        raise RecipeError(
            "evaluate.exit_threshold needs labelled examples: name a file with a column of labels as evaluate.data."
        )


def exits_section(
    checkpoint: Checkpoint,
    examples: Examples,
    evaluation: Evaluation,
    bench: Bench,
) -> list[dict[str, Any]]:
    """The report's `exits`: a row for each threshold, in the order asked for. Gradients must be off.

    One pass says which exit every example would take at any threshold; times are taken by running just the layers that
    are needed, in turns with the whole model, which is the same one at threshold 0.
    """
    model = open_by_transformers(checkpoint, bench.device, dtype=bench.exact)
    fed = feed(checkpoint, model, examples, seq_len=evaluation.seq_len, batch_size=evaluation.batch_size)
    every, labels = _every_exit(fed), torch.tensor(examples.labels)
    first = examples.split(TIMED)[0]
    sizes = dict(zip(SIZES, (1, evaluation.batch_size), strict=True))
    work = {
        name: feed(checkpoint, model, first, seq_len=evaluation.seq_len, batch_size=size)
        for name, size in sizes.items()
    }
    clock = device_clock(bench.device)
    rows = []
    for threshold in evaluation.exit_threshold:
        logits, layers = exits_taken(list(every), threshold)
        right = int((logits.argmax(-1) == labels).sum())
        low, high = wilson(right, len(labels))
        times = {
            name: timed(
                interleaved(_at(one, 0.0), _at(one, threshold), clock=clock),
                batch_size=sizes[name],
                count=len(first),
            )
            for name, one in work.items()
        }
        rows.append(
            {
                "threshold": threshold,
                "accuracy": right / len(labels),
                "low": low,
                "high": high,
                "layers": float(layers.double().mean()),
                "latency": times,
            }
        )
    return rows


def _every_exit(fed: Fed) -> Tensor:
    """Logits [exits, examples, classes] in fp32 and in the examples' order, those of the whole model last."""
    found: list[Tensor] = []
    for batch in fed.batches:
        inputs = {name: value.to(fed.model.device) for name, value in batch.inputs.items()}
        found.append(torch.stack(fed.model.every_exit(**inputs)).float().cpu())
    order = torch.cat([batch.rows for batch in fed.batches]).argsort()
    return torch.cat(found, 1)[:, order]


def _at(fed: Fed, threshold: float) -> Work:
    def run() -> Iterator[Any]:
        for batch in fed.batches:
            inputs = {name: value.to(fed.model.device) for name, value in batch.inputs.items()}
            yield fed.model(**inputs, speed=threshold)

    return run
