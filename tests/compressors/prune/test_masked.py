"""Training under a mask: what is masked neither counts nor moves."""

from __future__ import annotations

import torch

from modelzip.compressors.prune.masked import MaskedLinear


def test_masked_weights_neither_count_nor_move_and_are_not_stored():
    generator = torch.Generator().manual_seed(0)
    weight, kept = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) > 0.5
    linear, x = MaskedLinear(weight, torch.ones(4), kept=kept), torch.randn(5, 6, generator=generator)
    assert torch.allclose(linear(x), x @ (weight * kept).T + 1, atol=1e-6)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.1)
    linear(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(linear.weight[~kept], weight[~kept])
    assert not torch.equal(linear.weight[kept], weight[kept])
    assert torch.equal(linear.freeze().dense(), linear.weight.detach() * kept)


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
