"""Pseudo-perplexity: how well a masked language model guesses tokens of a text that are hidden one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .agreement import Running, windows_at_once


@dataclass(frozen=True)
class Hidden:
    """Texts [n, length], in each of which one token is hidden: at which place, [n], and what it was, [n]."""

    texts: Tensor
    places: Tensor
    tokens: Tensor


def hide(windows: Tensor, *, count: int, mask: int, around: tuple[int, int] | None) -> Hidden:
    """`count` tokens of windows [any, seq_len] drawn evenly from a fixed seed, all if there are no more.

    around: the tokens before and after a text that the model has learned from; None if it wants none.
    """
    generator = torch.Generator().manual_seed(0)
    picked = torch.randperm(windows.numel(), generator=generator)[:count].sort().values
    rows, places = picked // windows.shape[1], picked % windows.shape[1]
    texts = windows[rows]
    tokens = texts[torch.arange(len(rows)), places]
    texts[torch.arange(len(rows)), places] = mask
    if around is not None:
        ends = torch.tensor(around).expand(len(rows), 2)
        texts, places = torch.cat([ends[:, :1], texts, ends[:, 1:]], dim=1), places + 1
    return Hidden(texts, places, tokens)


def pseudo_perplexity(
    model: Running,
    hidden: Hidden,
    *,
    inputs: Callable[[Tensor], Mapping[str, Tensor]],
    report: Callable[[int], None],
) -> float:
    """exp of the mean negative log-likelihood of the hidden tokens, each given all others of its text.

    inputs: makes the forward's arguments from texts [1, length]. report: told after each text. Gradients must be off.
    Salazar et al. 2020, "Masked Language Model Scoring", equation 2 and section 2.2; over a sample of the tokens.
    """
    losses = []
    size = windows_at_once(model, hidden.texts.shape[1])
    for begin in range(0, len(hidden.texts), size):
        group = hidden.texts[begin : begin + size]
        batches = [inputs(text.unsqueeze(0)) for text in group]
        for place, output in enumerate(model.outputs(batches), start=begin):
            logs = output.logits[0, hidden.places[place]].double().log_softmax(-1)
            losses.append(-float(logs[hidden.tokens[place]]))
            report(1)
    return math.exp(sum(losses) / len(losses))
