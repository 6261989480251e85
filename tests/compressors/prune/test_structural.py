"""Which units go: small cases worked out by hand, and what must hold for all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelzip.compressors.prune.structural import (
    choose,
    every_other,
    least_influential,
    magnitudes,
    normalised,
    removed,
    tokens_to_keep,
)


def kept(scores, **options):
    return [one.units.tolist() for one in choose([torch.tensor(score) for score in scores], **options)]


def test_the_least_important_heads_of_every_layer_go():
    assert kept([[3.0, 1, 4, 2], [1.0, 2, 3, 4]], share=0.5, scope="uniform") == [[0, 2], [2, 3]]


def test_of_a_whole_model_the_least_important_heads_go_wherever_they_are():
    assert kept([[3.0, 1, 4, 2], [8.0, 7, 6, 5]], share=0.25, scope="global") == [[0, 2], [0, 1, 2, 3]]


def test_no_layer_loses_all_its_heads():
    assert kept([[1.0, 2, 3, 4], [8.0, 7, 6, 5]], share=0.75, scope="global") == [[3], [0]]


def test_of_grouped_heads_each_group_loses_as_many():
    # pairs (0 1) (2 3): the two least important heads are both in the first group, but one goes from each
    (one,) = choose([torch.tensor([1.0, 2, 4, 3])], share=0.5, scope="uniform", group=2)
    assert (one.units.tolist(), one.pairs.tolist()) == ([1, 2], [0, 1])


def test_whole_groups_go_by_the_sum_of_their_heads():
    (one,) = choose([torch.tensor([0.0, 9, 4, 4])], share=0.5, scope="uniform", group=2, whole_groups=True)
    assert (one.units.tolist(), one.pairs.tolist()) == ([0, 1], [0])


def test_without_groups_a_head_takes_its_key_and_value_with_it():
    (one,) = choose([torch.tensor([0.0, 9, 4, 4])], share=0.25, scope="uniform")
    assert one.pairs.tolist() == one.units.tolist() == [1, 2, 3]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=8, max_size=8), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_groups_stay_of_one_size_and_the_target_is_met_but_for_a_bundle(scores, share, group, whole):
    tensors = [torch.tensor(score, dtype=torch.float64) for score in scores]
    result = choose(tensors, share=share, scope="global", group=group, whole_groups=whole)
    gone = 0
    for one in result:
        per_pair = torch.bincount(one.units // group, minlength=8 // group)
        sizes = set(per_pair[per_pair > 0].tolist())
        assert len(sizes) == 1
        assert one.pairs.tolist() == (per_pair > 0).nonzero()[:, 0].tolist()
        gone += 8 - len(one.units)
    bundle = group if whole or group == 1 else 8 // group
    most = len(scores) * (8 - bundle)
    assert min(round(share * 8 * len(scores)), most) - bundle < gone <= max(0, round(share * 8 * len(scores)))


@pytest.mark.parametrize(
    ("count", "share", "multiple", "gone"), [(12, 0.3, 1, 4), (12, 0.99, 1, 11), (48, 0.3, 16, 16)]
)
def test_the_nearest_number_to_the_share_goes(count, share, multiple, gone):
    assert removed(count, share, multiple=multiple) == gone


def test_scores_are_compared_over_their_layers_norm():
    first, second = normalised([torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])])
    assert first.tolist() == pytest.approx([0.6, 0.8])
    assert second.tolist() == [0, 0]


def test_magnitude_is_the_product_of_norms_and_blind_to_a_scale_that_the_function_is_blind_to():
    up, down = torch.randn(5, 3), torch.randn(5, 4)
    scale = torch.tensor([1.0, 2, 3, 4, 5])[:, None]
    before = magnitudes([up, down])
    assert before[2] == pytest.approx(float(up[2].norm() * down[2].norm()), rel=1e-6)
    torch.testing.assert_close(magnitudes([up * scale, down / scale]), before, rtol=1e-6, atol=0)


def test_layers_with_the_least_influence_go():
    assert least_influential([0.5, 0.1, 0.3, 0.1], 2) == [1, 3]


def test_every_other_layer_goes_but_not_the_first():
    assert every_other(6, 2) == [1, 3, 5]
    assert every_other(6, 3) == [2, 5]


def test_the_most_frequent_tokens_stay_and_those_that_must():
    counts = {5: 9, 6: 1, 7: 4, 8: 4}
    assert tokens_to_keep(counts, {0}, min_count=2, most=None) == [0, 5, 7, 8]
    assert tokens_to_keep(counts, {0}, min_count=1, most=3) == [0, 5, 7]
