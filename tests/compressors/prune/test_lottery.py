"""The pieces of iterative magnitude pruning against small cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from modelzip.compressors.prune.lottery import (
    masked,
    next_kept,
    random_kept,
    reinitialised,
    round_shares,
    shuffled,
    sparsity_of,
)


def _weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(20, 30, generator=generator), "b": 0.2 * torch.randn(10, 40, generator=generator)}


def test_the_smallest_of_all_matrices_together_go():
    trained = {"a": torch.tensor([[5.0, -0.1], [3.0, 0.4]]), "b": torch.tensor([[-0.2, 0.3, 9.0, -8.0, 7.0, 6.0]])}
    kept = next_kept(trained, share=0.3)  # 3 of 10
    assert kept["a"].tolist() == [[True, False], [True, True]]
    assert kept["b"].tolist() == [[False, False, True, True, True, True]]


def test_a_round_takes_a_share_of_what_is_left_and_a_pruned_weight_never_returns():
    weights, kept, counts = _weights(), None, []
    for seed in range(4):
        trained = _weights(seed + 1)  # whatever training made of them: a pruned one may have become large
        now = next_kept(trained, kept, share=0.2)
        if kept is not None:
            assert not any((now[name] & ~kept[name]).any() for name in now)
        kept = now
        counts.append(sum(int(mask.sum()) for mask in kept.values()))
    assert counts == [800, 640, 512, 410]  # of 1000
    assert sparsity_of(kept) == pytest.approx(0.59)
    assert set(kept) == set(weights)


def test_layers_become_unequally_sparse():
    kept = next_kept(_weights(), share=0.5)
    shares = [float(mask.float().mean()) for mask in kept.values()]
    assert shares[0] > 0.7  # measured: 0.75
    assert shares[1] < 0.2  # measured: 0.12


def test_locally_each_matrix_loses_the_same_share():
    kept = next_kept(_weights(), share=0.5, scope="local")
    assert [float(mask.float().mean()) for mask in kept.values()] == [0.5, 0.5]
    again = next_kept(_weights(1), kept, share=0.5, scope="local")
    assert [float(mask.float().mean()) for mask in again.values()] == [0.25, 0.25]


def test_among_equal_weights_exactly_as_many_go_as_should():
    trained = {"a": torch.ones(3, 3), "b": torch.ones(1)}
    kept = next_kept(trained, share=0.4)
    assert sparsity_of(kept) == pytest.approx(0.4)
    assert kept["a"].flatten().tolist() == [False] * 4 + [True] * 5
    assert next_kept(trained, share=0.0)["a"].all()


def test_rounds_multiply_to_the_sparsity():
    assert round_shares(0.2) == pytest.approx((0.2,))
    assert round_shares(0.36) == pytest.approx((0.2, 0.2))
    shares = round_shares(0.6)
    assert shares[:4] == (0.2,) * 4  # 1 - 0.8⁴ = 0.5904
    assert shares[4] == pytest.approx(1 - 0.4 / 0.4096)
    assert len(shares) == 5
    assert round_shares(0.1) == pytest.approx((0.1,))


def test_rewinding_gives_the_initial_weights_under_the_mask():
    initial, trained = _weights(), _weights(1)
    kept = next_kept(trained, share=0.6)
    ticket = masked(initial, kept)
    for name, mask in kept.items():
        assert torch.equal(ticket[name][mask], initial[name][mask])
        assert not ticket[name][~mask].any()


def test_the_mask_is_of_the_trained_weights_not_of_the_initial_ones():
    initial, trained = _weights(), _weights(1)
    assert not torch.equal(next_kept(trained, share=0.5)["a"], next_kept(initial, share=0.5)["a"])


def test_a_random_mask_keeps_as_many_in_each_layer():
    kept = next_kept(_weights(), share=0.6)
    control = random_kept(kept, torch.Generator().manual_seed(0))
    for name, mask in kept.items():
        assert int(control[name].sum()) == int(mask.sum())
        assert not torch.equal(control[name], mask)
    again = random_kept(kept, torch.Generator().manual_seed(0))
    assert all(torch.equal(control[name], again[name]) for name in kept)


def test_shuffled_weights_are_the_same_values_elsewhere_under_the_same_mask():
    initial = _weights()
    everything = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in initial.items()}
    control = shuffled(initial, everything, torch.Generator().manual_seed(0))
    for name, weight in initial.items():
        assert torch.equal(control[name].flatten().sort().values, weight.flatten().sort().values)
        assert not torch.equal(control[name], weight)
    kept = next_kept(initial, share=0.6)
    control = shuffled(initial, kept, torch.Generator().manual_seed(0))
    assert all(torch.equal(control[name] != 0, mask) for name, mask in kept.items())


def test_new_weights_have_the_old_ones_scale_under_the_same_mask():
    initial = {"a": 0.04 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) + 0.01}
    kept = next_kept(initial, share=0.5)
    control = reinitialised(initial, kept, torch.Generator().manual_seed(1))
    assert torch.equal(control["a"] != 0, kept["a"])
    assert float(control["a"][kept["a"]].std()) == pytest.approx(0.04, rel=0.02)  # measured: 0.0400
    assert not torch.equal(control["a"], masked(initial, kept)["a"])
