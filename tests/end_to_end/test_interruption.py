"""Runs that end before their time: kill -9 at a write, Ctrl-C, two at once. What is left is nothing, or resumable."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

JOURNAL = ".modelzip-journal.jsonl"
TAKEN = 8
"""Writes at which a run is killed by the test that doesn't try all."""


def arguments(output: str, *more: str) -> tuple[str, ...]:
    method = ("--method", "gptq", "--bits", "4", "--group-size", "32", "--no-evaluate")
    data = ("--calibration", "wiki.txt", "--samples", "4", "--seq-len", "32")
    return ("quantize", "my-model", *method, *data, "--output", output, *more)


def partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def blocks_done(output: Path) -> int:
    """Blocks that the journal in the hidden folder says are on disk."""
    file = partial_of(output) / JOURNAL
    return file.read_bytes().count(b'"part": ') if file.exists() else 0


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_llama, write_text) -> Path:
    """A folder with `my-model`, of six blocks, and `wiki.txt`."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "my-model", layers=6)
    write_text(folder / "wiki.txt", 40_000)
    return folder


@pytest.fixture(scope="module")
def whole(place, modelzip, hashes) -> tuple[dict[str, str], int]:
    """The files of a run that nobody interrupted until they were all written, and the number of its writes."""
    running = modelzip.fork(*arguments("whole"), cwd=place, strike_at_process=1)
    running.wait()
    return hashes(place / "whole"), int((running.job / "writes").read_text())


@pytest.fixture
def output(place) -> Path:
    """A path that nothing has been written to."""
    return place / f"out-{len(list(place.iterdir()))}"


@pytest.fixture
def interrupted(place, whole, output, modelzip) -> Path:
    """A path whose run was killed in the middle of the fourth block or so."""
    assert modelzip.fork(*arguments(output.name), cwd=place, strike_at=whole[1] // 2).wait().code == -signal.SIGKILL
    assert blocks_done(output) >= 2
    return output


def killed_and_resumed(modelzip, place: Path, *, moment: int) -> Path:
    """The output of a run that was killed at a write, and of its resumption, up to the reopening."""
    output = place / f"swept-{moment}"
    killed = modelzip.fork(*arguments(output.name), cwd=place, strike_at=moment).wait()
    assert killed.code == -signal.SIGKILL, killed.err
    assert not output.exists() or not partial_of(output).exists()
    resumed = modelzip.fork(*arguments(output.name, "--resume"), cwd=place, strike_at_process=1).wait()
    assert resumed.code == -signal.SIGKILL, resumed.err
    assert not partial_of(output).exists()
    return output


def test_a_process_killed_after_a_block_leaves_a_hidden_folder_and_resumes_to_the_bytes_of_a_whole_run(
    place, interrupted, whole, modelzip, hashes
):
    output = interrupted
    assert not output.exists()
    journal = (partial_of(output) / JOURNAL).read_text(encoding="utf-8").rpartition("\n")[0]  # all but a torn line
    parts = (file for file in partial_of(output).glob("part-*.safetensors") if file.name in journal)
    kept = {file: file.stat().st_mtime_ns for file in parts}
    assert kept
    resumed = modelzip.start(*arguments(output.name, "--resume"), cwd=place).wait()
    assert resumed.code == 0, resumed.err
    assert hashes(output) == whole[0]
    assert not partial_of(output).exists()
    assert set(kept.values()) <= {file.stat().st_mtime_ns for file in output.glob("model-*.safetensors")}
    assert json.loads((output / "report.json").read_text())["verification"]["max_logit_difference"] < 1e-3


def test_killed_at_writes_all_along_a_run_it_resumes_to_the_bytes_of_a_whole_run(place, whole, modelzip, hashes):
    files, writes = whole
    spread = range(1, writes - 8, writes // TAKEN)
    for moment in (*spread, *range(writes - 5, writes + 1)):  # the last few publish the folder
        output = killed_and_resumed(modelzip, place, moment=moment)
        assert hashes(output) == files, f"killed at write {moment} of {writes}"
        shutil.rmtree(output)


@pytest.mark.slow
def test_killed_at_any_write_at_all_a_run_resumes_to_the_bytes_of_a_whole_run(place, whole, modelzip, hashes):
    files, writes = whole
    wrong = []
    for moment in range(1, writes + 1):
        output = killed_and_resumed(modelzip, place, moment=moment)
        if hashes(output) != files:
            wrong.append(moment)
        shutil.rmtree(output)
    assert wrong == []


def test_killed_again_and_again_a_run_still_ends_in_the_bytes_of_a_whole_run(place, whole, output, modelzip, hashes):
    done = []
    for _ in range(3):
        killed = modelzip.fork(*arguments(output.name, "--resume"), cwd=place, strike_at=60)
        assert killed.wait().code == -signal.SIGKILL
        done.append(blocks_done(output))
    assert done == sorted(done)
    assert done[-1] > done[0]
    modelzip.fork(*arguments(output.name, "--resume"), cwd=place, strike_at_process=1).wait()
    assert hashes(output) == whole[0]


def test_a_part_that_was_damaged_after_the_kill_is_made_again(place, whole, interrupted, modelzip, hashes):
    part = next(partial_of(interrupted).glob("part-*.safetensors"))
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    modelzip.fork(*arguments(interrupted.name, "--resume"), cwd=place, strike_at_process=1).wait()
    assert hashes(interrupted) == whole[0]


def test_what_an_interrupted_run_left_is_refused_without_resume_or_overwrite_and_kept(
    place, interrupted, modelzip, hashes
):
    before = hashes(partial_of(interrupted))
    done = modelzip.fork(*arguments(interrupted.name), cwd=place).wait()
    assert done.code == 2
    assert len(done.errors) == 1
    assert "--resume" in done.errors[0]
    assert "--overwrite" in done.errors[0]
    assert hashes(partial_of(interrupted)) == before


def test_overwrite_starts_an_interrupted_run_again(place, whole, interrupted, modelzip, hashes):
    part = next(partial_of(interrupted).glob("part-*.safetensors"))
    part.write_bytes(b"what the first run left")
    modelzip.fork(*arguments(interrupted.name, "--overwrite"), cwd=place, strike_at_process=1).wait()
    assert hashes(interrupted) == whole[0]


def test_another_recipe_does_not_resume_an_interrupted_run(place, interrupted, modelzip):
    done = modelzip.fork(*arguments(interrupted.name, "--resume", "--bits", "8"), cwd=place).wait()
    assert done.code == 2
    assert done.errors == [
        error for error in done.errors if "another recipe" in error and str(interrupted.name) in error
    ]
    assert blocks_done(interrupted) >= 2


def test_killed_while_it_replaces_a_folder_a_run_loses_neither_the_old_model_nor_the_new(
    place, whole, output, modelzip, hashes
):
    files, writes = whole
    for moment in range(writes - 2, writes + 6):
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(place / "whole", output)
        (output / "modelzip.json").write_text('{"fingerprint": "of another run"}')
        old = hashes(output)
        killed = modelzip.fork(*arguments(output.name, "--overwrite"), cwd=place, strike_at=moment, strike_at_process=1)
        killed.wait()
        saved = output if output.exists() else output.with_name(f".{output.name}.old")
        assert {**hashes(saved), JOURNAL: ""} in ({**old, JOURNAL: ""}, {**files, JOURNAL: ""})
        again = modelzip.fork(*arguments(output.name, "--overwrite", "--resume"), cwd=place, strike_at_process=1)
        again.wait()
        assert hashes(output) == files
        assert [path for path in place.iterdir() if path.name.startswith(f".{output.name}")] == []


@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by SIGTERM")])
def test_a_signal_exits_130_with_one_line_that_says_how_to_resume(place, whole, output, modelzip, hashes, number, told):
    running = modelzip.fork(*arguments(output.name), cwd=place, strike_at=whole[1] // 2, hang=True)
    running.hangs()
    running.send(number)
    done = running.wait()
    assert done.code == 130
    assert done.err.splitlines()[-1] == f"error: {told}; the same command with --resume goes on"
    assert len(done.errors) == 1
    assert "Traceback" not in done.err
    assert not output.exists()
    assert blocks_done(output) >= 2
    modelzip.fork(*arguments(output.name, "--resume"), cwd=place, strike_at_process=1).wait()
    assert hashes(output) == whole[0]


def test_of_two_runs_for_one_output_the_second_is_refused_and_the_first_ends_well(
    place, whole, output, modelzip, hashes
):
    first = modelzip.fork(*arguments(output.name), cwd=place, strike_at=whole[1] // 2, strike_at_process=1, hang=True)
    first.hangs()
    for options in ((), ("--overwrite", "--resume")):
        second = modelzip.fork(*arguments(output.name, *options), cwd=place).wait()
        assert second.code == 2
        assert len(second.errors) == 1
        assert f"Another run is writing {output}" in second.errors[0]
    first.release()
    first.hangs()
    first.send(signal.SIGKILL)
    first.wait()
    assert hashes(output) == whole[0]


def test_a_finished_output_is_not_run_again_by_resume(place, whole, output, modelzip):
    shutil.copytree(place / "whole", output)
    kept = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    modelzip.fork(*arguments(output.name, "--resume"), cwd=place, strike_at_process=1).wait()
    assert {file: file.stat().st_mtime_ns for file in output.iterdir()} == kept
