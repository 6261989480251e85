"""The second moment of a linear's inputs and the relative error made from it, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.pipeline.hessian import accumulate, finish, relative_error

WIDTHS = [1, 2, 127, 128, 129, 300]
"""Around the width of a panel, and more than two of them."""


def batches(width: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs of several shapes, [tokens, in] and [batch, tokens, in], with a mean away from zero."""
    generator = torch.Generator().manual_seed(width)
    shapes = [(3, 17, width), (40, width), (1, 1, width)]
    return [(torch.randn(shape, generator=generator) + 0.5).to(dtype) for shape in shapes]


def mean_of_products(inputs: list[Tensor]) -> Tensor:
    x = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs]).double()
    return x.T @ x / x.shape[0]


def gathered(inputs: list[Tensor]) -> Tensor:
    width = inputs[0].shape[-1]
    total = torch.zeros(width, width)
    tokens = sum(accumulate(total, part) for part in inputs)
    return finish(total, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_hessian_is_the_mean_product_of_the_inputs(width, dtype):
    inputs = batches(width, dtype=dtype)
    truth = mean_of_products(inputs)
    assert float((gathered(inputs).double() - truth).norm() / truth.norm()) < 1e-6  # measured: 2.3e-7


@pytest.mark.parametrize("width", WIDTHS)
def test_the_hessian_is_symmetric_to_the_bit(width):
    hessian = gathered(batches(width))
    assert torch.equal(hessian, hessian.T)


def test_accumulating_counts_tokens_not_batches():
    assert [accumulate(torch.zeros(5, 5), part) for part in batches(5)] == [51, 40, 1]


def test_the_order_of_the_batches_does_not_matter():
    inputs = batches(129)
    there, back = gathered(inputs), gathered(inputs[::-1])
    assert float((there - back).norm() / there.norm()) < 5e-7  # measured: 6e-8


def test_inputs_stay_as_they_were():
    inputs = batches(130)
    before = [part.clone() for part in inputs]
    gathered(inputs)
    assert all(torch.equal(left, right) for left, right in zip(inputs, before, strict=True))


def test_no_tokens_give_zeros():
    hessian = finish(torch.zeros(3, 3), accumulate(torch.zeros(3, 3), torch.zeros(0, 3)))
    assert torch.equal(hessian, torch.zeros(3, 3))


@pytest.mark.parametrize("step", [0.3, 0.01])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_relative_error_is_that_of_the_outputs(width, step):
    generator = torch.Generator().manual_seed(0)
    inputs = batches(width)
    weight = torch.randn(11, width, generator=generator)
    dense = (weight / step).round() * step
    x = torch.cat([part.reshape(-1, width) for part in inputs]).double()
    truth = float((x @ (weight - dense).double().T).norm() / (x @ weight.double().T).norm())
    assert relative_error(weight, dense, gathered(inputs)) == pytest.approx(truth, rel=1e-6)  # measured: 7e-8


def test_an_equal_weight_has_no_error_and_a_zeroed_one_loses_everything():
    hessian, weight = gathered(batches(7)), torch.ones(2, 7)
    assert relative_error(weight, weight, hessian) == 0.0
    assert relative_error(weight, torch.zeros(2, 7), hessian) == 1.0


def test_a_weight_without_output_has_no_error():
    assert relative_error(torch.zeros(2, 7), torch.zeros(2, 7), gathered(batches(7))) == 0.0
