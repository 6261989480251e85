"""Classifiers opened and fed with labelled examples, each by its own tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.blocks import is_own
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.evaluation.agreement import group_bytes

from .calibrate import longest, tokenizer_of
from .labelled import Batch, Examples, batches_by_length, count_cut, encode
from .measure import streamed_model
from .opened import open_by_transformers


@dataclass(frozen=True)
class Fed:
    """A model and what it is fed. cut: examples that lost tokens to `length`, the most tokens of one."""

    model: Any
    batches: list[Batch]
    length: int
    cut: int


def open_classifier(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint as a streamed model, or whole in memory where it has no blocks."""
    if is_own(checkpoint):
        return open_by_transformers(checkpoint, device, dtype=dtype)
    return streamed_model(checkpoint, dtype, device)


def feed(checkpoint: Checkpoint, model: Any, examples: Examples, *, seq_len: int, batch_size: int) -> Fed:
    """The examples as this model takes them: its own token ids, at most `seq_len` and what its positions allow."""
    network = model.model if isinstance(model, StreamedModel) else model
    tokenizer = tokenizer_of(checkpoint)
    length = min(seq_len, longest(network), tokenizer.model_max_length)
    encoded = encode(examples, tokenizer, max_length=length)
    taken = inspect.signature(network.forward).parameters
    kept = [{name: values for name, values in one.items() if name in taken} for one in encoded]
    cut = count_cut(examples, encoded, tokenizer, max_length=length)
    return Fed(model, batches_by_length(kept, tokenizer, batch_size=batch_size), length, cut)


def class_logits(fed: Fed, report: Callable[[int], None]) -> Tensor:
    """Logits [examples, classes] in fp32 and in the examples' order. report: told how many more are done."""
    found: Tensor | None = None
    for batch, output in zip(fed.batches, outputs(fed), strict=True):
        logits = output.logits
        if found is None:
            found = torch.full((sum(len(one.rows) for one in fed.batches), logits.shape[-1]), torch.nan)
        found[batch.rows] = logits.float().cpu()
        report(len(batch.rows))
    assert found is not None
    return found


def outputs(fed: Fed) -> Iterator[Any]:
    """What the model's forward gives for each batch."""
    if isinstance(fed.model, StreamedModel):
        yield from _streamed(fed.model, fed.batches)
        return
    for batch in fed.batches:
        yield fed.model(**{name: value.to(fed.model.device) for name, value in batch.inputs.items()})


def _streamed(model: StreamedModel, batches: Sequence[Batch]) -> Iterator[Any]:
    """Outputs; groups of batches whose hidden states stay under a limit go through the blocks together."""
    limit, width = group_bytes(model), int(model.model.config.get_text_config().hidden_size)
    group: list[Batch] = []
    size = 0
    for batch in batches:
        own = batch.inputs["input_ids"].numel() * width * 4
        if group and size + own > limit:
            yield from model.outputs([one.inputs for one in group])
            group, size = [], 0
        group.append(batch)
        size += own
    yield from model.outputs([one.inputs for one in group])
