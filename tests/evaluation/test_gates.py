from __future__ import annotations

import math

import pytest

from modelzip.checkpoints.errors import GateError, ProblemsError, RecipeError
from modelzip.evaluation.gates import check_gates, metrics, parse_gate, parse_gates, require_measured

VALUES = {"kl": 0.2, "perplexity": 30.0, "original.perplexity": 25.0, "bytes": 117e6, "top1_agreement": 0.75}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("kl > 0.3", False),
        ("kl>0.1", True),
        ("kl >= 0.2", True),
        ("kl > 0.2", False),
        ("kl < 2e-1", False),
        ("kl <= .2", True),
        ("kl == 0.2", True),
        ("kl != 0.2", False),
        ("kl > -1", True),
        ("perplexity > 1.1 * original.perplexity", True),
        ("perplexity > 1.3*original.perplexity", False),
        ("perplexity > original.perplexity", True),
        ("bytes > 60MB", True),
        ("bytes > 112 MiB", False),
        ("bytes > 0.2GB", False),
        ("top1_agreement < 70%", False),
        (" top1_agreement < 0.8 ", True),
    ],
)
def test_a_condition_holds_as_arithmetic_says(text: str, holds: bool) -> None:
    assert parse_gate(text).holds(VALUES) is holds


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("kll > 0.3", "did you mean kl"),
        ("perplexiti > 3", "did you mean perplexity"),
        ("kl > 2 * original.perplexiti", "did you mean original.perplexity"),
        ("zzz > 3", "known are kl, kl_p95"),
        ("kl > 3MB", "write a plain number"),
        ("bytes > 3MBs", "write one of B, kB, MB"),
        ("kl > 2 * perplexity", "only a metric of the original"),
        ("kl > 1e999", "too large"),
        ("kl 0.3", "can't be read"),
        ("kl > 0.3 or True", "can't be read"),
        ("kl > nan", "unknown metric nan"),
        ("__import__('os') > 1", "can't be read"),
        ("", "can't be read"),
    ],
)
def test_a_wrong_condition_is_refused_with_one_sentence_that_says_what_to_write(text: str, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_gate(text)
    assert word in str(caught.value)
    assert f'"{text}"' in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["kl > 0.3", "kl < 0.3", "kl == 0.3", "perplexity < 2 * original.perplexity"])
def test_nan_fails_every_condition_on_it(text: str) -> None:
    assert parse_gate(text).holds({"kl": math.nan, "perplexity": 1.0, "original.perplexity": math.nan})


def test_a_metric_that_was_not_measured_is_an_error_and_not_a_pass() -> None:
    for text in ("kl > 0.3", "perplexity > 1.1 * original.perplexity"):
        with pytest.raises(RecipeError, match="which this run did not measure"):
            check_gates(parse_gates([text]), {"bytes": 1.0, "perplexity": 3.0})


def test_a_quality_condition_without_evaluation_is_refused_before_any_work() -> None:
    gates = parse_gates(["bytes > 60MB", "kl > 0.3"])
    require_measured(gates, evaluation=True)
    require_measured(gates[:1], evaluation=False)
    with pytest.raises(RecipeError, match=r'"kl > 0\.3" needs kl, but evaluation is switched off'):
        require_measured(gates, evaluation=False)


def test_a_condition_on_the_original_without_one_is_refused_before_any_work() -> None:
    gates = parse_gates(["perplexity > 30", "kl > 0.3", "bytes > 0.5 * original.bytes"])
    require_measured(gates[:1], evaluation=True, original=False)
    with pytest.raises(ProblemsError) as caught:
        require_measured(gates, evaluation=True, original=False)
    assert [sentence.split(" needs ")[1].split(",")[0] for sentence in caught.value.sentences] == [
        "kl",
        "original.bytes",
    ]


def test_all_wrong_conditions_are_reported_at_once() -> None:
    with pytest.raises(ProblemsError) as caught:
        parse_gates(["kll > 1", "kl > 1", "bytes > 1s"])
    assert len(caught.value.sentences) == 2


def test_all_failed_conditions_are_named_with_the_values_found() -> None:
    gates = parse_gates(["kl > 0.1", "bytes > 200MB", "perplexity > 1.1 * original.perplexity"])
    with pytest.raises(GateError) as caught:
        check_gates(gates, VALUES)
    message = str(caught.value)
    assert '"kl > 0.1": kl is 0.2, the limit is 0.1' in message
    assert "perplexity is 30, the limit is 27.5" in message
    assert "bytes" not in message
    assert caught.value.exit_code == 3


def test_conditions_that_do_not_hold_pass() -> None:
    check_gates(parse_gates(["kl > 0.3", "bytes > 200MB"]), VALUES)


def test_metrics_are_read_from_the_report_and_what_is_null_is_left_out() -> None:
    report = {
        "evaluation": {"kl": "NaN", "perplexity": {"original": None, "compressed": 30.5}, "top1_agreement": 0.5},
        "size": {"bytes_after": 100, "bytes_before": 300, "ratio": 3.0, "bits_per_weight": 4.5},
        "verification": None,
        "fallbacks": ["one", "two"],
    }
    values = metrics(report)
    assert math.isnan(values.pop("kl"))
    assert values == {
        "perplexity": 30.5,
        "top1_agreement": 0.5,
        "bytes": 100.0,
        "original.bytes": 300.0,
        "ratio": 3.0,
        "bits_per_weight": 4.5,
        "fallbacks": 2.0,
    }
