"""How alike two sentence encoders are: their embeddings of the same texts, and what these say of pairs of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .scores import number_scores, ranks

COMPARED: Final = 256
"""Texts of which all pairs are compared, where the data don't pair them: the first ones."""


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    kept = mask.unsqueeze(-1).to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1).clamp(min=1)


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states)), mask.argmax(1)]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states)), mask.shape[1] - 1 - mask.flip(1).argmax(1)]


POOLINGS: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = MappingProxyType(
    {"mean": _mean, "max": _max, "cls": _first, "lasttoken": _last}
)
"""From hidden states [batch, length, width] and the mask [batch, length] of tokens that aren't padding to one vector a
text, [batch, width]. By the names that sentence-transformers has for them."""


def compared(original: Tensor | None, compressed: Tensor, scores: Tensor | None, *, paired: bool) -> dict[str, Any]:
    """The report's figures for embeddings [texts, width]; where texts come in pairs, first ones before second ones.

    scores: [texts / 2], how alike people find each pair. `cosine` compares both models' embeddings of a text;
    `similarity_agreement` is Spearman's correlation between the similarities (cosines) that the two models find between
    paired texts, or else between all of the first COMPARED.
    """
    ours = _similarities(compressed, paired=paired)
    theirs = None if original is None else _similarities(original, paired=paired)
    found: dict[str, Any] = {}
    if scores is not None:
        found["spearman"] = number_scores(theirs, ours, scores)["spearman"]
    if original is None or theirs is None:
        return found
    alike = torch.cosine_similarity(original.double(), compressed.double(), dim=-1)
    both = torch.stack([ranks(theirs), ranks(ours)])
    return found | {
        "cosine": float(alike.mean()),
        "cosine_p05": float(np.quantile(alike.numpy(), 0.05)),
        "similarity_agreement": float(torch.corrcoef(both)[0, 1]) if both.shape[1] > 1 else None,
    }


def _similarities(embeddings: Tensor, *, paired: bool) -> Tensor:
    vectors = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    if paired:
        first, second = vectors.chunk(2)
        return (first * second).sum(-1)
    vectors = vectors[:COMPARED]
    above = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return (vectors @ vectors.T)[above[0], above[1]]
