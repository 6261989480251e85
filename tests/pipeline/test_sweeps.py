"""Sweeps: each run is the run that it would be alone, a killed one goes on, and what stays is what was asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelzip.checkpoints.errors import (
    CheckpointError,
    MachineError,
    OutputError,
    ProblemsError,
    RecipeError,
)
from modelzip.evaluation.sweep import SweepReport
from modelzip.pipeline import room
from modelzip.pipeline.run import run_recipe
from modelzip.pipeline.sweeps import FailedRunsError, plan_sweep, run_sweep
from modelzip.recipes.sweep import Sweep, expand

NAMES = ["rtn-2bit", "rtn-4bit", "gptq-2bit", "gptq-4bit"]


class Quiet:
    """Keeps what was said, and how often each step came."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[str] = []

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        self.steps.append(stage)

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def data(speaking, text_file) -> dict[str, Any]:
    return {
        "model": str(speaking("llama")),
        "calibration": {"source": str(text_file), "samples": 8, "seq_len": 16},
        "stages": [{"quantize": {"group_size": 16}}],
        "evaluate": {"data": str(text_file), "windows": 4, "seq_len": 16, "samples": 0},
        "sweep": {"quantize.method": ["rtn", "gptq"], "quantize.bits": [2, 4]},
    }


@pytest.fixture(scope="module")
def sweep(data) -> Sweep:
    return expand(data, "test")


@pytest.fixture(scope="module")
def go(here) -> Callable[..., SweepReport]:
    """go(sweep, folder, ...) -> its report."""

    def run(sweep: Sweep, folder: Path, **options: Any) -> SweepReport:
        return here(lambda: run_sweep(sweep, folder=folder, **{"progress": Quiet(), **options}))

    return run


@pytest.fixture(scope="module")
def whole(sweep, go, tmp_path_factory) -> tuple[Path, SweepReport]:
    """The folder and the report of a sweep that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    return folder, go(sweep, folder)


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of that folder, to be changed."""
    return shutil.copytree(whole[0], tmp_path / "sweep")


