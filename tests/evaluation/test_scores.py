"""F1, Matthews' coefficient and correlations against sums by hand and published values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from modelzip.evaluation.scores import class_scores, confusion, f1, matthews, number_scores

LABELS = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
SAID = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])  # three of four found, two false alarms


def logits_of(classes: torch.Tensor, count: int = 2) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes, count).float()


def test_two_classes_are_scored_by_precision_and_recall_of_the_second() -> None:
    found = class_scores(None, logits_of(SAID), LABELS)
    precision, recall = 3 / 5, 3 / 4
    assert found["f1"]["compressed"] == pytest.approx(2 * precision * recall / (precision + recall))
    product = math.sqrt((3 + 2) * (3 + 1) * (4 + 2) * (4 + 1))
    assert found["matthews"]["compressed"] == pytest.approx((3 * 4 - 2 * 1) / product)
    assert found["f1"]["original"] is None


def test_several_classes_are_scored_by_the_mean_f1_and_the_correlation_of_indicators() -> None:
    labels, said = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 1, 2, 0, 2])
    counts = confusion(logits_of(said, 4), labels)
    each = [2 * 1 / (2 + 2), 2 * 2 / (2 + 3), 2 * 2 / (3 + 2)]  # class 3 neither occurs nor is said
    assert f1(counts) == pytest.approx(sum(each) / 3)
    x, y = (torch.nn.functional.one_hot(one, 4).double() for one in (labels, said))
    x, y = x - x.mean(0), y - y.mean(0)
    wanted = float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())
    assert matthews(counts) == pytest.approx(wanted)


def test_a_model_that_says_one_class_alone_has_no_correlation() -> None:
    assert matthews(confusion(logits_of(torch.zeros(10, dtype=torch.int64)), LABELS)) == 0


def test_logits_with_a_nan_are_wrong_whatever_the_label() -> None:
    logits = logits_of(LABELS)
    logits[0, 0] = logits[9, 1] = math.nan
    counts = confusion(logits, LABELS)
    assert counts.tolist() == [[5, 0, 1], [0, 3, 1]]
    assert f1(counts) == pytest.approx(2 * 3 / (3 + 4))


def test_the_interval_is_that_of_all_resamples_of_a_small_set() -> None:
    """Of six examples there are 6⁶ resamples, which can be counted out."""
    labels, said = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 1, 0, 0])
    pairs = np.stack([labels.numpy(), said.numpy()])
    every = []
    for drawn in itertools.product(range(6), repeat=6):
        truth, answer = pairs[:, list(drawn)]
        right, both = int((truth & answer).sum()), int(truth.sum() + answer.sum())
        every.append(2 * right / both if both else 0.0)
    found = class_scores(None, logits_of(said), labels)["f1"]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(every, (0.025, 0.975)), abs=0.02)


def test_correlations_are_those_of_numpy_and_of_ranks_with_ties() -> None:
    labels = torch.tensor([1.0, 2.0, 2.0, 3.0, 5.0, 4.0])
    said = torch.tensor([0.1, 0.4, 0.2, 0.9, 30.0, 0.8])
    found = number_scores(labels, said, labels)
    assert found["pearson"]["compressed"] == pytest.approx(np.corrcoef(labels, said)[0, 1])
    ranks = np.corrcoef([1, 2.5, 2.5, 4, 6, 5], [1, 3, 2, 5, 6, 4])[0, 1]
    assert found["spearman"]["compressed"] == pytest.approx(ranks)
    assert (found["pearson"]["original"], found["pearson"]["original_low"]) == (pytest.approx(1), pytest.approx(1))


def test_the_interval_of_a_correlation_is_the_published_one() -> None:
    """Fisher's interval for r = 0.5 of 28 pairs: tanh(0.5493 ± 1.96 / 5)."""
    generator = torch.Generator().manual_seed(0)
    x, e = (torch.randn(28, generator=generator, dtype=torch.float64) for _ in range(2))
    x = (x - x.mean()) / x.std()
    e = e - e.mean() - x * (x @ e) / (x @ x)
    y = 0.5 * x + math.sqrt(0.75) * e / e.std()
    found = number_scores(None, y, x)["pearson"]
    assert found["compressed"] == pytest.approx(0.5)
    assert (found["low"], found["high"]) == pytest.approx((0.156, 0.736), abs=1e-3)


def test_numbers_that_are_no_numbers_have_no_correlation() -> None:
    found = number_scores(None, torch.tensor([math.nan, 1.0, 2.0, 3.0]), torch.arange(4.0))
    assert math.isnan(found["pearson"]["compressed"])
    assert found["pearson"]["low"] is None
