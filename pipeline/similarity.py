"""Sentence encoders measured by their embeddings of texts, or of pairs of texts that people have scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.agreement import divergence_figures
from modelzip.evaluation.embeddings import POOLINGS, compared
from modelzip.recipes.schema import Evaluation

from .bench import Bench
from .called import EVALUATE, Called
from .data_kind import Counted, columns_of
from .feeding import Fed, feed, outputs
from .labelled import Examples, read_texts
from .latency import latency_section
from .measure import streamed_model


def check_similarity(
    evaluation: Evaluation, result: Checkpoint, original: Checkpoint | None, *, called: Called
) -> None:
    """Raise an error if nothing could be said of sentence embeddings, before any work is done."""
    examples = _read(evaluation, called=called)
    if original is None and evaluation.latency:
        raise RecipeError("evaluate.latency compares two sentence encoders: name an original with --against.")
    if original is None and not examples.labels:
        raise RecipeError(
            f"{examples.source} has no pairs of texts with scores, so embeddings can only be compared with those of an "
            "original: name one with --against."
        )
    pooling_of(result)


def similarity_section(
    compressed: Checkpoint,
    original: Checkpoint | None,
    evaluation: Evaluation,
    bench: Bench,
) -> dict[str, Any]:
    """The report's `evaluation` for sentence encoders. Gradients must be off."""
    examples = _read(evaluation, called=EVALUATE)
    if evaluation.examples is not None:
        examples = examples.split(evaluation.examples)[0]
    paired, size = examples.pairs is not None, evaluation.batch_size
    texts = replace(examples, texts=(*examples.texts, *(examples.pairs or ())), pairs=None, labels=())
    sources = [compressed] if original is None else [compressed, original]
    fed = [
        feed(one, streamed_model(one, bench.exact, bench.device), texts, seq_len=evaluation.seq_len, batch_size=size)
        for one in sources
    ]
    report = Counted(bench.progress, len(texts) * len(sources))
    pooling = pooling_of(compressed)
    embedded = [embeddings(one, pooling, report) for one in fed]
    scores = torch.tensor(examples.labels) if examples.labels else None
    figures = compared(embedded[1] if original is not None else None, embedded[0], scores, paired=paired)
    if evaluation.latency and original is not None:
        figures["latency"] = latency_section(compressed, original, texts, evaluation, bench)
    return {
        "protocol": {
            "source": examples.source,
            "sha256": examples.sha256,
            "examples": len(examples),
            "cut": max(one.cut for one in fed),
            "seq_len": min(one.length for one in fed),
            "dtype": str(bench.exact).removeprefix("torch."),
            "pooling": pooling,
        },
        "perplexity": {"original": None, "compressed": None},
        **divergence_figures(None),
        "top1_agreement": None,
        **figures,
    }


def embeddings(fed: Fed, pooling: str, report: Callable[[int], None]) -> Tensor:
    """One vector a text, [texts, width], in fp32 and in the texts' order. report: told how many more are done."""
    found: list[Tensor] = []
    for batch, output in zip(fed.batches, outputs(fed), strict=True):
        states = output.last_hidden_state
        found.append(POOLINGS[pooling](states.float(), batch.inputs["attention_mask"].to(states.device)).cpu())
        report(len(batch.rows))
    return torch.cat(found)[torch.cat([batch.rows for batch in fed.batches]).argsort()]


def pooling_of(checkpoint: Checkpoint) -> str:
    """How the model's hidden states become one vector: what its 1_Pooling/config.json says, the mean without one.

    Raises CheckpointError for a way that modelzip doesn't know.
    """
    file = checkpoint.folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    told = json.loads(file.read_text(encoding="utf-8"))
    if "pooling_mode" in told:
        named = [str(told["pooling_mode"])]
    else:
        named = [
            key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for key, value in told.items()
            if key.startswith("pooling_mode_") and value is True
        ]
    if len(named) != 1 or named[0] not in POOLINGS:
        raise CheckpointError(
            f"{file} wants the pooling {' and '.join(named) or 'of no kind'}, and modelzip knows one of "
            f"{', '.join(POOLINGS)}."
        )
    return named[0]


def _read(evaluation: Evaluation, *, called: Called) -> Examples:
    assert evaluation.data is not None
    return read_texts(evaluation.data, called=called, **columns_of(evaluation))