def weights_of(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def kept(folder: Path) -> set[str]:
    return {Path(name).parts[0] for name in weights_of(folder)}


def reports(folder: Path) -> set[str]:
    return {file.parent.name for file in folder.glob("*/report.json")}


def by_name(report: SweepReport) -> dict[str, Any]:
    return {run.name: run for run in report.runs}


def test_each_run_is_the_run_that_it_would_be_alone(whole, sweep, here, tmp_path):
    folder, report = whole
    (gptq,) = (one for one in sweep.variants if one.name == "gptq-2bit")
    alone = here(lambda: run_recipe(gptq.recipe, output=tmp_path / "alone", progress=Quiet()))
    assert weights_of(tmp_path / "alone") == weights_of(folder / "gptq-2bit")
    assert by_name(report)["gptq-2bit"].metrics["kl"] == alone.report["evaluation"]["kl"]
    assert reports(folder) == kept(folder) == set(NAMES)


def test_the_runs_stand_by_size_with_their_figures_and_who_beats_them(whole):
    folder, report = whole
    rows = by_name(report)
    assert (report.quality, report.higher_is_better) == ("kl", False)
    sizes = [run.metrics["bytes"] for run in report.runs]
    assert sizes == sorted(sizes)
    for name in NAMES:
        read = json.loads((folder / name / "report.json").read_text())
        assert rows[name].metrics["bytes"] == read["size"]["bytes_after"]
        assert rows[name].quality == read["evaluation"]["kl"]
        assert rows[name].choices["stages[0].quantize.bits"] == int(name[-4])
    assert rows["gptq-2bit"].metrics["bytes"] == rows["rtn-2bit"].metrics["bytes"]
    for run in report.runs:
        beaten = {
            other.name
            for other in report.runs
            if other.metrics["bytes"] <= run.metrics["bytes"]
            and other.quality <= run.quality
            and (other.metrics["bytes"], other.quality) != (run.metrics["bytes"], run.quality)
        }
        assert (run.beaten_by is None) == (not beaten)
        assert run.beaten_by is None or run.beaten_by in beaten
    assert SweepReport.model_validate_json((folder / "sweep.json").read_text()) == report
    assert "gptq-2bit" in (folder / "sweep.md").read_text()
    assert "<svg" in (folder / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("moment", "times", "again"),
    [("quantize", 1, NAMES), ("quantize", 2, NAMES[1:]), ("evaluate", 3, NAMES[2:])],
    ids=["in the first run", "in the second", "measuring the third"],
)
def test_a_killed_sweep_goes_on_with_the_run_that_was_stopped(
    whole, sweep, go, killed_at, tmp_path, moment, times, again
):
    folder = tmp_path / "sweep"
    done = {"quantize": 2, "evaluate": 4}[moment]  # blocks, windows
    with killed_at(moment, done, times=times) as progress:
        go(sweep, folder, progress=progress)
    assert not (folder / "sweep.json").exists()
    with pytest.raises(OutputError, match=r"exists already; give --resume to go on, --overwrite to start again"):
        go(sweep, folder)
    before = {name: (folder / name / "report.json").stat().st_mtime_ns for name in reports(folder)}
    assert [name for name in NAMES if name not in before] == again
    progress = Quiet()
    report = go(sweep, folder, resume=True, progress=progress)
    told = [line for line in progress.lines if line.startswith("run ")]
    assert [line.endswith("finished already") for line in told] == [name in before for name in NAMES]
    assert {name: (folder / name / "report.json").stat().st_mtime_ns for name in before} == before
    assert weights_of(folder) == weights_of(whole[0])
    assert {run.name: run.quality for run in report.runs} == {run.name: run.quality for run in whole[1].runs}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_run_that_fails_does_not_keep_the_others_from_being_made(whole, sweep, go, monkeypatch, tmp_path):
    def failing(recipe: Any, **options: Any) -> Any:
        if recipe.stages[0].settings.label == "gptq-2bit":
            raise OutputError("No room is left.")
        return run_recipe(recipe, **options)

    with monkeypatch.context() as patch:
        patch.setattr("modelzip.pipeline.sweeps.run_recipe", failing)
        with pytest.raises(FailedRunsError) as told:
            go(sweep, tmp_path / "sweep")
    assert told.value.report is not None
    assert {run.name for run in told.value.report.runs} == {*NAMES} - {"gptq-2bit"}
    assert str(told.value).splitlines() == [
        "run gptq-2bit failed: No room is left.",
        f"the others are in {tmp_path / 'sweep' / 'sweep.md'}; --resume tries what failed again.",
    ]
    assert reports(tmp_path / "sweep") == {*NAMES} - {"gptq-2bit"}
    assert "No room is left" in (tmp_path / "sweep" / "sweep.md").read_text()
    report = go(sweep, tmp_path / "sweep", resume=True)
    assert len(report.runs) == len(NAMES)
    assert weights_of(tmp_path / "sweep") == weights_of(whole[0])


def test_a_sweep_killed_between_two_runs_repeats_none_of_them(whole, sweep, go, finished):
    for name in ("gptq-2bit", "gptq-4bit"):
        shutil.rmtree(finished / name)
    progress = Quiet()
    go(sweep, finished, resume=True, progress=progress)
    assert [line for line in progress.lines if "finished already" in line] == [
        "run 1 of 4, rtn-2bit, is finished already",
        "run 2 of 4, rtn-4bit, is finished already",
    ]
    assert weights_of(finished) == weights_of(whole[0])


def test_a_finished_sweep_does_nothing_again_and_one_with_more_values_only_the_new_runs(data, go, finished):
    before = weights_of(finished)
    progress = Quiet()
    go(expand(data, "test"), finished, resume=True, progress=progress)
    assert progress.steps == []
    more = expand({**data, "sweep": {"quantize.method": ["rtn", "gptq"], "quantize.bits": [2, 3, 4]}}, "test")
    report = go(more, finished, resume=True)
    assert len(report.runs) == 6
    assert before.items() < weights_of(finished).items()


def test_other_evaluation_data_measure_the_runs_anew_without_making_them_again(data, go, finished, prose, tmp_path):
    (tmp_path / "other.txt").write_text(prose(2000, seed=1), encoding="utf-8")
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}
    other = {**data, "evaluate": {**data["evaluate"], "data": str(tmp_path / "other.txt")}}
    report = go(expand(other, "test"), finished, resume=True)
    assert report.protocol.source == str(tmp_path / "other.txt")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    shas = {
        json.loads((finished / name / "report.json").read_text())["evaluation"]["protocol"]["sha256"] for name in NAMES
    }
    assert len(shas) == 1


