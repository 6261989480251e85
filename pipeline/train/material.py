"""What is learned from, as batches of tensors: labelled texts, texts alone, or windows of running text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modelzip.compressors.distill.logits import IGNORED

from ..padding import Padding, padded
from .order import seeded

if TYPE_CHECKING:  # which reads a Material
    from .cached import CachedTeacher

MASKED = 0.15
"""Share of the tokens that a masked language model must guess (Devlin et al. 2018, section 3.1)."""


@dataclass(frozen=True)
class Masking:
    """Which tokens may be hidden from a masked language model, and by what. special: ids that stay as they are."""

    token: int
    special: frozenset[int]
    vocabulary: int
    seed: int


@dataclass
class Material:
    """A dataset of places; `batch` makes the tensors. epoch: which draws what is masked. teacher: what it said of each.

    rows: each example's arguments of the model's forward, lists of one length each. labels: int64 or fp32 [examples],
    None where there are none.
    """

    rows: Sequence[dict[str, list[int]]]
    labels: Tensor | None
    padding: Padding
    masking: Masking | None = None
    epoch: int = 0
    teacher: CachedTeacher | None = None
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [len(row["input_ids"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> int:
        return place

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of the forward, int64 [batch, length], and `labels`, [batch] or, of tokens, [batch, length]."""
        made = padded([self.rows[place] for place in places], self.padding)
        if self.labels is not None:
            made["labels"] = self.labels[torch.tensor(places)]
        if self.masking is not None:
            drawn = [seeded(self.masking.seed, self.epoch, place) for place in places]
            made["input_ids"], made["labels"] = masked(made["input_ids"], self.masking, drawn)
        if self.teacher is not None:
            made |= self.teacher.batch(places)
        return made


def masked(tokens: Tensor, masking: Masking, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Tokens [batch, length] with some hidden, and what they were, [batch, length], -100 elsewhere.

    Of the tokens that must be guessed, 80 % become the mask, 10 % any token, 10 % stay (Devlin et al. 2018, 3.1).
    """
    length = tokens.shape[1]
    hides, how = (torch.stack([torch.rand(length, generator=generator) for generator in generators]) for _ in range(2))
    other = torch.stack([torch.randint(masking.vocabulary, (length,), generator=one) for one in generators])
    special = torch.isin(tokens, torch.tensor(sorted(masking.special), dtype=torch.int64))
    hidden = (hides < MASKED) & ~special
    shown = torch.where(how < 0.8, masking.token, torch.where(how < 0.9, other, tokens))
    return torch.where(hidden, shown, tokens), torch.where(hidden, tokens, IGNORED)
