"""The stages of a run, one after the other: each starts from the checkpoint that the one before it left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelzip.checkpoints.index import Checkpoint

from . import ranks
from .context import Run
from .data_kind import kind_of
from .engines import run_stage
from .folders import memory_file
from .identity import provenance_of, read_provenance
from .measured import examples_section, windows_section
from .plans import Plan, plan_again, unforeseen
from .text import Windows
from .tokens import same_tokens, windows_for
from .train.plan import TrainingPlan


@dataclass(frozen=True)
class StageDone:
    """A stage that has run. plan: on what it was given. bytes_after: of what it left. seconds: None where an earlier
    run did it. evaluation: None where nothing was measured."""

    plan: Plan
    method: str
    records: dict[str, Any]
    bytes_after: int
    seconds: float | None
    evaluation: dict[str, Any] | None


def run_chain(
    run: Run, calibration: Windows | None, kept: Windows | None, *, overwrite: bool, resume: bool
) -> list[StageDone]:
    """Run all stages; all but the last write where `run.targets` says, and are measured if the recipe asks for it.

    With `resume`, stages that are finished are not run again, nor what was measured of them measured again. Of several
    processes, all take part where a stage trains; the main one does everything else.
    """
    done: list[StageDone] = []
    source = run.checkpoint
    for number, (plan, target) in enumerate(zip(run.plans, run.targets, strict=True)):
        if number:
            before = run.plans[number - 1].result
            plan = plan_again(plan, run.context.recipe, number, source, before=before)
            for note in unforeseen(plan, run.plans[number]) if ranks.is_main() else ():
                run.context.progress.say(note)
        is_last = target == run.output
        stage = run.context.recipe.stages[number]
        begin = time.perf_counter()
        is_there = resume and ranks.is_main()
        earlier = ranks.told(read_provenance(target, run.context.fingerprint) if is_there else None)
        records: dict[str, Any] = {}
        if earlier is not None:
            records = earlier["stages"][-1]["records"]
        elif ranks.is_main() or isinstance(plan, TrainingPlan):
            windows = calibration if plan.needs_data else None
            if windows is not None:
                windows = windows_for(source, windows, original=run.checkpoint, context=run.context)
            records = run_stage(
                plan,
                source,
                target=target,
                windows=windows,
                describe=_describer(run, done),
                overwrite=overwrite or target in run.passing,
                resume=resume,
                context=run.context,
            )
        ranks.wait()
        seconds = time.perf_counter() - begin if earlier is None else None
        source = Checkpoint.open(str(target))
        evaluation = None if is_last or not ranks.is_main() else _measured_once(run, number, source, kept)
        done.append(StageDone(plan, stage.settings.label, records, source.nbytes, seconds, evaluation))
    return done


def finished_chain(run: Run, provenance: dict[str, Any], kept: Windows | None) -> list[StageDone]:
    """What the stages of a finished run recorded, and what is still to be measured of them.

    Sizes of those whose outputs are gone are the planned ones.
    """
    done = []
    for number, (one, plan, target) in enumerate(zip(provenance["stages"], run.plans, run.targets, strict=True)):
        result = None
        if target != run.output and read_provenance(target, run.context.fingerprint) is not None:
            result = Checkpoint.open(str(target))
        found = _remembered(run, number) if result is None else _measured_once(run, number, result, kept)
        size = plan.bytes_after if result is None else result.nbytes
        done.append(StageDone(plan, one["method"], one["records"], size, None, found))
    return done


def _describer(run: Run, done: list[StageDone]) -> Callable[[dict[str, Any]], bytes]:
    """A function from a stage's records to the bytes of modelzip.json, with those of earlier stages."""
    earlier = [{"kind": one.plan.kind, "method": one.method, "records": one.records} for one in done]
    stage = run.context.recipe.stages[len(done)]

    def describe(records: dict[str, Any]) -> bytes:
        own = {"kind": stage.kind, "method": stage.settings.label, "records": records}
        return provenance_of(run.context.recipe, run.checkpoint, run.context.fingerprint, [*earlier, own])

    return describe


def measured(run: Run, result: Checkpoint, kept: Windows | None) -> dict[str, Any] | None:
    """What a stage's result costs in quality: its report's `evaluation`; None if it isn't measured."""
    recipe, bench = run.context.recipe, run.context.bench
    begin = time.perf_counter()
    found, enabled = None, recipe.evaluate.enabled
    if enabled and (kind := kind_of(recipe.evaluate, result.config)) != "tokens":
        found = examples_section(kind, result, run.checkpoint, recipe.evaluate, bench)
    elif kept is not None and run.kind == "tokens" and same_tokens(result, run.checkpoint):
        found = windows_section(result, run.checkpoint, kept, recipe.evaluate, bench)
    run.context.clock.add("evaluate", begin)
    return found


def _measured_once(run: Run, number: int, result: Checkpoint, kept: Windows | None) -> dict[str, Any] | None:
    """The same for a stage that isn't the last, from an interrupted run if that measured it."""
    if not run.context.recipe.evaluate.each_stage:
        return None
    found = _remembered(run, number)
    if found is None and (found := measured(run, result, kept)) is not None:
        _remember(run, number, found)
    return found


def _remembered(run: Run, number: int) -> dict[str, Any] | None:
    file = memory_file(run)
    data = json.loads(file.read_text()) if file.is_file() else {}
    if data.get("fingerprint") != run.context.fingerprint or data.get("evaluate") != _protocol(run):
        return None
    found: dict[str, Any] | None = data["stages"].get(str(number))
    return found


def _remember(run: Run, number: int, found: dict[str, Any]) -> None:
    file = memory_file(run)
    earlier = {str(one): value for one in range(number) if (value := _remembered(run, one)) is not None}
    data = {"fingerprint": run.context.fingerprint, "evaluate": _protocol(run)}
    draft = file.with_name(f"{file.name}.partial")
    draft.write_text(json.dumps({**data, "stages": {**earlier, str(number): found}}))
    os.replace(draft, file)


def _protocol(run: Run) -> dict[str, Any]:
    return run.context.recipe.evaluate.model_dump(mode="json")