def test_runs_that_were_measured_on_different_data_are_not_compared(sweep, go, finished):
    file = finished / "rtn-4bit" / "report.json"
    report = json.loads(file.read_text())
    report["evaluation"]["protocol"]["sha256"] = "0" * 64
    file.write_text(json.dumps(report))
    with pytest.raises(OutputError, match="rtn-4bit was measured on other data than rtn-2bit"):
        go(sweep, finished, resume=True)


def test_runs_of_another_recipe_are_refused_all_at_once_and_replaced_if_told_to(data, go, finished):
    other = expand({**data, "seed": 1}, "test")
    with pytest.raises(ProblemsError) as caught:
        go(other, finished, resume=True)
    assert len(caught.value.sentences) == 4
    assert "give --overwrite" in caught.value.sentences[0]
    one = expand({**data, "seed": 1, "sweep": {"quantize.bits": [4], "quantize.method": ["rtn"]}}, "test")
    assert [run.name for run in go(one, finished, overwrite=True).runs] == ["4bit-rtn"]


def test_weights_stay_as_asked_and_those_that_are_wanted_later_are_made_again(whole, sweep, go, tmp_path):
    folder = tmp_path / "sweep"
    front = {run.name for run in whole[1].front}
    assert front < set(NAMES)
    report = go(sweep, folder, keep="front")
    assert kept(folder) == front
    assert {run.name for run in report.runs if run.kept} == front
    progress = Quiet()
    go(sweep, folder, keep="none", resume=True, progress=progress)
    assert (kept(folder), progress.steps) == (set(), [])
    assert reports(folder) == set(NAMES)
    progress = Quiet()
    go(sweep, folder, keep="all", resume=True, progress=progress)
    assert sum(line.endswith("again, whose weights weren't kept") for line in progress.lines) == 4
    assert weights_of(folder) == weights_of(whole[0])


def test_what_the_model_refuses_is_told_for_all_runs_before_any_work(data, go, tmp_path):
    stage = {"quantize": {"group_size": 16, "strict_groups": True}}
    strict = {**data, "stages": [stage], "sweep": {"quantize.group_size": [16, 24, 40]}}
    with pytest.raises(ProblemsError) as caught:
        go(expand(strict, "test"), tmp_path / "sweep")
    assert {sentence.split(":")[0] for sentence in caught.value.sentences} == {"run group-size24", "run group-size40"}
    assert not (tmp_path / "sweep").exists()
    planned = plan_sweep(expand(strict, "test"), folder=tmp_path / "sweep", skip_invalid=True)
    assert [one.name for one, _ in planned.runs] == ["group-size16"]
    assert {one.name for one in planned.skipped} == {"group-size24", "group-size40"}


def test_what_is_wrong_with_every_run_is_said_once(data, tmp_path):
    wrong = {**data, "stages": [{"quantize": {"group_size": 16, "ignore": ["*.no_such"]}}]}
    with pytest.raises(ProblemsError) as caught:
        plan_sweep(expand(wrong, "test"), folder=tmp_path / "sweep", skip_invalid=True)
    assert len(caught.value.sentences) == 1
    assert "no_such" in caught.value.sentences[0]


def test_a_model_that_is_not_there_is_one_error(data, tmp_path):
    with pytest.raises(CheckpointError):
        plan_sweep(expand({**data, "model": str(tmp_path / "nowhere")}, "test"), folder=tmp_path / "sweep")


def test_a_disk_that_holds_each_run_but_not_all_is_refused_unless_they_go(sweep, go, tmp_path, monkeypatch):
    planned = plan_sweep(sweep, folder=tmp_path / "sweep")
    sizes = [plans[-1].bytes_after for _, plans in planned.runs]
    most = max(plans[-1].disk_bytes for _, plans in planned.runs)
    free = most + sum(sizes) - max(sizes)
    usage = lambda free: lambda _: type("Usage", (), {"free": free})()  # noqa: E731
    monkeypatch.setattr(room.shutil, "disk_usage", usage(free - 1))
    with pytest.raises(MachineError, match="MB free"):
        go(sweep, tmp_path / "sweep")
    assert len(go(sweep, tmp_path / "sweep", keep="none").runs) == 4


def test_a_recipe_with_a_sweep_is_not_run_as_one_run(data, here, tmp_path):
    from modelzip.recipes.load import parse_recipe

    with pytest.raises(RecipeError, match="modelzip sweep"):
        run_recipe(parse_recipe(data, "test"), output=tmp_path / "out", progress=Quiet())
