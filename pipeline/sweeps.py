"""A sweep: a run for each combination of what varies, each an ordinary run in a folder of its own, and one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from modelzip.checkpoints.errors import ModelzipError, OutputError, ProblemsError, RecipeError
from modelzip.checkpoints.target import partial_of
from modelzip.evaluation.gates import Gate, parse_gates
from modelzip.evaluation.quality import HIGHER
from modelzip.evaluation.report import validate
from modelzip.evaluation.sweep import Finished, SweepReport, SweepSkipped, answer, ranked
from modelzip.evaluation.sweep_report import FILES, write_sweep
from modelzip.recipes.load import recipe_data
from modelzip.recipes.sweep import Skipped, Sweep, Variant

from . import ranks
from .checks import REPORT
from .environment import package_version
from .measure import pick_device
from .plans import Plan
from .progress import Progress
from .room import check_machine
from .run import earlier_run, plan_recipe, run_recipe

Keep = Literal["all", "front", "none"]
WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json")
"""Files of an output that are gone where only its report is kept."""


class FailedRunsError(ProblemsError):
    """Runs of a sweep failed. report: the table of the others, None if there are none."""

    def __init__(self, sentences: Sequence[str], report: SweepReport | None) -> None:
        super().__init__(sentences)
        self.report = report


@dataclass(frozen=True)
class Planned:
    """The runs that can be done, each with the plans of its stages, and those that can't."""

    runs: tuple[tuple[Variant, tuple[Plan, ...]], ...]
    skipped: tuple[Skipped, ...]


def plan_sweep(
    sweep: Sweep, *, folder: Path, overwrite: bool = False, resume: bool = False, skip_invalid: bool = False
) -> Planned:
    """The plans of all runs, from headers alone. Raises ProblemsError with the mistakes of all of them, OutputError.

    skip_invalid: leave out runs that the model, or a method, refuses.
    """
    _check_folder(folder, overwrite=overwrite, resume=resume)
    runs: list[tuple[Variant, tuple[Plan, ...]]] = []
    skipped: list[Skipped] = []
    for one in sweep.variants:
        try:
            plans = plan_recipe(one.recipe, output=folder / one.name, overwrite=overwrite, resume=resume)
        except RecipeError as error:
            sentences = error.sentences if isinstance(error, ProblemsError) else (str(error),)
            skipped += [Skipped(one.name, f"run {one.name}: {sentence}") for sentence in sentences]
        else:
            runs.append((one, tuple(plans)))
    if skipped and not (skip_invalid and runs):
        raise ProblemsError(_gathered(skipped, len(sweep.variants)))
    return Planned(tuple(runs), (*sweep.skipped, *skipped))


def run_sweep(
    sweep: Sweep,
    *,
    folder: Path,
    keep: Keep = "all",
    overwrite: bool = False,
    resume: bool = False,
    skip_invalid: bool = False,
    progress: Progress,
) -> SweepReport:
    """Run all that isn't done, and write the table of all runs into the folder. Raises ModelzipError and its kinds;
    FailedRunsError for runs that fail, when the others are done and in the table.

    keep: whose weights stay: of all runs, of those on the Pareto front, or of none. Reports stay.
    """
    ranks.join(pick_device(sweep.base.device))
    if ranks.count() > 1:
        raise RecipeError("A sweep runs in one process: start it without torchrun or accelerate launch.")
    gates = parse_gates(sweep.base.evaluate.fail_if)
    planned = plan_sweep(sweep, folder=folder, overwrite=overwrite, resume=resume, skip_invalid=skip_invalid)
    runs = [one for one, _ in planned.runs]
    reports = _earlier(runs, folder, overwrite=overwrite) if resume else {}
    _check_disk(planned, reports, folder, keep)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    failed: list[Skipped] = []
    for number, one in enumerate(runs, 1):
        if one.name in reports:
            progress.say(f"run {number} of {len(runs)}, {one.name}, is finished already")
            continue
        progress.say(f"run {number} of {len(runs)}, {one.name}")
        output = folder / one.name
        try:
            result = run_recipe(one.recipe, output=output, overwrite=overwrite, resume=resume, progress=progress)
        except (ModelzipError, MemoryError) as error:
            failed.append(Skipped(one.name, str(error) or "memory ran out"))
            progress.say(f"run {one.name} failed: {failed[-1].reason}")
            continue
        assert result.report is not None, "this is the only process"
        reports[one.name] = result.report
        _check_alike(runs, reports)
        _drop(_finished(runs, reports, folder), keep, folder)
    report = None
    if reports:
        _restore(runs, reports, keep, folder, progress=progress)
        _drop(_finished(runs, reports, folder), keep, folder)
        report = _report(sweep, _finished(runs, reports, folder), gates, (*planned.skipped, *failed))
        write_sweep(folder, report)
    if failed:
        others = f"the others are in {folder / FILES[1]}; " if reports else ""
        told = [f"run {one.name} failed: {one.reason}" for one in failed]
        raise FailedRunsError([*told, f"{others}--resume tries what failed again."], report)
    assert report is not None, "there is a run, and it hasn't failed"
    return report


def _check_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"The sweep's folder {folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite or resume):
        raise OutputError(
            f"The sweep's folder {folder} exists already; give --resume to go on, --overwrite to start again, or name "
            "another with --output."
        )


