"""Sparsity that grows while a model trains: the callback that sets it after each step, by the schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modelzip.compressors.prune.lottery import kept_at, sparsity_of
from modelzip.compressors.prune.masked import MaskedLinear
from modelzip.compressors.prune.movement import MovementLinear, soft_penalty
from modelzip.compressors.prune.schedule import cubic_sparsity
from modelzip.compressors.prune.settings_training import GradualMagnitude, Movement, ScheduledSettings

from .lesson import Lesson


def span(settings: ScheduledSettings, steps: int) -> tuple[int, int]:
    """The steps between which sparsity grows, of so many in all."""
    return round(settings.begin * steps), round(settings.end * steps)


class Growing(TrainerCallback):
    """Sets the sparsity that the schedule wants after each step, and notes the one that there is in the log.

    What is measured and saved after a step has that step's sparsity. Nothing but the number of the step decides it,
    so a run that is resumed goes on as it would have gone.
    """

    def __init__(self, settings: ScheduledSettings, lesson: Lesson, *, steps: int) -> None:
        self._settings = settings
        self._begin, self._end = span(settings, steps)
        self._penalty = 0.0
        modules = dict(lesson.student.named_modules())
        self._masked = {name: one for name, one in modules.items() if isinstance(one, MaskedLinear)}
        self._scored = {name: one for name, one in modules.items() if isinstance(one, MovementLinear)}
        # What came in pruned never comes back.
        self._first = {name: one.kept.clone() for name, one in self._masked.items()}
        if isinstance(settings, Movement) and settings.masking == "threshold":
            lesson.penalty = self._drawn

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The sparsity before the first step; masks of a run that is resumed are in its checkpoint."""
        self._set_scored(state.global_step)
        if state.global_step == 0:
            self._prune(self._wanted(0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The sparsity after this step."""
        step = state.global_step
        self._set_scored(step)
        is_due = self._begin <= step <= self._end and (step - self._begin) % self._settings.prune_every == 0
        if is_due or step == self._end:
            self._prune(self._wanted(step))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The share of the weights that are pruned now."""
        state.log_history[-1]["sparsity"] = sparsity_of(self._kept())

    def _wanted(self, step: int, *, initial: float | None = None, final: float | None = None) -> float:
        one = self._settings
        return cubic_sparsity(
            step,
            final=one.sparsity if final is None else final,
            initial=one.initial_sparsity if initial is None else initial,
            begin=self._begin,
            end=self._end,
            every=one.prune_every,
        )

    def _set_scored(self, step: int) -> None:
        for module in self._scored.values():
            module.sparsity = self._wanted(step)
        if isinstance(self._settings, Movement):
            self._penalty = self._wanted(step, initial=0.0, final=self._settings.penalty)

    def _prune(self, sparsity: float) -> None:
        """Anew from all weights that came in: one that was pruned and has grown beyond others may return."""
        if not self._masked:
            return
        assert isinstance(self._settings, GradualMagnitude)
        weights = {name: module.weight.detach() for name, module in self._masked.items()}
        self._first = {name: mask.to(weights[name].device) for name, mask in self._first.items()}
        kept = kept_at(weights, self._first, sparsity=sparsity, scope=self._settings.scope)
        for name, module in self._masked.items():
            module.kept.copy_(kept[name])

    def _kept(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: module.kept for name, module in self._masked.items()} | {
                name: module.kept() for name, module in self._scored.items()
            }

    def _drawn(self) -> Tensor:
        """The penalty on scores: the mean over matrices, as heavy as the schedule has it."""
        each = [soft_penalty(module.scores) for module in self._scored.values()]
        return self._penalty * torch.stack(each).mean()
