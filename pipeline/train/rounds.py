"""The lottery's rounds: train, prune what training left smallest, put the rest back to the start, and again.

Each round has a folder of its own in the stage's workspace; a round that is done leaves its masks and its figures
there, so that a killed run goes on in the round, and after the step, where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.shards import disk_errors, sync_folder, write_file
from modelzip.compressors.prune.lottery import (
    kept_at,
    random_kept,
    reinitialised,
    round_sparsities,
    shuffled,
    sparsity_of,
)
from modelzip.compressors.prune.settings_training import Lottery

from .. import ranks
from ..progress import Progress
from .lesson import Lesson
from .order import seeded
from .trainer import Learned

State = dict[str, Tensor]
DONE: Final = "done.json"
MASKS: Final = "masks.safetensors"
START: Final = "rewind.safetensors"
CONTROLS: Final = ("random", "reinit", "shuffled")


class Trial(Protocol):
    """One training: of a lesson, in a folder, under a name that the progress shows."""

    def __call__(
        self, lesson: Lesson, work: Path, *, name: str, schedules: Iterable[TrainerCallback] = ()
    ) -> Learned: ...


@dataclass(frozen=True)
class Named:
    """A progress that shows one of several trainings under its name."""

    progress: Progress
    name: str

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        """The step of the training that has this name."""
        self.progress.step(self.name, done, total, note)

    def say(self, line: str) -> None:
        """The line as it is."""
        self.progress.say(line)


@dataclass(frozen=True)
class Rounds:
    """What the rounds share.

    matrices: names of the linears that are pruned. rewind: the step to whose weights the student is put back.
    seed: of what the controls draw. make: the lesson anew, with the student as it came in.
    """

    settings: Lottery
    matrices: tuple[str, ...]
    rewind: int
    seed: int
    work: Path
    make: Callable[[], Lesson]
    trial: Trial

    def train(self) -> tuple[Learned, list[dict[str, Any]]]:
        """The ticket as it was trained, and the figures of all trainings, in order: rounds, ticket, controls.

        The ticket is trained last, so that nothing needs to remember it.
        """
        sparsities = round_sparsities(self.settings.sparsity, share=self.settings.round_share)
        kept: State | None = None
        rows = []
        for number, sparsity in enumerate(sparsities, 1):
            kept, row = self._round(number, kept, sparsity)
            rows.append(row)
        assert kept is not None
        controls = [self._control(name, kept) for name in self.settings.controls]
        learned = self.trial(self._rewound(kept), self.work / "ticket", name="ticket")
        return learned, [*rows, figures("ticket", sparsity_of(kept), learned), *controls]

    def _round(self, number: int, kept: State | None, sparsity: float) -> tuple[State, dict[str, Any]]:
        """Train under the masks so far; the masks after it, and the figures of the training."""
        work, name = self.work / f"round-{number}", f"round {number}"
        row = _done(work)
        if row is None:
            lesson = self._rewound(kept)
            before = _masks(lesson, self.matrices)
            schedules = [Rewind(lesson, self.rewind, self.work / START)] if kept is None and self.rewind else []
            learned = self.trial(lesson, work, name=name, schedules=schedules)
            row = figures(name, sparsity_of(before), learned)
            if ranks.is_main():
                trained = {matrix: learned.state[f"{matrix}.weight"] for matrix in self.matrices}
                on = {matrix: mask.to(trained[matrix].device) for matrix, mask in before.items()}
                made = kept_at(trained, on, sparsity=sparsity, scope=self.settings.scope)
                work.mkdir(parents=True, exist_ok=True)
                write_file(work / MASKS, save({matrix: mask.cpu().contiguous() for matrix, mask in made.items()}))
                _finish(work, row)
            ranks.wait()
        return load_file(work / MASKS), row

    def _control(self, name: str, kept: State) -> dict[str, Any]:
        """Train what the ticket must beat, at the ticket's sparsity."""
        work = self.work / f"control-{name}"
        row = _done(work)
        if row is None:
            generator = seeded(self.seed, CONTROLS.index(name))
            masks = random_kept(kept, generator) if name == "random" else kept
            lesson = self._rewound(masks)
            if name != "random":
                start = lesson.student.state_dict()
                initial = {matrix: start[f"{matrix}.weight"].cpu() for matrix in self.matrices}
                drawn = (reinitialised if name == "reinit" else shuffled)(initial, kept, generator)
                _load(lesson, {f"{matrix}.weight": weight for matrix, weight in drawn.items()})
            learned = self.trial(lesson, work, name=f"control {name}")
            row = figures(name, sparsity_of(masks), learned)
            if ranks.is_main():
                _finish(work, row)
            ranks.wait()
        return row

    def _rewound(self, kept: State | None) -> Lesson:
        """A lesson whose student is put back to the start, under these masks; without masks, as it came in."""
        lesson = self.make()
        if kept is not None and self.rewind:
            file = self.work / START
            if not file.exists():
                raise RecipeError(
                    f"The first round stopped before step {self.rewind}, to which weights are put back: lower rewind."
                )
            _load(lesson, load_file(file))
        _load(lesson, {f"{matrix}.kept": mask for matrix, mask in (kept or {}).items()})
        return lesson


def _load(lesson: Lesson, state: State) -> None:
    """Put these tensors into the student; what isn't among them stays."""
    lesson.student.load_state_dict(state, strict=False)


def rewind_step(share: float, steps: int) -> int:
    """The step to whose weights the student is put back: this share of so many, at least the first; 0: the start."""
    return max(1, round(share * steps)) if share else 0


class Rewind(TrainerCallback):
    """Keeps the student's weights as they are after a step."""

    def __init__(self, lesson: Lesson, step: int, file: Path) -> None:
        self._lesson, self._step, self._file = lesson, step, file

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before anything is saved after this step, so that a run which is resumed later on finds the file."""
        if state.global_step == self._step and ranks.is_main():
            whole = self._lesson.student.state_dict()
            tied = set(self._lesson.student.get_expanded_tied_weights_keys(all_submodels=True))
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items() if name not in tied}
            write_file(self._file, save(kept))


def figures(name: str, sparsity: float, learned: Learned) -> dict[str, Any]:
    """What is reported of one training: the sparsity that it ran under, and how it ended."""
    last = learned.curve[-1] if learned.curve else {}
    kept = next((row for row in learned.curve if row["step"] == learned.kept), last)
    found = {"name": name, "sparsity": sparsity, "steps": learned.steps, "loss": last.get("loss")}
    return found | {key: kept[key] for key in ("eval_loss", "accuracy") if key in kept}


def _masks(lesson: Lesson, matrices: Sequence[str]) -> State:
    return {matrix: lesson.student.get_submodule(matrix).kept.clone() for matrix in matrices}


def _done(work: Path) -> dict[str, Any] | None:
    """The figures of a training that is done, as the main process finds them."""
    file = work / DONE
    found: dict[str, Any] | None = None
    if ranks.is_main() and file.exists():
        found = json.loads(file.read_text())
    return ranks.told(found)


def _finish(work: Path, row: dict[str, Any]) -> None:
    """Note that a training is done, and drop the trainer's checkpoints."""
    work.mkdir(parents=True, exist_ok=True)
    half = work / f"{DONE}.half"
    write_file(half, json.dumps(row).encode())
    with disk_errors(work):
        half.replace(work / DONE)
        sync_folder(work)
        for folder in work.glob("checkpoint-*"):
            shutil.rmtree(folder)
