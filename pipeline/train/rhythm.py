"""When the trainer logs, measures, saves and stops, and what is read off its log: nothing here depends on a clock.

Whoever measures or saves also logs, so that no average of the curve spans a moment at which a killed run may go on.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.shards import disk_errors, sync_folder, write_file

from .. import ranks
from ..progress import Progress
from .material import Material
from .order import EpochOrder

WHOLE: Final = "whole"
"""The file that says that everything else of a trainer's checkpoint is on disk."""

Metric = Literal["loss", "accuracy"]


@dataclass(frozen=True)
class Beat:
    """Steps between two of each; measure: None if there is nothing to measure on. keep: by what the best is told.

    settled: the step before which weights can't be kept, as they aren't yet what the method leaves.
    """

    log: int
    save: int
    measure: int | None = None
    patience: int | None = None
    keep: Literal["last", "loss", "accuracy"] = "last"
    settled: int = 0

    def best(self, curve: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The row of the best weights that may be kept; None if there are none, or the last are kept."""
        if self.keep == "last":
            return None
        return best_row([row for row in curve if row["step"] >= self.settled], self.keep)


def best_row(curve: Sequence[Mapping[str, Any]], metric: Metric) -> Mapping[str, Any] | None:
    """The first row of the curve with the least `eval_loss` or greatest `accuracy`; None if nothing was measured."""
    rows = [row for row in curve if "eval_loss" in row]
    if not rows:
        return None
    if metric == "accuracy":
        return max(rows, key=lambda row: row["accuracy"])
    return min(rows, key=lambda row: row["eval_loss"])


def kept_row(curve: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any] | None:
    """The last measurement up to a step: what the weights of that step are known to do; None if there is none."""
    for row in reversed(curve):
        if "eval_loss" in row and row["step"] <= step:
            return {name: row[name] for name in ("step", "eval_loss", "accuracy") if name in row}
    return None


def measured_since(curve: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> int:
    """How many measurements came after the best one."""
    return sum("eval_loss" in row and row["step"] > best["step"] for row in curve)


def curve_of(state: TrainerState) -> list[dict[str, Any]]:
    """One row a step at which something was logged or measured: step, epoch, loss, learning_rate, grad_norm,
    sparsity, eval_loss, accuracy; without what depends on the clock."""
    rows: dict[int, dict[str, Any]] = {}
    names = {"eval_accuracy": "accuracy"}
    for entry in state.log_history:
        kept = {
            names.get(key, key): value
            for key, value in entry.items()
            if key in ("loss", "learning_rate", "grad_norm", "sparsity", "eval_loss", "eval_accuracy")
        }
        if kept:
            step = int(entry["step"])
            rows.setdefault(step, {"step": step, "epoch": entry["epoch"]}).update(kept)
    return [rows[step] for step in sorted(rows)]


class Rhythm(TrainerCallback):
    """Says when what happens, keeps the epoch of order and masking, shows progress, and stops what goes wrong."""

    def __init__(self, beat: Beat, *, order: EpochOrder, material: Material, seed: int, progress: Progress) -> None:
        self._beat, self._order, self._material, self._seed = beat, order, material, seed
        self._progress = progress
        self.stopped_early = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Each process drops out other neurons."""
        if args.process_index:
            torch.manual_seed((self._seed + args.process_index) % (1 << 63))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Another epoch, another order."""
        self._order.epoch = self._material.epoch = math.floor(state.epoch or 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say what this step calls for."""
        beat, step = self._beat, state.global_step
        is_last = step >= state.max_steps
        control.should_evaluate = beat.measure is not None and (step % beat.measure == 0 or is_last)
        control.should_save = step % beat.save == 0 and not is_last
        control.should_log = step % beat.log == 0 or control.should_evaluate or control.should_save or is_last
        losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
        note = "".join(f"loss {loss:.4f}" for loss in [next(losses, None)] if loss is not None)
        self._progress.step("train", step, state.max_steps, note)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A loss that is no number will never be one again."""
        loss = state.log_history[-1].get("loss", 0.0)
        if not math.isfinite(loss):
            raise RecipeError(
                f"The loss is {loss} at step {state.global_step}: lower learning_rate (it is {args.learning_rate:g}), "
                "or take precision: fp32."
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the best weights so far; stop if there were no better ones for long.

        No checkpoint is saved where the run stops, so that a run that is resumed stops there, too.
        """
        curve = curve_of(state)
        best = self._beat.best(curve)
        if best is None:
            return
        if best["step"] == state.global_step:
            control.should_save = True
        elif self._beat.patience is not None and measured_since(curve, best) >= self._beat.patience:
            self.stopped_early = True
            control.should_training_stop = True
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as whole once every process has written its part, then drop those that it replaces."""
        ranks.wait()
        if not args.should_save:
            return
        folder = checkpoint_at(Path(str(args.output_dir)), state.global_step)
        with disk_errors(folder):
            for file in folder.rglob("*"):
                if file.is_file():
                    descriptor = os.open(file, os.O_RDONLY)
                    os.fsync(descriptor)
                    os.close(descriptor)
        write_file(folder / WHOLE, b"")
        with disk_errors(folder):
            sync_folder(folder)
            sync_folder(folder.parent)
            best = self._beat.best(curve_of(state))
            kept = {state.global_step, *([best["step"]] if best else [])}
            for other in Path(str(args.output_dir)).glob("checkpoint-*"):
                if _step(other) not in kept:
                    shutil.rmtree(other)


def checkpoint_at(work: Path, step: int) -> Path:
    """Where the trainer saves after this step."""
    return work / f"checkpoint-{step}"


def last_checkpoint(work: Path) -> Path | None:
    """The last one that is whole; what isn't is removed. None if there is none."""
    if not work.is_dir():
        return None
    found = sorted(work.glob("checkpoint-*"), key=_step)
    for folder in found:
        if not (folder / WHOLE).exists():
            shutil.rmtree(folder)
    whole = [folder for folder in found if folder.is_dir()]
    return whole[-1] if whole else None


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
