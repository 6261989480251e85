"""Training under a mask: what is masked neither counts nor gets a gradient."""

from __future__ import annotations

import torch

from modelzip.compressors.prune.masked import MaskedLinear


def test_masked_weights_neither_count_nor_get_a_gradient_and_are_not_stored():
    """Masked after some steps, so that the optimizer's momentum goes on moving them: which changes no output."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(4, 6, generator=generator) > 0.5
    linear = MaskedLinear(torch.randn(4, 6, generator=generator), torch.ones(4))
    x = torch.randn(5, 6, generator=generator)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        linear(x).square().sum().backward()
        optimizer.step()

    step()
    linear.kept.copy_(kept)
    before = linear.weight.detach().clone()
    step()
    assert not linear.weight.grad[~kept].any()
    assert linear.weight.grad[kept].all()
    assert not torch.equal(linear.weight[~kept], before[~kept])
    left = linear.weight.detach() * kept
    assert torch.allclose(linear(x), x @ left.T + linear.bias, atol=1e-6)
    assert torch.equal(linear.freeze().dense(), left)


def test_a_mask_that_changes_lets_a_weight_back_where_it_was():
    weight = torch.tensor([[1.0, 2.0]])
    linear = MaskedLinear(weight, kept=torch.tensor([[True, False]]))
    linear.kept.fill_(True)
    assert linear(torch.tensor([[1.0, 10.0]])).tolist() == [[21.0]]
    assert "kept" in linear.state_dict()


def test_values_are_stored_in_the_type_that_is_asked_for():
    frozen = MaskedLinear(torch.ones(2, 4), kept=torch.eye(2, 4).bool(), dtype=torch.bfloat16).freeze()
    assert frozen.dtype == torch.bfloat16
    assert frozen.dense().tolist() == torch.eye(2, 4).tolist()
