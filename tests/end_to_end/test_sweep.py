"""`modelzip sweep`, as anybody would start it: killed, resumed, gated, and refused before any work."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

RECIPE = """\
model: my-model
calibration: {source: wiki.txt, samples: 4, seq_len: 32}
evaluate: {data: wiki.txt, windows: 2, seq_len: 32, samples: 0}
stages: [{quantize: {group_size: 32}}]
sweep: {quantize.method: [rtn, gptq], quantize.bits: [4]}
"""
NAMES = {"rtn-4bit", "gptq-4bit"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_llama, write_text) -> Path:
    """A folder with `my-model`, of two blocks, `wiki.txt` and `sweep.yaml`."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "my-model", layers=2)
    write_text(folder / "wiki.txt", 20_000)
    (folder / "sweep.yaml").write_text(RECIPE)
    return folder


def test_a_sweep_that_is_interrupted_goes_on_to_one_table_of_all_runs(place, modelzip, hashes):
    running = modelzip.fork("sweep", "sweep.yaml", "-o", "out", cwd=place)
    second = place / "out" / ".gptq-4bit.partial"
    assert running.until(second.exists)
    running.send(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == "error: interrupted; the same command with --resume goes on"
    first = hashes(place / "out" / "rtn-4bit")
    refused = modelzip.fork("sweep", "sweep.yaml", "-o", "out", cwd=place).wait()
    assert (refused.code, len(refused.errors)) == (2, 1)
    assert "--resume" in refused.errors[0]

    done = modelzip.fork("sweep", "sweep.yaml", "-o", "out", "--resume", "--json", cwd=place).wait()
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report == json.loads((place / "out" / "sweep.json").read_text())
    assert {run["name"] for run in report["runs"]} == NAMES
    assert "run 1 of 2, rtn-4bit, is finished already" in done.err
    assert hashes(place / "out" / "rtn-4bit") == first
    assert sorted(path.name for path in (place / "out").iterdir()) == sorted(
        [*NAMES, "sweep.html", "sweep.json", "sweep.md"]
    )

    shown = modelzip.fork("sweep", "sweep.yaml", "-o", "out", "--resume", cwd=place).wait()
    assert shown.code == 0, shown.err
    assert "best for its size" in shown.out
    assert "The best at each number of bits: " in shown.out
    gated = ("sweep", "sweep.yaml", "-o", "out", "--resume", "--fail-if")
    assert modelzip.fork(*gated, "kl > 1000", cwd=place).wait().code == 0
    failed = modelzip.fork(*gated, "bytes > 10", cwd=place).wait()
    assert (failed.code, len(failed.errors)) == (3, 1)
    assert 'No run of the sweep passes "bytes > 10"' in failed.errors[0]


def test_a_run_that_fails_is_told_below_the_table_of_the_others(place, modelzip):
    sweep = "sweep: {quantize: [{method: rtn}, {method: gptq, max_kl: 1.0e-9}]}"
    recipe = RECIPE.replace(RECIPE.splitlines()[-1], sweep)
    (place / "failing.yaml").write_text(recipe)
    done = modelzip.fork("sweep", "failing.yaml", "-o", "failing", cwd=place).wait()
    assert done.code == 2
    assert "best for its size" in done.out
    assert any("run gptq-max-kl1e-09 failed" in line and "max_kl" in line for line in done.errors), done.err
    assert "Traceback" not in done.err


def test_a_dry_run_predicts_every_runs_size_and_writes_nothing(place, modelzip):
    before = sorted(place.iterdir())
    vary = ("--vary", "method=rtn,gptq", "--vary", "bits=3,4", "--vary", "symmetric=true,false")
    for recipe in (["sweep.yaml"], ["gptq-int4", "my-model"]):  # the options take the place of the recipe's values
        shown = modelzip.fork("sweep", *recipe, "-o", "dry", *vary, "--dry-run", cwd=place).wait()
        assert shown.code == 0, shown.err
        assert "8 runs, " in shown.out
        assert "rtn-3bit-no-symmetric" in shown.out
    told = modelzip.fork("sweep", "sweep.yaml", "-o", "dry", "--dry-run", "--json", cwd=place).wait()
    runs = json.loads(told.out)["runs"]
    assert {run["name"] for run in runs} == NAMES
    assert all(run["plans"][0]["bytes_after"] > 0 for run in runs)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gptq-int4", "my-model"], "gptq-int4: sweep: is missing"),
        (["sweep.yaml", "--keep", "some"], "--keep: some is not allowed; it must be all, front or none"),
        (["sweep.yaml", "--vary", "bits"], "--vary bits: must be KEY=VALUES"),
        (["sweep.yaml", "--no-evaluate"], "--evaluate: is false"),
        (["sweep.yaml", "--vary", "bits=2", "--vary", "grid=fp4"], "run rtn-2bit-fp4: "),
        (["gptq-int4", "my-model", "--vary", "bist=3"], "did you mean bits?"),
        (["nowhere.yaml"], "there is no such recipe file"),
    ],
)
def test_mistakes_are_sentences_with_exit_code_2(place, modelzip, arguments, told):
    done = modelzip.fork("sweep", *arguments, "-o", "wrong", cwd=place).wait()
    assert done.code == 2
    assert any(told in line for line in done.errors), done.err
    assert "Traceback" not in done.err
    assert not (place / "wrong").exists()


def test_other_commands_send_a_recipe_with_a_sweep_here_and_recipe_check_takes_it(place, modelzip):
    refused = modelzip.fork("run", "sweep.yaml", "-o", "wrong", cwd=place).wait()
    assert refused.code == 2
    assert "use `modelzip sweep`" in refused.err
    checked = modelzip.fork("recipe", "check", "sweep.yaml", cwd=place).wait()
    assert checked.code == 0, checked.err
