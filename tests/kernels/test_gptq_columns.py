"""GPTQ's column loop inside a block: every output must satisfy the definition, checked column by column in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.kernels.gptq_columns import gptq_columns

pytestmark = pytest.mark.usefixtures("path")


class Block:
    """Random columns, a well-conditioned upper factor and a grid, all [block, out] but the factor."""

    def __init__(self, block: int, out: int, *, bits: int, symmetric: bool = True, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        half = 1 << (bits - 1)
        self.bits = bits
        self.weight = torch.randn(block, out, generator=generator)
        coupling = 0.4 * torch.randn(block, block, generator=generator).triu(1) / block**0.5
        self.factor = coupling + torch.diag(0.5 + torch.rand(block, generator=generator))
        self.scale = (0.5 + torch.rand(block, out, generator=generator)) * 3 / half
        self.zero_point = torch.zeros(block, out)
        if not symmetric:
            self.zero_point = torch.randint(-half, half, (block, out), generator=generator).float()

    def run(self, value_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        weight, factor = self.weight.clone(), self.factor.clone()
        scale, zero_point = self.scale.clone(), self.zero_point.clone()
        wide = torch.full((2 * len(factor), 2 * len(factor)), torch.nan)
        wide[: len(factor), : len(factor)] = factor
        factor = wide[: len(factor), : len(factor)]  # as a block of a larger factor lies
        codes, errors = gptq_columns(weight, factor, scale, zero_point, bits=self.bits, value_dtype=value_dtype)
        assert torch.equal(factor, self.factor)
        assert torch.equal(scale, self.scale)
        assert torch.equal(zero_point, self.zero_point)
        return codes, errors

    def updated(self, errors: Tensor) -> Tensor:
        """The columns as they stood when their turn came: w_j - sum over i < j of U_ij e_i, in fp64."""
        return self.weight.double() - self.factor.double().triu(1).T @ errors.double()


SIZES = [(1, 1), (1, 7), (3, 1), (15, 5), (16, 5), (17, 5), (33, 2), (128, 9), (7, 31), (20, 32), (9, 33), (5, 70)]
"""Columns and rows: around the sizes at which a fast path may cut a block."""


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_column_goes_to_the_grid_point_nearest_to_what_it_has_become(bits, symmetric):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for block, out in SIZES:
        case = Block(block, out, bits=bits, symmetric=symmetric)
        codes, errors = case.run()
        assert codes.dtype == torch.int8
        wanted = case.updated(errors) / case.scale.double() + case.zero_point.double()
        assert float((wanted.clamp(low, high) - codes.double()).abs().max()) < 0.5 + 1e-5  # measured: 0.49999
        assert int(codes.min()) >= low
        assert int(codes.max()) <= high


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_error_is_what_the_runtimes_value_misses_over_the_factors_diagonal(symmetric, value_dtype, distance):
    for block, out in SIZES:
        case = Block(block, out, bits=4, symmetric=symmetric)
        codes, errors = case.run(value_dtype)
        value = ((codes - case.zero_point) * case.scale).to(value_dtype).double()
        truth = (case.updated(errors) - value) / case.factor.double().diagonal()[:, None]
        whole, worst = distance(errors, truth)
        assert whole < 4e-6  # measured: 1.5e-6
        assert worst < 2e-5  # measured: 8.2e-6


def test_the_runtimes_dtype_changes_the_errors():
    case = Block(17, 5, bits=4)
    assert not torch.allclose(case.run(torch.float32)[1], case.run(torch.bfloat16)[1], atol=1e-4)


def test_a_block_done_in_two_parts_is_the_block_done_at_once(distance):
    case = Block(48, 6, bits=3)
    codes, errors = case.run()
    first = Block(48, 6, bits=3)
    cut = 20
    first.weight, first.factor = first.weight[:cut], first.factor[:cut, :cut]
    first.scale, first.zero_point = first.scale[:cut], first.zero_point[:cut]
    first_codes, first_errors = first.run()
    second = Block(48, 6, bits=3)
    second.weight = second.weight[cut:] - second.factor[:cut, cut:].T @ first_errors
    second.factor, second.scale = second.factor[cut:, cut:], second.scale[cut:]
    second.zero_point = second.zero_point[cut:]
    second_codes, second_errors = second.run()
    assert torch.equal(torch.cat((first_codes, second_codes)), codes)
    assert distance(torch.cat((first_errors, second_errors)), errors)[0] < 2e-6  # measured: 4.0e-7


def test_without_coupling_every_column_is_rounded_to_nearest():
    case = Block(40, 6, bits=4, symmetric=False)
    case.factor = torch.diag(case.factor.diagonal())
    codes, _ = case.run()
    assert torch.equal(codes, (case.weight / case.scale + case.zero_point).round().clamp(-8, 7))


def test_negative_scales_are_a_grid_like_any_other():
    case = Block(20, 6, bits=4)
    case.scale.neg_()
    codes, errors = case.run()
    wanted = (case.updated(errors) / case.scale.double()).clamp(-8, 7)
    assert float((wanted - codes).abs().max()) < 0.5 + 1e-5  # measured: 0.497
    assert codes.abs().max() > 1


def test_shapes_that_do_not_fit_are_refused():
    case = Block(8, 3, bits=4)
    options = {"bits": 4, "value_dtype": torch.float32}
    with pytest.raises(ValueError, match="don't agree"):
        gptq_columns(case.weight, case.factor, case.scale[:7], case.zero_point, **options)
    with pytest.raises(ValueError, match="don't agree"):
        gptq_columns(case.weight, case.factor, case.scale, case.zero_point[:, :1], **options)
    with pytest.raises(ValueError, match=r"\(7, 7\) doesn't fit a block of 8 columns"):
        gptq_columns(case.weight, case.factor[:7, :7], case.scale, case.zero_point, **options)


@pytest.mark.parametrize("size", [1e-7, 3e-6, 1.0, 2e4], ids=["subnormal", "tiny", "plain", "overflowing"])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_as_torch_rounds_them(value_dtype, size):
    case = Block(6, 70, bits=4)
    case.factor = torch.eye(6)
    case.weight, case.scale = case.weight * size, case.scale * size
    codes, errors = case.run(value_dtype)
    assert torch.equal(errors, case.weight - (codes * case.scale).to(value_dtype).float())
