"""How far a compressed model is from its original: both are streamed side by side, a block of each in memory.

Windows go through in groups, so that the hidden states stay under a limit; at the end of a group the two models' logits
of one window at a time are compared, and only that window's logits are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from modelzip.checkpoints.blocks import Structure

from .outputs import main_output

CHUNK = 16
"""Tokens whose distributions are compared at once: few, so that they stay in the cache."""

TOP = 5
"""Tokens whose ranks are compared."""

GROUP_BYTES = 48 << 20
"""Hidden states of one model in a group of windows, unless its blocks are larger: each group reads the model anew."""


class Running(Protocol):
    """A model that batches are run through, streamed or whole."""

    device: torch.device
    structure: Structure

    @property
    def model(self) -> Any: ...

    def outputs(self, batches: Sequence[Mapping[str, Tensor]]) -> Generator[Any, None, None]:
        """The forward's output for each batch, one in memory at a time."""
        ...


@dataclass
class Tally:
    """Sums over tokens, and each token's divergence; `result` gives means and percentiles."""

    tokens: int = 0
    predicted: int = 0
    loss_original: float = 0.0
    loss: float = 0.0
    same_top: int = 0
    in_both: int = 0
    candidates: int = 0
    lost: int = 0
    won: int = 0
    divergences: list[Tensor] = field(default_factory=list)

    def add(self, original: Tensor | None, compressed: Tensor, labels: Tensor | None) -> None:
        """Logits [tokens, vocabulary] of one window. labels [tokens - 1]: the next tokens, None if not causal."""
        for begin in range(0, compressed.shape[0], CHUNK):
            part = slice(begin, begin + CHUNK)
            ours = compressed[part].float().log_softmax(-1)
            self.tokens += ours.shape[0]
            following = None if labels is None else labels[part]
            if following is not None:
                self.predicted += len(following)
                self.loss += _loss(ours, following)
            if original is not None:
                logits = original[part].float()
                theirs = logits.log_softmax(-1)
                if following is not None:
                    self.loss_original += _loss(theirs, following)
                # The softmax again takes a third of the time of exp.
                self.divergences.append(torch.linalg.vecdot(logits.softmax(-1), theirs - ours).cpu())
                self._rank(theirs, ours, following)

    def _rank(self, original: Tensor, compressed: Tensor, following: Tensor | None) -> None:
        """Log-probabilities [tokens, vocabulary] of both models for the same tokens."""
        ours, theirs = (logs.topk(min(TOP, logs.shape[-1])).indices for logs in (compressed, original))
        self.same_top += int((ours[:, 0] == theirs[:, 0]).sum())
        self.in_both += int((ours.unsqueeze(-1) == theirs.unsqueeze(-2)).sum())
        self.candidates += theirs.numel()
        if following is not None:
            is_right, was_right = (ranked[: len(following), 0] == following for ranked in (ours, theirs))
            self.lost += int((was_right & ~is_right).sum())
            self.won += int((is_right & ~was_right).sum())

    def result(self, *, against: bool) -> dict[str, Any]:
        """The report's figures; None where there is nothing to compare with, or nothing is predicted."""
        compares = against and self.tokens > 0
        flips = {"lost": self.lost, "won": self.won, "share": (self.lost + self.won) / max(self.predicted, 1)}
        return {
            "perplexity": {
                "original": math.exp(self.loss_original / self.predicted) if against and self.predicted else None,
                "compressed": math.exp(self.loss / self.predicted) if self.predicted else None,
            },
            **divergence_figures(torch.cat(self.divergences) if compares else None),
            "top1_agreement": self.same_top / self.tokens if compares else None,
            "top5_agreement": self.in_both / self.candidates if compares else None,
            "flips": flips if compares and self.predicted else None,
            "tokens": self.tokens,
        }


def divergence_figures(divergences: Tensor | None) -> dict[str, float | None]:
    """Mean and percentiles (linear interpolation) of the KL divergence of each token or example, [any]."""
    if divergences is None:
        return {"kl": None, "kl_p95": None, "kl_p99": None}
    values = divergences.double().numpy()
    p95, p99 = np.quantile(values, (0.95, 0.99))
    return {"kl": float(values.mean()), "kl_p95": float(p95), "kl_p99": float(p99)}


def _loss(logs: Tensor, following: Tensor) -> float:
    """The negative log-likelihood of the next tokens, summed. logs: [at least as many, vocabulary]"""
    return -float(logs[: len(following)].gather(-1, following.unsqueeze(-1)).double().sum())


def measure(
    compressed: Running,
    original: Running | None,
    windows: Tensor,
    *,
    inputs: Callable[[Tensor], Mapping[str, Tensor]],
    causal: bool,
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """Compare two models on windows [n, seq_len]; `original` None measures the perplexity of one alone.

    inputs: makes the forward's arguments from windows [1, seq_len]. causal: whether logits predict the next token.
    report: told how many windows of all are done. Gradients must be off. For models without logits, `hidden_error` is
    the relative difference of the last hidden states (or whatever else they give), None without an original.
    """
    models = [compressed] if original is None else [original, compressed]
    size = windows_at_once(compressed, windows.shape[1])
    tally, lost, norm = Tally(), 0.0, 0.0
    for begin in range(0, len(windows), size):
        group = windows[begin : begin + size]
        batches = [inputs(window.unsqueeze(0)) for window in group]
        streams = [model.outputs(batches) for model in models]
        for batch in range(len(group)):
            outputs = [next(stream) for stream in streams]  # a zip would keep the last pair while it makes the next
            first = outputs[0] if original is not None else None
            if hasattr(outputs[-1], "logits"):
                labels = group[batch, 1:].to(compressed.device) if causal else None
                tally.add(None if first is None else _flat(first.logits), _flat(outputs[-1].logits), labels)
            elif first is not None:
                wanted, found = main_output(first).double(), main_output(outputs[-1]).double()
                lost += float((wanted - found).square().sum())
                norm += float(wanted.square().sum())
            del outputs, first
            report(begin + batch + 1, len(windows))
        for stream in streams:
            stream.close()
    result = tally.result(against=original is not None)
    return result | ({} if tally.tokens else {"tokens": windows.numel(), "hidden_error": _relative(lost, norm)})


def _relative(lost: float, norm: float) -> float | None:
    """‖difference‖ / ‖original‖ from the squares; None if nothing was compared."""
    return math.sqrt(lost / norm) if norm else None


def windows_at_once(model: Running, seq_len: int) -> int:
    """How many windows go through the blocks together."""
    width = int(model.model.config.get_text_config().hidden_size)
    return max(1, group_bytes(model) // max(1, seq_len * width * 4))


def group_bytes(model: Running) -> int:
    """Bytes of hidden states that may wait between two blocks."""
    blocks = model.structure.blocks
    largest = max((sum(math.prod(linear.shape) for linear in block.linears) for block in blocks), default=0)
    return max(GROUP_BYTES, 4 * largest)


def _flat(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])
