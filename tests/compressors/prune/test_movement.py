"""Movement pruning: scores after a step of SGD are the paper's sum, and differ from magnitude where they should."""

from __future__ import annotations

import pytest
import torch

from modelzip.compressors.prune.movement import MovementLinear, soft_penalty, top_kept

W = torch.tensor([[2.0, -1.0], [0.5, 3.0]])


def test_scores_after_a_step_of_sgd_are_the_papers_equation():
    """L = Σ y with y = W x, x = (1, -2): ∂L/∂W = (1, -2) in each row, so S = -lr ∂L/∂W ⊙ W."""
    linear = MovementLinear(W)
    torch.optim.SGD([linear.scores], lr=0.1).zero_grad()
    linear(torch.tensor([[1.0, -2.0]])).sum().backward()
    torch.optim.SGD([linear.scores], lr=0.1).step()
    assert torch.allclose(linear.scores, -0.1 * torch.tensor([[1.0 * 2, -2 * -1.0], [1 * 0.5, -2 * 3.0]]))


def test_scores_add_up_over_steps_with_the_weights_of_each():
    linear, wanted, lr = MovementLinear(W), torch.zeros(2, 2), 0.1
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(3, 2, generator=generator)
        optimizer.zero_grad()
        loss = linear(x).square().sum()
        loss.backward()
        gradient = 2 * (x @ linear.weight.T).T @ x  # ∂L/∂W of Σ (W x)²
        wanted = wanted - lr * (gradient * linear.weight).detach()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = lr = lr / 10
    assert torch.allclose(linear.scores, wanted, rtol=1e-5)


def test_a_pruned_weight_keeps_still_but_its_score_still_moves():
    linear = MovementLinear(W)
    with torch.no_grad():
        linear.scores.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    linear.sparsity = 0.25
    x = torch.tensor([[1.0, -2.0]])
    assert torch.equal(linear(x), torch.tensor([[2.0, 0.5 - 6.0]]))  # without the pruned -1
    linear(x).sum().backward()
    assert torch.equal(linear.weight.grad, torch.tensor([[1.0, 0.0], [1.0, -2.0]]))
    assert torch.equal(linear.scores.grad, torch.tensor([[2.0, 2.0], [0.5, -6.0]]))


def test_movement_prunes_a_large_weight_that_shrinks_where_magnitude_prunes_a_small_one_that_grows():
    """The target is 0 for the large weight and 1 for the small one."""
    start, target = torch.tensor([[1.5, 0.2]]), torch.tensor([[0.0, 1.0]])
    linear, x = MovementLinear(start), torch.eye(2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (linear(x) - target.T).square().sum().backward()
        optimizer.step()
    linear.sparsity = 0.5
    assert bool(linear.weight[0, 0].detach() > linear.weight[0, 1].detach())  # by magnitude the first would stay
    assert linear.kept().tolist() == [[False, True]]
    assert torch.equal(linear.freeze().dense(), linear.weight.detach() * torch.tensor([[0.0, 1.0]]))
    assert linear.freeze().kept.tolist() == [[False, True]]


def test_exactly_the_share_that_is_asked_for_is_pruned_even_among_equals():
    scores = torch.zeros(7, 9)
    for sparsity in (0.0, 0.1, 0.5, 0.97, 1.0):
        assert int((~top_kept(scores, sparsity)).sum()) == round(63 * sparsity)


def test_the_soft_variant_keeps_all_at_first_and_prunes_below_the_threshold():
    linear = MovementLinear(W, masking="threshold", threshold=0.2)
    assert linear.kept().all()
    assert float(soft_penalty(torch.tensor([[0.0, 100.0]]))) == pytest.approx(0.75)
    optimizer = torch.optim.SGD([linear.scores], lr=10.0)
    for _ in range(10):
        optimizer.zero_grad()
        soft_penalty(linear.scores).backward()
        optimizer.step()
    assert not linear.kept().any()
    assert not linear(torch.ones(1, 2)).any()
