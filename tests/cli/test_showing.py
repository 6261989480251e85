"""What is printed: plan, report, recipes and methods."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from modelzip.cli.main import answer
from modelzip.evaluation.gates import METRICS


def test_the_end_shows_the_figures_the_fallbacks_and_the_output(pipeline, capsys):
    assert answer(["quantize", "m"]) == 0
    told = capsys.readouterr().out
    for figure in ("269.0", "92.0", "4.50", "25.62", "30.10", "0.1550", "78.0%", "damping 0.1", "output: m-gptq-4bit"):
        assert figure in told


@pytest.mark.parametrize("report", [{}, {"evaluation": None, "size": {}}, {"evaluation": {"kl": 0.1}}])
def test_a_report_with_parts_missing_is_shown_all_the_same(pipeline, capsys, report):
    pipeline.report = report
    assert answer(["quantize", "m"]) == 0
    assert "output: m-gptq-4bit" in capsys.readouterr().out


def test_json_prints_the_report_alone_on_stdout(pipeline, capsys):
    assert answer(["quantize", "m", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {**pipeline.report, "output": "m-gptq-4bit"}
    assert "quantize 1/30" in captured.err


def test_a_dry_run_shows_the_plan_and_runs_nothing(pipeline, capsys):
    assert answer(["quantize", "m", "--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in (
        "model.layers.0.mlp.up_proj",
        "group 64 instead of 128",
        "1.77",
        "0.47",
        "500.0 MB",
        "lm_head is left",
    ):
        assert part in told
    assert "resume" not in pipeline.asked


def test_a_dry_run_prints_the_plan_as_json(pipeline, capsys):
    assert answer(["quantize", "m", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "plans": [{"source": "model", "modules": ["model.layers.0.mlp.up_proj"]}]
    }


def test_a_revision_is_that_of_the_original(pipeline, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    (tmp_path / "big").mkdir()
    assert answer(["evaluate", "small", "--against", "owner/big", "--revision", "main", "--data", "d.txt"]) == 0
    assert pipeline.asked["against"] == "owner/big"
    assert answer(["evaluate", "owner/small", "--revision", "main", "--data", "d.txt"]) == 0
    for line in ("small --against big", "small"):
        capsys.readouterr()
        assert answer(["evaluate", *line.split(), "--revision", "main", "--data", "d.txt"]) == 2
        assert f"but {line.split()[-1]} is local; leave the revision out" in capsys.readouterr().err


def test_evaluate_compares_with_the_original_and_prints_the_whole_report(pipeline, capsys):
    assert answer(["evaluate", "small", "--against", "big", "--data", "d.txt", "--windows", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pipeline.report
    assert (pipeline.asked["model"], pipeline.asked["against"]) == ("small", "big")
    assert (pipeline.asked["evaluation"].data, pipeline.asked["evaluation"].windows) == ("d.txt", 3)
    assert answer(["evaluate", "small", "--against", "big", "--data", "d.txt", "--fail-if", "kl > 0.1"]) == 3
    assert answer(["evaluate", "small", "--against", "big", "--data", "d.txt", "--fail-if", "bytes > 90MB"]) == 3
    capsys.readouterr()
    assert answer(["evaluate", "small", "--data", "d.txt"]) == 0
    shown = capsys.readouterr().out
    assert "size, MB" in shown
    assert "0.1550" in shown


def test_recipe_show_writes_out_every_default_and_check_approves(pipeline, tmp_path, capsys):
    (tmp_path / "modelzip.yaml").write_text("stages: [{quantize: {bits: 3}}]\n")
    assert answer(["recipe", "check"]) == 0
    assert capsys.readouterr().out == "modelzip.yaml is a valid recipe: quantize (gptq-3bit)\n"
    assert answer(["recipe", "show"]) == 0
    shown = capsys.readouterr().out
    assert "bits: 3" in shown
    assert "block_size: 128" in shown
    (tmp_path / "again.yaml").write_text(shown)
    assert answer(["recipe", "check", "again.yaml"]) == 0


def test_recipe_schema_prints_a_json_schema(pipeline, capsys):
    assert answer(["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["seed"]["type"] == "integer"


def test_methods_lists_all_and_shows_one_with_ranges_defaults_and_a_sample(pipeline, capsys):
    assert answer(["methods"]) == 0
    listed = capsys.readouterr().out
    assert "rtn" in listed
    assert "Frantar et al. 2022" in listed
    assert answer(["methods", "gptq"]) == 0
    told = capsys.readouterr().out
    for part in ("2 to 8", "activation or none", "0.01", "- quantize:", "Frantar et al. 2022"):
        assert part in told


def test_the_version_is_the_packages(capsys):
    assert answer(["--version"]) == 0
    assert capsys.readouterr().out.startswith("modelzip 0.")


def test_colours_appear_only_on_a_terminal_and_never_with_no_color(monkeypatch, pipeline, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    answer(["methods"])
    coloured = capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    answer(["methods"])
    plain = capsys.readouterr().out
    assert "\x1b[" in coloured
    assert "\x1b[3" not in plain


def test_the_metrics_that_the_table_shows_are_those_of_the_gates():
    assert METRICS["perplexity"].path == ("evaluation", "perplexity", "compressed")
    assert METRICS["kl"].path == ("evaluation", "kl")


def test_what_is_larger_or_slower_is_called_so(pipeline, capsys):
    timed = {"batch_size": 1, "original_ms": 1.0, "compressed_ms": 2.0, "speedup": 0.5}
    row = {"threshold": 0.1, "accuracy": 0.9, "low": 0.8, "high": 0.95, "layers": 1.5}
    times = {"single": timed, "batched": timed, "text": None, "throughput": []}
    pipeline.report = {"evaluation": {"latency": times, "exits": [{**row, "latency": times}]}}
    assert answer(["quantize", "m"]) == 0
    told = capsys.readouterr().out
    assert told.count("2.00 (2.00 times slower)") == 2  # of the exits
    assert told.count("2.00 ms (2.00 × slower)") == 2
    pipeline.plan = replace(pipeline.plan, bytes_before=46_000_000)
    assert answer(["quantize", "m", "--dry-run"]) == 0
    assert "46.0 MB → 92.0 MB, 2.00 times larger" in capsys.readouterr().out
