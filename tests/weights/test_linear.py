"""The module that computes with a compressed weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modelzip.weights.layouts import Scheme
from modelzip.weights.linear import CompressedLinear

SCHEMES = [
    Scheme(3, "group", 16, True),
    Scheme(3, "group", 16, False),
    Scheme(4, "channel", None, False),
    Scheme(8, "tensor", None, True),
    Scheme(2, "tensor", None, False),
]


@pytest.fixture(params=SCHEMES, ids=str)
def weight(request, random_weight):
    return random_weight((24, 48), request.param)


@torch.no_grad()
def test_it_computes_what_a_dense_linear_with_that_matrix_computes(weight):
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(48, 24).double()
    dense.weight.data = weight.dense(torch.float64)
    x, bias = torch.randn(2, 5, 48, generator=generator), torch.randn(24, generator=generator)
    dense.bias.data = bias.double()
    truth = dense(x.double())
    found = CompressedLinear(weight, nn.Parameter(bias))(x)
    assert found.dtype == torch.float32
    assert float((found - truth).norm() / truth.norm()) < 5e-7  # measured: 1.2e-7
    without = CompressedLinear(weight)(x)
    assert float((without + bias - truth).norm() / truth.norm()) < 5e-7  # measured: 1.2e-7


def test_it_holds_the_packed_tensors_and_nothing_dense(weight):
    bias = nn.Parameter(torch.ones(24))
    module = CompressedLinear(weight, bias)
    assert dict(module.named_parameters()).keys() == {"bias"}
    assert sum(buffer.nbytes for buffer in module.buffers()) == weight.nbytes
    assert module.state_dict().keys() == weight.tensors().keys() | {"bias"}
    module(torch.ones(1, 48))
    assert sum(tensor.nbytes for tensor in module.state_dict().values()) == weight.nbytes + bias.nbytes


def test_a_loader_that_puts_other_buffers_in_place_changes_the_weight(weight, random_weight):
    scheme = Scheme.of(weight)
    module = CompressedLinear(weight)
    other = random_weight((24, 48), scheme, seed=1)
    module.load_state_dict(other.tensors(), assign=True)
    assert torch.equal(module.weight_value.dense(), other.dense())
    assert not torch.equal(module.weight_value.dense(), weight.dense())


def test_it_may_start_on_the_meta_device(weight):
    with torch.device("meta"):
        module = CompressedLinear(weight).to("meta")
    module.load_state_dict(weight.tensors(), assign=True)
    x = torch.randn(3, 48)
    assert torch.equal(module(x), weight.matmul(x))


def test_it_says_what_it_is(weight):
    assert repr(CompressedLinear(weight)) == f"CompressedLinear(out=24, in=48, kind=affine, bits={weight.bits})"
