"""Integers of 8 bits on both sides of a product, against compressed-tensors' own arithmetic."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

from modelzip.weights.inputs import TOKEN_INT8, InputRounding, fixed_scale
from modelzip.weights.int8 import Int8
from modelzip.weights.kinds import empty, from_tensors
from modelzip.weights.trainable import holds_codes


def made(rows=10, columns=24, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (rows, columns), generator=draw).to(torch.int8)
    return Int8(codes, (torch.rand(rows, 1, generator=draw) + 0.1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_as_compressed_tensors_does(dtype):
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[1, 2] = 0
    for number, kind in (("int8", "int"), ("fp8", "float")):
        by_token = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
        for given in (x, x[0]):  # of a matrix, it has one scale for all tokens
            scale, zero = compute_dynamic_scales_and_zp(given, by_token, torch.nn.Linear(1, 1))
            found = InputRounding(number, flat_alike=True).rounded(given)
            assert torch.equal(found, fake_quantize(given, scale, zero, by_token))
        assert torch.equal(InputRounding(number).rounded(x[0]), InputRounding(number).rounded(x)[0])
        alike = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="tensor", dynamic=False)
        scale = fixed_scale(number, x.abs().amax((0, 1)) / 2, dtype)  # half of the largest: some are cut off
        assert torch.equal(InputRounding(number, scale).rounded(x), fake_quantize(x, scale, None, alike))


def test_each_token_has_its_own_scale():
    x = torch.stack([torch.ones(4), torch.tensor([1000.0, 1, 2, 3])])[None]
    codes, scale = TOKEN_INT8.codes(x)
    assert codes[0].tolist() == [[127] * 4, [127, 0, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([1 / 127.5, 1000 / 127.5])


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)])
def test_the_product_is_that_of_rounded_inputs_and_the_dense_matrix(shape):
    weight = made()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    wanted = TOKEN_INT8.rounded(x).double() @ weight.dense().double().T
    assert torch.allclose(weight.matmul(x).double(), wanted, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(weight.matmul(x), x @ weight.dense().T, rtol=1e-5, atol=1e-4)


def test_one_scale_for_all_inputs_is_stored_beside_the_codes_and_cuts_off_what_is_larger():
    weight = made()
    fixed = Int8(
        weight.codes, weight.scale, InputRounding("int8", fixed_scale("int8", torch.tensor(2.0), torch.float32))
    )
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(2)) * 2
    cut = (x / (2 / 127.5)).clamp(-128, 127).round().double() * (2 / 127.5)
    assert torch.allclose(fixed.matmul(x).double(), cut @ weight.dense().double().T, rtol=1e-5, atol=1e-4)
    again = from_tensors(fixed.tensors(), fixed.meta())
    assert torch.equal(again.matmul(x), fixed.matmul(x))
    assert empty(fixed.meta()).nbytes == fixed.nbytes == weight.nbytes + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_read_back_bit_for_bit_and_its_size_is_known_before(dtype):
    weight = made(dtype=dtype)
    again = from_tensors(weight.tensors(), weight.meta())
    assert isinstance(again, Int8)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert empty(weight.meta()).nbytes == weight.nbytes == 10 * 24 + 10 * dtype.itemsize
    assert torch.equal(weight.rows(torch.tensor([3, 1])), weight.dense()[[3, 1]])


def test_it_has_no_gradient_to_train_by():
    assert holds_codes(Int8(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1)))
