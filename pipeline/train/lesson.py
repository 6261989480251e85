"""A student, what it is taught, and by whom: the module whose forward pass is the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelzip.compressors.distill.cache import cached_divergence
from modelzip.compressors.distill.hidden import Projection
from modelzip.compressors.distill.logits import (
    IGNORED,
    Direction,
    hard_labels,
    logit_error,
    mixed,
    next_labels,
    self_distillation,
    soft_logits,
)
from modelzip.compressors.distill.signals import SIGNALS, Signal

from .cached import taken

Predicts = Literal["class", "number", "next-token", "masked-token"]


@dataclass(frozen=True)
class Objective:
    """What the loss is made of.

    alpha: weight of the teacher's logits against labels, None without a teacher. signals: name and weight of each.
    layers: for each of the student's layers the teacher's, counted from 1. compares: how logits are. exits: whether a
    model's own exits learn from its last classifier.
    """

    predicts: Predicts
    alpha: float | None = None
    temperature: float = 1.0
    direction: Direction = "forward"
    signals: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    compares: Literal["divergence", "error"] = "divergence"
    exits: bool = False

    @property
    def reads(self) -> frozenset[str]:
        """What is looked at inside the models."""
        return frozenset(SIGNALS[name].reads for name in self.signals)


class Lesson(nn.Module):
    """forward(batch) -> per example: `loss`, the sum over its items; `items`; `correct`, of those with a label.

    An item is an example of a classifier, or a predicted token. The teacher is no part of the module, so it is neither
    trained, nor saved, nor spread over processes; learned projections are, and are thrown away at the end.
    penalty: what a method adds to the mean loss of an item while training. rates: names of parameters without weight
    decay, and their own learning rate; None: the common one.
    """

    _keys_to_ignore_on_save = None  # which the Trainer asks for where tied tensors are stored once

    def __init__(self, student: Any, objective: Objective, *, teacher: Any = None, seed: int = 0) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule
        self.penalty: Callable[[], Tensor] | None = None
        self.rates: dict[str, float | None] = {}
        self._no_split_modules = getattr(student, "_no_split_modules", None)  # where FSDP cuts
        self.projections = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        if teacher is not None and objective.signals:
            widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
            for name in sorted(objective.signals):
                if SIGNALS[name].projected and widths[0] != widths[1]:
                    self.projections[name] = Projection(widths[0], widths[1], generator=generator)

    @property
    def config(self) -> Any:
        """The student's, which FSDP and DeepSpeed ask for."""
        return self.student.config

    @property
    def teacher(self) -> Any:
        """The model that is learned from, or None."""
        return self._teacher[0]

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """batch: arguments of the models' forward, [batch, length], and `labels` if there are any."""
        labels = batch.pop("labels", None)
        if self.objective.exits:
            return self._exits(batch, labels)
        cached = taken(batch, self.objective.temperature)
        asked = self._asked()
        said = self.student(**batch, **asked)
        heard = None
        if self.teacher is not None:
            with torch.no_grad():
                heard = self.teacher(**batch, **asked)
        kept = batch["attention_mask"].bool() if "attention_mask" in batch else None
        logits, targets, counted = _items(said.logits, labels, batch["input_ids"], kept, self.objective.predicts)
        soft = None
        if cached is not None and self.objective.alpha is not None:
            soft = cached_divergence(logits, cached, direction=self.objective.direction)
        elif heard is not None and self.objective.alpha is not None:
            theirs, _, _ = _items(heard.logits, None, batch["input_ids"], kept, self.objective.predicts)
            soft = self._soft(logits, theirs)
        loss = self._loss(logits, targets, soft)
        items = counted.sum(1)
        whole = torch.where(counted, loss, 0.0).sum(1)
        if heard is not None and self.objective.signals:
            whole = whole + items * self._signals(said, heard, kept)
        if self.training and self.penalty is not None:
            whole = whole + items * self.penalty()
        found = {"loss": whole, "items": items}
        if targets is not None and self.objective.predicts != "number":
            found["correct"] = ((logits.argmax(-1) == targets) & counted).sum(1)
        return found

    def _exits(self, batch: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """What `self_distillation` says of each example; `correct` is the mean over exits."""
        if self.training:
            said = self.student(**batch)
            every = (*said.exit_logits, said.logits)
        else:
            every = self.student.every_exit(**batch)
        *exits, last = every
        loss = self_distillation(exits, last, direction=self.objective.direction)
        found = {"loss": loss, "items": torch.ones_like(loss, dtype=torch.int64)}
        if labels is not None:
            found["correct"] = torch.stack([(one.argmax(-1) == labels).double() for one in exits]).mean(0)
        return found

    def _asked(self) -> dict[str, bool]:
        reads = self.objective.reads
        asked = {}
        if reads & {"hidden", "inner", "last", "embeddings"}:
            asked["output_hidden_states"] = True
        if "attention" in reads:
            asked["output_attentions"] = True
        return asked

    def _loss(self, logits: Tensor, targets: Tensor | None, soft: Tensor | None) -> Tensor:
        """[batch, items]; a number's label is compared as a logit."""
        one = self.objective
        hard = None
        if targets is not None:
            hard = logit_error(logits, targets[..., None]) if one.predicts == "number" else hard_labels(logits, targets)
        if soft is None or one.alpha is None:
            assert hard is not None
            return hard
        return soft if hard is None else mixed(soft, hard, one.alpha)

    def _soft(self, logits: Tensor, theirs: Tensor) -> Tensor:
        """How far the student is from the teacher, [batch, items]; numbers have no distribution to compare."""
        one = self.objective
        if one.predicts == "number" or one.compares == "error":
            return logit_error(logits, theirs)
        return soft_logits(logits, theirs, temperature=one.temperature, direction=one.direction)

    def _signals(self, said: Any, heard: Any, kept: Tensor | None) -> Tensor:
        """The weighted sum of the signals, each a mean over layers and over tokens or examples."""
        total = torch.zeros((), device=kept.device if kept is not None else None)
        for name, weight in sorted(self.objective.signals.items()):
            signal = SIGNALS[name]
            pairs = list(_pairs(signal, said, heard, self.objective.layers))
            for mine, theirs in pairs:
                shown = self.projections[name](mine) if name in self.projections else mine
                total = total + weight / len(pairs) * signal.loss(shown, theirs, kept)
        return total


def _items(
    logits: Tensor, labels: Tensor | None, tokens: Tensor, kept: Tensor | None, predicts: Predicts
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits [batch, items, classes], targets [batch, items] or None, and which items count, bool [batch, items]."""
    if predicts in ("class", "number"):
        counted = torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
        return logits[:, None], None if labels is None else labels[:, None], counted
    if predicts == "next-token":
        if labels is None:
            labels = tokens if kept is None else torch.where(kept, tokens, IGNORED)
        targets = next_labels(labels)
        return logits, targets, targets != IGNORED
    if labels is None:
        return logits, None, torch.ones_like(tokens, dtype=torch.bool)
    return logits, labels, labels != IGNORED


def _pairs(signal: Signal, said: Any, heard: Any, layers: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The student's tensor and the teacher's, for each layer that the signal looks at."""
    if signal.reads == "embeddings":
        return [(said.hidden_states[0], heard.hidden_states[0])]
    if signal.reads == "last":
        return [(said.hidden_states[-1], heard.hidden_states[-1])]
    if signal.reads in ("hidden", "inner"):
        mapped = layers if signal.reads == "hidden" else layers[:-1]
        return [(said.hidden_states[own], heard.hidden_states[layer]) for own, layer in enumerate(mapped, start=1)]
    return [(said.attentions[own], heard.attentions[layer - 1]) for own, layer in enumerate(layers)]
