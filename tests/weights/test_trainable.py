"""Compressed weights with gradients: they learn, and come back as the kind that they were."""

from __future__ import annotations

import pytest
import torch

from modelzip.weights.embedding import CompressedEmbedding
from modelzip.weights.trainable import holds_codes, trainable, unfreeze

TRAINABLE = {"dense", "kronecker", "kronecker, other order", "low rank", "tensor train"} | {
    f"sparse{pattern}" for pattern in ("", " 2:4", " 4:8")
}


@pytest.fixture(params=sorted(TRAINABLE))
def weight(request, weights_of_all_kinds):
    return weights_of_all_kinds(torch.bfloat16)[request.param]


def test_kinds_with_codes_are_refused_and_only_they(weights_of_all_kinds):
    for name, weight in weights_of_all_kinds(torch.float32).items():
        assert holds_codes(weight) == (name not in TRAINABLE), name
        if name not in TRAINABLE:
            with pytest.raises(ValueError, match="can't be trained"):
                trainable(weight)


@torch.no_grad()
def test_it_computes_what_the_weight_stands_for(weight):
    bias, x = torch.randn(24), torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    truth = x @ weight.dense().T + bias
    assert float((trainable(weight, bias)(x) - truth).norm() / truth.norm()) < 1e-6  # measured: 1.4e-7


def test_unchanged_it_freezes_to_the_same_bits(weight):
    found = trainable(weight).freeze()
    assert found.meta() == weight.meta()
    assert all(torch.equal(tensor, weight.tensors()[name]) for name, tensor in found.tensors().items())


def test_it_learns_and_what_is_frozen_is_what_was_learnt(weight):
    module = trainable(weight, torch.zeros(24))
    before = module.freeze()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 48, generator=generator), torch.randn(64, 24, generator=generator)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(30):
        loss = (module(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]  # measured: 0.20 to 0.81
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    after = module.freeze()
    assert after.meta() == before.meta()
    with torch.no_grad():
        truth = module(x) - module.bias
        error = float((after.matmul(x) - truth).norm() / truth.norm())
    assert error < 1e-2  # measured: 1.9e-3 to 2.9e-3, of rounding to bf16
    assert not torch.equal(after.dense(), before.dense())


@pytest.mark.parametrize("name", ["sparse", "sparse 2:4", "sparse 4:8"])
def test_pruned_entries_stay_exactly_zero_while_training(name, weights_of_all_kinds):
    weight = weights_of_all_kinds(torch.float32)[name]
    module = trainable(weight)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    module(torch.randn(8, 48)).square().sum().backward()
    optimizer.step()
    frozen = module.freeze()
    assert torch.equal(frozen.kept, weight.kept)
    assert (frozen.dense()[~weight.kept] == 0).all()
    assert (frozen.dense()[weight.kept] != weight.dense()[weight.kept]).all()


def test_the_frozen_weight_is_apart_from_the_module(weight):
    module = trainable(weight, dtype=torch.bfloat16)
    frozen, source = module.freeze(), weight.dense()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(frozen.dense(), source)
    assert torch.equal(weight.dense(), source)


def test_a_tables_tensors_learn_from_the_rows_that_are_looked_up_in_the_weights_own_order(weight):
    if weight.kind == "dense":
        pytest.skip("a dense table is a plain embedding")
    table = CompressedEmbedding(weight, dtype=torch.float32)
    unfreeze(table)
    floating = [name for name, tensor in weight.tensors().items() if tensor.is_floating_point()]
    assert [name for name, _ in table.named_parameters()] == floating
    table(torch.arange(24)).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in table.parameters())
