"""Matrices of any codes whose inputs are rounded before the product."""

from __future__ import annotations

import json

import pytest
import torch

from modelzip.weights.inputs import InputRounding, fixed_scale, straight_through
from modelzip.weights.kinds import empty, from_tensors
from modelzip.weights.rounded_inputs import RoundedInputs
from modelzip.weights.trainable import holds_codes

WAYS = {
    "int8": InputRounding("int8"),
    "fp8": InputRounding("fp8"),
    "int8-static": InputRounding("int8", fixed_scale("int8", torch.tensor(2.0), torch.bfloat16)),
    "fp8-static": InputRounding("fp8", fixed_scale("fp8", torch.tensor(2.0), torch.float32)),
}


@pytest.fixture(params=WAYS)
def every(request, weights_of_all_kinds):
    kinds = {"affine", "codebook", "float"}
    weights = weights_of_all_kinds(torch.float32)
    return [RoundedInputs(weight, WAYS[request.param]) for weight in weights.values() if weight.kind in kinds]


def test_the_product_is_that_of_rounded_inputs(every):
    for weight in every:
        x = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(0)) * 2
        wanted = weight.inputs.rounded(x).double() @ weight.dense().double().T
        assert torch.allclose(weight.matmul(x).double(), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(weight.matmul(x), weight.inner.matmul(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(weight.round_inputs(x), weight.inputs.rounded(x))


def test_it_is_read_back_bit_for_bit_and_its_size_is_known_before(every):
    for weight in every:
        meta = json.loads(json.dumps(weight.meta()))
        again = from_tensors(weight.tensors(), meta)
        x = torch.randn(3, 4, weight.shape[1], generator=torch.Generator().manual_seed(1))
        assert torch.equal(again.matmul(x), weight.matmul(x))
        assert torch.equal(again.dense(), weight.dense())
        assert again.meta() == weight.meta() == empty(meta).meta()
        scale = weight.inputs.scale
        assert empty(meta).nbytes == weight.nbytes == weight.inner.nbytes + (0 if scale is None else scale.nbytes)
        assert all(name.startswith("weight") and "." not in name for name in weight.tensors())
        assert torch.equal(weight.rows(torch.tensor([2, 0])), weight.dense()[[2, 0]])
        assert holds_codes(weight)


def test_floats_are_the_nearest_of_e4m3():
    """By exhaustive search among all finite values."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].unique()
    x = torch.randn(1, 1, 200, generator=torch.Generator().manual_seed(3))
    scale = float(x.abs().max()) / 448
    nearest = values[((x.flatten() / scale)[:, None] - values).abs().argmin(1)] * scale
    assert torch.allclose(InputRounding("fp8").rounded(x).flatten(), nearest, rtol=1e-6)


def test_a_scale_that_would_be_zero_is_not_divided_by():
    for number in ("int8", "fp8"):
        fixed = InputRounding(number, fixed_scale(number, torch.zeros(4), torch.float32))
        for way in (InputRounding(number), fixed):
            assert torch.equal(way.rounded(torch.zeros(1, 2, 4)), torch.zeros(1, 2, 4))


def test_gradients_pass_as_if_inputs_were_left_alone():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    rounded = straight_through(InputRounding("int8").rounded)(x)
    assert torch.allclose(rounded, InputRounding("int8").rounded(x.detach()), rtol=0, atol=1e-6)
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
