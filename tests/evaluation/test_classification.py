"""Accuracies and their intervals against published numbers and sums by hand."""

import math
from collections.abc import Iterator

import pytest
import torch

from modelzip.evaluation.classification import accuracy, classified, wilson
from modelzip.evaluation.latency import interleaved


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_that_of_the_published_examples(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)


def test_the_ends_of_the_interval_are_where_the_score_test_just_rejects() -> None:
    for right, count in ((3, 10), (45, 50), (800, 872)):
        for end in wilson(right, count):
            assert abs(right / count - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-9)


def test_a_share_of_all_or_nothing_has_an_interval_within_0_and_1_that_is_no_point() -> None:
    assert wilson(0, 5)[0] == 0 < wilson(0, 5)[1] < 1
    assert 0 < wilson(5, 5)[0] < wilson(5, 5)[1] == 1
    with pytest.raises(ValueError, match="no share"):
        wilson(0, 0)


def test_accuracy_counts_what_is_right_and_what_was_lost_and_won() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    original = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 0.0]])  # right, right, wrong, right
    compressed = torch.tensor([[0.0, 1.0], [0.0, 9.0], [0.0, 1.0], [0.0, 1.0]])  # wrong, right, right, wrong
    found = accuracy(original, compressed, labels)
    assert (found["original"], found["compressed"], found["lost"], found["won"]) == (0.75, 0.5, 2, 1)
    assert (found["low"], found["high"]) == wilson(2, 4)
    assert (found["original_low"], found["original_high"]) == wilson(3, 4)


def test_an_example_whose_logits_are_nan_is_wrong() -> None:
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    assert accuracy(None, logits, torch.tensor([0, 0]))["compressed"] == 0.5


def test_the_divergence_and_the_agreement_are_the_sums_by_hand() -> None:
    p, q = (0.9, 0.1), (0.4, 0.6)
    found = classified(torch.tensor([p]).log(), torch.tensor([q]).log() + 5, torch.tensor([0]))
    assert found["kl"] == pytest.approx(0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.6), rel=1e-6)
    assert found["top1_agreement"] == 0
    same = classified(torch.tensor([p, q]).log(), torch.tensor([p, q]).log(), torch.tensor([0, 0]))
    assert (same["kl"], same["top1_agreement"]) == (0, 1)


def test_two_workloads_run_in_turns_and_a_slow_machine_in_one_turn_does_not_change_the_ratio() -> None:
    now, ran = 0.0, []

    def work(name: str, seconds: float) -> Iterator[None]:
        nonlocal now
        ran.append(name)
        slow = 100 if len(ran) in (3, 4) else 1
        for share in (0.25, 0.75):
            now += share * seconds * slow
            yield

    pair = interleaved(lambda: work("a", 6), lambda: work("b", 2), repetitions=3, clock=lambda: now)
    assert "".join(ran) == "ba" + "ab" + "ba" + "ab"
    assert pair.first == ((150, 450), (1.5, 4.5), (1.5, 4.5))
    assert pair.ratio == 3