def _gathered(skipped: Iterable[Skipped], count: int) -> list[str]:
    """The sentences; what is wrong with all runs is said once."""
    names: dict[str, list[str]] = {}
    for one in skipped:
        names.setdefault(one.reason.removeprefix(f"run {one.name}: "), []).append(one.name)
    return [
        sentence if len(runs) == count else f"run {', '.join(runs)}: {sentence}" for sentence, runs in names.items()
    ]


def _earlier(runs: Sequence[Variant], folder: Path, *, overwrite: bool) -> dict[str, dict[str, Any]]:
    """The reports of runs that are finished. Raises ProblemsError where something else lies in a run's place."""
    reports: dict[str, dict[str, Any]] = {}
    problems, outdated = [], []
    for one in runs:
        output = folder / one.name
        is_ours, report = earlier_run(one.recipe, output=output)
        if report is not None:
            reports[one.name] = report
        elif is_ours and _has_weights(output):
            outdated.append(output / REPORT)
        elif output.exists() and any(output.iterdir()) and not overwrite:
            problems.append(
                f"{output} is of another recipe, model, data or version, or its weights are gone and it was measured "
                "otherwise; give --overwrite together with --resume to run it again, or name another folder."
            )
    if problems:
        raise ProblemsError(problems)
    _check_alike(runs, reports)
    for file in outdated:  # without a report of what is asked now, the run that goes on measures anew
        file.unlink(missing_ok=True)
    return reports


def _check_alike(runs: Sequence[Variant], reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise OutputError if the runs so far weren't measured against the same model on the same data."""
    known = [(one.name, reports[one.name]) for one in runs if one.name in reports]
    for name, report in known[1:]:
        if _measured_on(report) != _measured_on(known[0][1]):
            raise OutputError(
                f"{name} was measured on other data than {known[0][0]}, so they can't be compared: the file has "
                "changed since; give --overwrite to start again, or name another folder."
            )


def _measured_on(report: Mapping[str, Any]) -> tuple[Any, ...]:
    protocol = (report["evaluation"] or {}).get("protocol") or {}
    return report["source"]["sha256"], protocol.get("sha256"), protocol.get("dtype")


def _check_disk(planned: Planned, reports: Mapping[str, Any], folder: Path, keep: Keep) -> None:
    """Raise MachineError if all the runs that will be kept can't lie on the disk together."""
    to_do = [plans for one, plans in planned.runs if one.name not in reports]
    left = [plans[-1].bytes_after for plans in to_do]
    most = max((max(plan.disk_bytes for plan in plans) for plans in to_do), default=0)
    begun = sum(file.stat().st_size for one, _ in planned.runs for file in partial_of(folder / one.name).rglob("*"))
    kept = sum(left) - max(left, default=0) if keep == "all" else 0
    check_machine(folder, disk_bytes=kept + most - begun, memory_bytes=0)


def _finished(runs: Sequence[Variant], reports: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Finished]:
    return [
        Finished(one.name, one.choices, validate(reports[one.name]), _has_weights(folder / one.name))
        for one in runs
        if one.name in reports
    ]


def _has_weights(output: Path) -> bool:
    return any(output.glob(WEIGHTS[0]))


def _wanted(finished: Sequence[Finished], keep: Keep) -> set[str]:
    """The runs whose weights are to stay."""
    metric, rows = ranked(finished)
    front = {row.name for row in rows if row.beaten_by is None and (row.quality is not None or metric is None)}
    return {"all": {row.name for row in rows}, "front": front, "none": set[str]()}[keep]


def _drop(finished: Sequence[Finished], keep: Keep, folder: Path) -> None:
    """Remove the weights of runs that aren't kept; what has been beaten once stays beaten."""
    for name in {one.name for one in finished} - _wanted(finished, keep):
        for file in (file for pattern in WEIGHTS for file in (folder / name).glob(pattern)):
            file.unlink()


def _restore(
    runs: Sequence[Variant],
    reports: dict[str, dict[str, Any]],
    keep: Keep,
    folder: Path,
    *,
    progress: Progress,
) -> None:
    """Do those runs again whose weights an earlier sweep hasn't kept and this one is to keep."""
    wanted = _wanted(_finished(runs, reports, folder), keep)
    for one in runs:
        output = folder / one.name
        if one.name in wanted and not _has_weights(output):
            progress.say(f"{one.name} again, whose weights weren't kept")
            result = run_recipe(one.recipe, output=output, overwrite=True, resume=False, progress=progress)
            assert result.report is not None, "this is the only process"
            reports[one.name] = result.report


def _report(
    sweep: Sweep, finished: Sequence[Finished], gates: Sequence[Gate], skipped: Sequence[Skipped]
) -> SweepReport:
    metric, rows = ranked(finished, gates)
    evaluation, source = finished[0].report.evaluation, finished[0].report.source
    return SweepReport(
        schema_version=1,
        modelzip=package_version("modelzip"),
        source=source,
        recipe=recipe_data(sweep.base),
        protocol=None if evaluation is None else evaluation.protocol,
        quality=metric,
        higher_is_better=metric in HIGHER,
        answer=tuple(answer(metric, rows, [gate.text for gate in gates])),
        runs=tuple(rows),
        skipped=tuple(SweepSkipped(name=one.name, reason=one.reason) for one in skipped),
    )
