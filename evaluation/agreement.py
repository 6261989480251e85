"""How far a compressed model is from its original: both are streamed side by side, a block of each in memory.

Windows go through in groups, so that the hidden states stay under a limit; at the end of a group the two models' logits
of one window at a time are compared, and only that window's logits are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.checkpoints.walk import Walk

CHUNK = 64
"""Tokens whose distributions are compared at once."""

GROUP_BYTES = 64 << 20
"""Hidden states of one model in a group of windows."""


@dataclass
class Tally:
    """Sums over tokens; `result` gives their means."""

    tokens: int = 0
    predicted: int = 0
    loss_original: float = 0.0
    loss: float = 0.0
    kl: float = 0.0
    same_top: int = 0

    def add(self, original: Tensor | None, compressed: Tensor, labels: Tensor | None) -> None:
        """Logits [tokens, vocabulary] of one window. labels [tokens - 1]: the next tokens, None if not causal."""
        for begin in range(0, compressed.shape[0], CHUNK):
            part = slice(begin, begin + CHUNK)
            q = compressed[part].float().log_softmax(-1)
            self.tokens += q.shape[0]
            next_tokens = None if labels is None else labels[part]
            if next_tokens is not None:
                rows = torch.arange(len(next_tokens), device=q.device)
                self.predicted += len(next_tokens)
                self.loss -= float(q[rows, next_tokens].double().sum())
            if original is None:
                continue
            p = original[part].float().log_softmax(-1)
            if next_tokens is not None:
                self.loss_original -= float(p[rows, next_tokens].double().sum())
            self.same_top += int((p.argmax(-1) == q.argmax(-1)).sum())
            self.kl += float((p.exp() * p.sub(q)).sum(-1, dtype=torch.float64).sum())

    def result(self, *, against: bool) -> dict[str, Any]:
        """Perplexities, mean KL divergence (nats a token) and top-1 agreement (0 to 1); None where there is none."""
        return {
            "perplexity": {
                "original": math.exp(self.loss_original / self.predicted) if against and self.predicted else None,
                "compressed": math.exp(self.loss / self.predicted) if self.predicted else None,
            },
            "kl": self.kl / self.tokens if against else None,
            "top1_agreement": self.same_top / self.tokens if against else None,
            "tokens": self.tokens,
        }


def measure(
    compressed: StreamedModel,
    original: StreamedModel | None,
    windows: Tensor,
    *,
    inputs: Callable[[Tensor], Mapping[str, Tensor]],
    causal: bool,
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """Compare two models on windows [n, seq_len]; `original` None measures the perplexity of one alone.

    inputs: makes the forward's arguments from windows [1, seq_len]. causal: whether logits predict the next token.
    report: told how many windows of all are done. Gradients must be off. For models without logits, the relative
    difference of the last hidden states is given as `hidden_error`.
    """
    models = [compressed] if original is None else [original, compressed]
    size = max(1, GROUP_BYTES // max(1, windows.shape[1] * _width(compressed) * 4))
    tally, lost, norm = Tally(), 0.0, 0.0
    for begin in range(0, len(windows), size):
        group = windows[begin : begin + size]
        walks = [_walk(model, group, inputs) for model in models]
        for batch in range(len(group)):
            outputs = [_output(model, walk, batch) for model, walk in zip(models, walks, strict=True)]
            first = outputs[0] if original is not None else None
            if hasattr(outputs[-1], "logits"):
                labels = group[batch, 1:].to(compressed.device) if causal else None
                tally.add(None if first is None else _flat(first.logits), _flat(outputs[-1].logits), labels)
            elif first is not None:
                lost += float((first.last_hidden_state - outputs[-1].last_hidden_state).double().square().sum())
                norm += float(first.last_hidden_state.double().square().sum())
            del outputs, first
            report(begin + batch + 1, len(windows))
        for model, walk in zip(models, walks, strict=True):
            walk.close()
            model.free(model.structure.blocks[-1])
    result = tally.result(against=original is not None) if tally.tokens else {"tokens": windows.numel()}
    return result | ({"hidden_error": math.sqrt(lost / norm)} if norm else {})


def _width(model: StreamedModel) -> int:
    return int(model.model.config.get_text_config().hidden_size)


def _flat(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _walk(model: StreamedModel, group: Tensor, inputs: Callable[[Tensor], Mapping[str, Tensor]]) -> Walk:
    """The group's forwards, each through its last block but one step from the end."""
    batches: Sequence[Mapping[str, Tensor]] = [inputs(window.unsqueeze(0)) for window in group]
    walk = model.walk(batches, spill_limit=1 << 62, spill_folder=None)
    start(walk, model)
    for block in model.structure.blocks[:-1]:
        model.through(walk, block)
    model.load(model.structure.blocks[-1])
    return walk


def _output(model: StreamedModel, walk: Walk, batch: int) -> Any:
    output = walk.advance(batch).output
    model.free_outside()
    return output
