"""`modelzip run` over stages of all three engines, killed, interrupted, resumed and refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
model: my-model
calibration: {source: train.tsv, field: sentence, samples: 4, seq_len: 16}
evaluate: {data: dev.tsv}
stages:
- prune: {method: layers, drop: [1]}
- distill: {method: labels, data: train.tsv, max_steps: 6, save_every: 2, log_every: 2}
- prune: {method: sparsegpt, sparsity: 0.5}
- quantize: {method: gptq, bits: 4, group_size: 16}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_classifier, write_labelled) -> Path:
    """A folder with `my-model`, a classifier of three layers, its data and `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("place")
    save_classifier(folder / "my-model", layers=3)
    write_labelled(folder / "train.tsv", 64)
    write_labelled(folder / "dev.tsv", 32, seed=1)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def whole(place, modelzip, hashes) -> tuple[dict[str, str], int]:
    """The files of a chain that nobody interrupted until they were all written, and the number of its writes."""
    running = modelzip.fork("run", "recipe.yaml", "-o", "whole", cwd=place, strike_at_process=1)
    assert running.wait().code == -signal.SIGKILL, (running.job / "err").read_text()
    return hashes(place / "whole"), int((running.job / "writes").read_text())


@pytest.fixture
def left(place) -> Callable[[str], list[str]]:
    """left(output) -> the hidden names beside it that are its own."""
    return lambda name: sorted(path.name for path in place.iterdir() if path.name.lstrip(".").startswith(f"{name}."))


@pytest.mark.slow
def test_killed_at_writes_all_along_a_chain_resumes_to_the_bytes_of_a_whole_one(place, whole, modelzip, hashes):
    files, writes = whole
    wrong = []
    for moment in range(writes // 12, writes, writes // 6):
        killed = modelzip.fork("run", "recipe.yaml", "-o", "swept", cwd=place, strike_at=moment).wait()
        assert killed.code == -signal.SIGKILL, killed.err
        resumed = modelzip.fork("run", "recipe.yaml", "-o", "swept", "--resume", cwd=place, strike_at_process=1).wait()
        assert resumed.code == -signal.SIGKILL, resumed.err
        if hashes(place / "swept") != files:
            wrong.append(moment)
        shutil.rmtree(place / "swept")
        for path in place.glob(".*swept*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert wrong == []


def test_ctrl_c_exits_130_and_the_chain_goes_on_to_a_report_of_all_stages(place, whole, left, modelzip, hashes):
    files, writes = whole
    running = modelzip.fork("run", "recipe.yaml", "-o", "out", cwd=place, strike_at=writes // 2, hang=True)
    running.hangs()
    running.send(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == "error: interrupted; the same command with --resume goes on"
    assert "Traceback" not in stopped.err
    refused = modelzip.fork("run", "recipe.yaml", "-o", "out", cwd=place).wait()
    assert refused.code == 2
    assert len(refused.errors) == 1
    assert "out has left" in refused.errors[0]
    other = ("--seed", "1", "--resume")
    changed = modelzip.fork("run", "recipe.yaml", "-o", "out", *other, cwd=place).wait()
    assert changed.code == 2
    assert "another recipe, model or version (seed was 0 and is 1)" in changed.errors[0]
    done = modelzip.fork("run", "recipe.yaml", "-o", "out", "--resume", "--json", cwd=place).wait()
    assert done.code == 0, done.err
    assert hashes(place / "out") == files
    assert left("out") == []
    stages = json.loads(done.out)["stages"]
    assert [stage["kind"] for stage in stages] == ["prune", "distill", "prune", "quantize"]
    assert all(stage["evaluation"]["accuracy"] for stage in stages)
    again = modelzip.fork("run", "recipe.yaml", "-o", "out", "--resume", cwd=place).wait()
    assert again.code == 0
    assert "finished already" in again.err


def test_a_dry_run_shows_every_stage_and_writes_nothing(place, modelzip):
    before = sorted(place.iterdir())
    shown = modelzip.fork("run", "recipe.yaml", "-o", "dry", "--dry-run", cwd=place).wait()
    assert shown.code == 0, shown.err
    for told in ("(stage 1 of 4, prune)", "(stage 2 of 4, distill)", "the whole model", "50 % zeros, 4 bit"):
        assert told in shown.out
    plain = modelzip.fork("run", "recipe.yaml", "-o", "dry", "--dry-run", "--json", cwd=place).wait()
    plans = json.loads(plain.out)["plans"]
    assert [plan["kind"] for plan in plans] == ["prune", "distill", "prune", "quantize"]
    assert [plan["bytes_before"] for plan in plans[1:]] == [plan["bytes_after"] for plan in plans[:-1]]
    assert sorted(place.iterdir()) == before
