"""Losses between what two models say, item by item: soft labels, hard ones, their mix, and the exits of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a position that counts in no loss."""

Direction: TypeAlias = Literal["forward", "reverse"]


def next_labels(labels: Tensor) -> Tensor:
    """Labels [batch, length] of a causal model moved to where they are predicted: one to the left, the last ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def mean_where(values: Tensor, kept: Tensor | None) -> Tensor:
    """Mean of values [...] where kept (bool, same shape) holds, of all without it; 0 where it holds nowhere."""
    if kept is None:
        return values.mean()
    return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)


def divergence(student: Tensor, teacher: Tensor, direction: Direction) -> Tensor:
    """KL [...] between two distributions given as log-probabilities [..., classes], in nats.

    forward: KL(teacher ‖ student), which covers all that the teacher thinks possible; reverse: KL(student ‖ teacher),
    which seeks one of its modes (Gu et al. 2023, "MiniLLM", section 2.1).
    """
    first, second = (teacher, student) if direction == "forward" else (student, teacher)
    return (first.exp() * (first - second)).sum(-1)


def soft_logits(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, direction: Direction = "forward"
) -> Tensor:
    """T² times the KL between the two softmaxes at temperature T, of each item.

    student, teacher: logits [..., classes], computed in fp32 -> [...]. T² keeps the gradient's size when T changes.
    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2; their cross-entropy differs from the
    forward KL by the teacher's entropy, which has no gradient.
    """
    ours, theirs = (torch.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return temperature**2 * divergence(ours, theirs, direction)


def logit_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the logits [..., classes] of each item, [...].

    Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", section 3.2.
    """
    return (student.float() - teacher.float()).square().sum(-1)


def hard_labels(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [..., classes] with labels, int64 [...], of each item, [...]; 0 where they are -100."""
    flat = F.cross_entropy(student.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape)


def mixed(soft: Tensor, hard: Tensor, alpha: float) -> Tensor:
    """alpha · soft + (1 - alpha) · hard, the weighted average of Hinton et al. 2015, section 2."""
    return alpha * soft + (1 - alpha) * hard


def self_distillation(exits: Sequence[Tensor], last: Tensor, *, direction: Direction = "reverse") -> Tensor:
    """Sum over exits of the KL between each exit's softmax and that of the last classifier, of each example, [batch].

    exits: logits [batch, classes] of each exit; last: those of the last classifier, which get no gradient.
    Liu et al. 2020, "FastBERT", equations 5 and 6: KL(exit ‖ last), which is `reverse`; the code that the authors
    published computes the other direction.
    """
    return torch.stack([soft_logits(logits, last.detach(), direction=direction) for logits in exits]).sum(0)
