"""The teacher's largest logits, kept so that a big teacher runs once, and the loss that is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .logits import Direction, divergence


@dataclass(frozen=True)
class TopLogits:
    """What is left of the teacher's logits [..., vocabulary]: its k likeliest tokens and the mass of all others.

    indices: int32 [..., k], the likeliest first. values: fp16 [..., k], their log-probabilities at the temperature at
    which they were taken. rest: fp16 [...], the logarithm of the probability of all others. fp16's least value stands
    for 0. Log-probabilities rather than logits, since fp16 is finest near 0, where the probable tokens are.
    The temperature is part of it: the mass of the others at another temperature can't be known from this.
    """

    indices: Tensor
    values: Tensor
    rest: Tensor
    temperature: float

    @property
    def nbytes(self) -> int:
        """Bytes on disk: 6 k + 2 a position."""
        return self.indices.nbytes + self.values.nbytes + self.rest.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""
        return {
            "indices": self.indices,
            "values": self.values,
            "rest": self.rest,
            "temperature": torch.tensor(self.temperature, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TopLogits:
        """Read back what `tensors` gave, bit for bit. Raises KeyError if a tensor is missing."""
        return cls(tensors["indices"], tensors["values"], tensors["rest"], float(tensors["temperature"]))

    def __getitem__(self, rows: Tensor | slice | int) -> TopLogits:
        """The same for some of the positions."""
        return TopLogits(self.indices[rows], self.values[rows], self.rest[rows], self.temperature)


def top_logits(logits: Tensor, *, k: int, temperature: float = 1.0) -> TopLogits:
    """The k largest of logits [..., vocabulary] in each position; all of them if the vocabulary is smaller."""
    logs = torch.log_softmax(logits.float() / temperature, -1)
    values, indices = logs.topk(min(k, logs.shape[-1]), -1)
    rest = logs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    least = torch.finfo(torch.float16).min
    values, rest = (part.clamp(min=least).half() for part in (values, rest))
    return TopLogits(indices.to(torch.int32), values, rest, temperature)


def cached_divergence(student: Tensor, teacher: TopLogits, *, direction: Direction = "forward") -> Tensor:
    """T² times the KL of each position, [...], over k + 1 classes: the teacher's k likeliest tokens, and all others.

    student: logits [..., vocabulary]. The loss is never more than the KL over the whole vocabulary (log-sum
    inequality), equals it where k is the vocabulary, and unlike a renormalised top k it pulls the student's probability
    away from the tokens that aren't listed. Teacher's probabilities are rounded to fp16 and made to sum to 1 again.
    """
    logs = torch.log_softmax(student.float() / teacher.temperature, -1)
    indices = teacher.indices.long()
    ours, theirs = logs.gather(-1, indices), teacher.values.float()
    if indices.shape[-1] < logs.shape[-1]:
        others = logs.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        ours, theirs = torch.cat([ours, others], -1), torch.cat([theirs, teacher.rest.float().unsqueeze(-1)], -1)
    theirs = torch.log_softmax(theirs, -1)
    return teacher.temperature**2 * divergence(ours, theirs, direction)
