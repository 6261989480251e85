"""The cubic schedule against the paper's equation, worked out by hand."""

from __future__ import annotations

import pytest

from modelzip.compressors.prune.schedule import cubic_sparsity


@pytest.mark.parametrize(
    ("step", "wanted"),
    [(0, 0.0), (99, 0.0), (100, 0.0), (350, 0.9 * 37 / 64), (600, 0.9 * 7 / 8), (850, 0.9 * 63 / 64), (1100, 0.9)],
)
def test_sparsity_follows_the_equation(step, wanted):
    """90 % from step 100 to step 1100: after a quarter 1 - (3/4)³ of it, after half 7/8, after three quarters 63/64."""
    assert cubic_sparsity(step, final=0.9, begin=100, end=1100) == pytest.approx(wanted)


def test_it_starts_from_an_initial_sparsity():
    assert cubic_sparsity(5, initial=0.4, final=0.8, begin=0, end=10) == pytest.approx(0.8 - 0.4 / 8)
    assert cubic_sparsity(-1, initial=0.4, final=0.8, begin=0, end=10) == 0.4


def test_it_changes_only_every_so_many_steps_and_ends_exactly():
    values = [cubic_sparsity(step, final=0.5, begin=0, end=100, every=30) for step in range(120)]
    assert len(set(values[:30])) == len(set(values[30:60])) == len(set(values[90:100])) == 1
    assert values[30] == pytest.approx(0.5 - 0.5 * 0.7**3)
    assert values[99] < 0.5
    assert set(values[100:]) == {0.5}
    assert values == sorted(values)


def test_a_schedule_without_steps_is_final_at_once():
    assert cubic_sparsity(3, final=0.5, begin=3, end=3) == 0.5
    with pytest.raises(ValueError, match="step 4 to step 3"):
        cubic_sparsity(3, final=0.5, begin=4, end=3)
