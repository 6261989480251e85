"""Masks against sorting written out, with ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.compressors.masks import largest_of_groups, pattern_of, without_smallest, without_smallest_of_all


def by_sorting(scores: list[float], kept: list[bool], lost: int) -> list[bool]:
    """Lost entries first, then by score, of equal ones the last: so many go."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i] if kept[i] else -1, -i))
    gone = set(order[:lost])
    return [kept[i] and i not in gone for i in range(len(scores))]


def few_values(*shape: int, seed: int) -> Tensor:
    """Scores with many ties and zeros."""
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_of_each_row_go_and_of_equal_ones_the_later(seed):
    scores, kept = few_values(5, 12, seed=seed), few_values(5, 12, seed=100 + seed) > 0
    for lost in (0, 1, 5, 12):
        found = without_smallest(scores, lost, kept)
        truth = [by_sorting(*row, lost) for row in zip(scores.tolist(), kept.tolist(), strict=True)]
        assert found.tolist() == truth


def test_without_an_earlier_mask_exactly_so_many_go():
    scores = few_values(7, 40, seed=0)
    for lost in (0, 1, 13, 40):
        assert ((~without_smallest(scores, lost)).sum(1) == lost).all()
        assert int((~without_smallest_of_all(scores, 7 * lost)).sum()) == 7 * lost


def test_rows_that_have_lost_more_lose_nothing_else():
    scores, kept = torch.rand(2, 10), torch.ones(2, 10, dtype=torch.bool)
    kept[0, :6] = False
    found = without_smallest(scores, 5, kept)
    assert torch.equal(found[0], kept[0])
    assert int(found[1].sum()) == 5


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4)])
def test_of_each_group_the_largest_stay(pattern):
    most, wide = pattern
    scores = few_values(6, 48, seed=3)
    found = largest_of_groups(scores, pattern)
    truth = [by_sorting(group, [True] * wide, wide - most) for group in scores.reshape(-1, wide).tolist()]
    assert found.reshape(-1, wide).tolist() == truth


def test_a_pattern_is_recognized_by_groups_that_are_neither_fuller_nor_emptier():
    two, four = torch.tensor([1, 0, 0, 1] * 4).bool()[None], torch.tensor([1, 1, 1, 0, 1, 0, 0, 0] * 2).bool()[None]
    assert pattern_of(two) == (2, 4)
    assert pattern_of(four) == (4, 8)
    two[0, 0] = False
    assert pattern_of(two) is None
    assert pattern_of(torch.ones(3, 6, dtype=torch.bool)) is None
