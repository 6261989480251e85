"""What goes wrong becomes a sentence on stderr and an exit code."""

from __future__ import annotations

import errno

import pytest

from modelzip.checkpoints.errors import CalibrationError, GateError
from modelzip.cli.main import answer


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("quantize m --bits 9", "error: --bits: 9 is not allowed; it must be 2 to 8, or 1 on the grid binary"),
        ("quantize m --bits four", "error: --bits: four is not allowed; it must be 2 to 8, or 1 on the grid binary"),
        (
            "quantize m --method rtn --order none",
            "error: --order: is not a setting of rtn; gptq, spqr, gptvq, aqlm or quik has it",
        ),
        ("quantize m --method gtpq", "error: --method: gtpq is not a quantize method; did you mean gptq?"),
        ("quantize m --set bitz=3", "error: --set bitz: is not a setting of gptq; did you mean bits?"),
        ("quantize m --set calibration.sampels=3", "error: --set calibration.sampels: is not a known key"),
        ("quantize m --set trust_remote_code=true", "error: --set trust_remote_code: is not a recipe key"),
        ("quantize m --set bits", "error: --set bits: must be KEY=VALUE"),
        ("quantize m --bitz 4", "error: No such option: --bitz"),
        ("quantise m", "error: No such command 'quantise'. Did you mean 'quantize'?"),
        ("quantize m --fail-if kll>3", "kll"),
        ("quantize m --no-evaluate --fail-if kl>3", "evaluation is switched off"),
        ("quantize --recipe nope.yaml", "error: nope.yaml: there is no such recipe file"),
        ("methods gtpq", "error: gtpq: is not a method; did you mean gptq?"),
        ("evaluate m", "error: Missing option '--data'"),
        ("evaluate m --data d --windows 0", "error: --windows: 0 is not allowed"),
        ("evaluate m --data d --fail-if kl>1", "kl"),
        ("inspect m --measure --device gpu", "error: --device: gpu is not allowed"),
        ("inspect m --device cpu", "error: --device says where components are measured: give --measure as well"),
        ("inspect m --seq-len 0", "error: --seq-len: 0 is no whole number above 0"),
        ("compare m n --batch-size two", "error: --batch-size: two is no whole number above 0"),
        ("compare m", "error: Missing argument 'OTHER'"),
        ("recipe check", "error: there is no modelzip.yaml in this folder"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(pipeline, capsys, line, told):
    assert answer(line.split()) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert pipeline.asked == {}


def test_an_unknown_option_names_the_nearest(pipeline, capsys):
    answer(["quantize", "m", "--bitz", "4"])
    assert "--bits" in capsys.readouterr().err


def test_problems_of_options_recipe_and_conditions_come_together(pipeline, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("stages: [{quantize: {clip: mze}}]\n")
    assert answer(["quantize", "--recipe", "r.yaml", "--bits", "9", "--fail-if", "kll > 1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("error: --bits: 9 ") or lines[1].startswith("error: --bits: 9 ")
    assert any(line.startswith("error: r.yaml: stages[0].quantize.clip: mze") for line in lines)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (CalibrationError("The file x.txt is empty."), 2, "error: The file x.txt is empty."),
        (GateError("kl is 0.4"), 3, "error: kl is 0.4"),
        (MemoryError(), 4, "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "memory ran out"),
        (OSError(errno.ENOSPC, "No space left", "out/x"), 4, "error: out/x: the disk is full"),
        (OSError(errno.EIO, "I/O error", "out/x"), 4, "error: out/x: the disk failed"),
        (
            OSError(errno.EFBIG, "File too large", "out/x"),
            4,
            "larger than files may be here; raise `ulimit -f`; the same",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command with --resume goes on"),
    ],
)
def test_every_kind_of_failure_has_its_exit_code_and_sentence(pipeline, capsys, error, code, told):
    pipeline.error = error
    assert answer(["quantize", "m"]) == code
    captured = capsys.readouterr()
    assert told in captured.err
    assert "Traceback" not in captured.err


def test_nothing_is_resumed_where_nothing_was_begun(pipeline, capsys):
    pipeline.error = OSError(errno.ENOSPC, "No space left", "out/x")
    assert answer(["quantize", "m", "--dry-run"]) == 4
    assert "--resume" not in capsys.readouterr().err


def test_debug_shows_the_traceback_beside_the_sentence(pipeline, capsys):
    pipeline.error = CalibrationError("The file x.txt is empty.")
    assert answer(["quantize", "m", "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.endswith("error: The file x.txt is empty.\n")


def test_a_mistake_of_ours_keeps_its_traceback(pipeline):
    pipeline.error = KeyError("ours")
    with pytest.raises(KeyError):
        answer(["quantize", "m"])


def test_a_gate_that_fails_exits_3_after_the_report_is_shown(pipeline, capsys):
    assert answer(["quantize", "m", "--fail-if", "kl > 0.1"]) == 3
    captured = capsys.readouterr()
    assert "0.1550" in captured.out
    assert "kl" in captured.err
