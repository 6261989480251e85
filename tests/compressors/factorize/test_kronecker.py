"""Sums of Kronecker products held against planted ones, against torch.kron and against alternating least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.compressors.factorize.kronecker import kronecker, rearranged, shapes, sides
from modelzip.compressors.factorize.settings import Kronecker
from modelzip.compressors.layer import UnsuitableError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def summed(a: Tensor, b: Tensor) -> Tensor:
    """Σ a_t ⊗ b_t by torch's own kron, fp64."""
    return torch.stack([torch.kron(one, other) for one, other in zip(a.double(), b.double(), strict=True)]).sum(0)


def relative(made: Tensor, truth: Tensor) -> float:
    return float((made.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize(("first", "second"), [((4, 6), (5, 3)), ((2, 3), (6, 8)), ((6, 8), (3, 2))])
def test_a_planted_sum_is_recovered_to_rounding(terms, first, second):
    weight = summed(draw(terms, *first), draw(terms, *second, seed=1))
    a, b = kronecker(weight, Kronecker(rank=terms, shape=f"{first[0]}x{first[1]}"))
    assert (a.shape, b.shape) == ((terms, *first), (terms, *second))
    assert relative(summed(a, b), weight) < 1e-12  # measured: 6e-16


def test_the_shape_of_a_planted_sum_is_found():
    weight = summed(draw(2, 4, 6), draw(2, 5, 3, seed=1))
    a, b = kronecker(weight, Kronecker(ratio=0.5))
    assert relative(summed(a, b), weight) < 1e-12  # measured: 7e-16
    assert a.numel() + b.numel() <= 0.5 * weight.numel()


def test_the_squared_error_is_the_sum_of_the_squared_singular_values_left_out():
    weight = draw(20, 18)
    a, b = kronecker(weight, Kronecker(rank=4, shape="4x6"))
    dropped = torch.linalg.svdvals(rearranged(weight, (4, 6)).double())[4:].norm()
    assert float((weight - summed(a, b)).norm()) == pytest.approx(float(dropped), rel=1e-10)  # measured: 1e-16


def test_alternating_least_squares_finds_nothing_better_and_the_same():
    weight = draw(12, 10).double()
    a, b = kronecker(weight, Kronecker(rank=2, shape="3x5"))
    ours = float((weight - summed(a, b)).norm())
    best = float("inf")
    for seed in range(2):
        a = draw(2, 3, 5, seed=seed).double()
        for _ in range(60):
            # W is linear in b for a fixed a, and the other way round: solve for every entry at once.
            b = _solved(weight, lambda one, a=a: summed(a, one), (2, 4, 2))
            a = _solved(weight, lambda one, b=b: summed(one, b), (2, 3, 5))
        best = min(best, float((weight - summed(a, b)).norm()))
    assert ours <= best * (1 + 1e-10)
    assert best == pytest.approx(ours, rel=1e-6)  # measured: 1e-16


def _solved(weight: Tensor, product, shape: tuple[int, ...]) -> Tensor:
    units = torch.eye(shape[0] * shape[1] * shape[2]).reshape(-1, *shape).double()
    columns = torch.stack([product(unit).flatten() for unit in units], dim=1)
    return torch.linalg.lstsq(columns, weight.flatten()[:, None]).solution.reshape(shape)


def test_the_chosen_shape_loses_least_of_those_that_were_tried_and_less_than_the_middle_one():
    weight = draw(24, 36)
    settings = Kronecker(ratio=0.6)
    tried = shapes((24, 36), settings)
    losses = {}
    for first in tried:
        a, b = kronecker(weight, settings.model_copy(update={"shape": f"{first[0]}x{first[1]}"}))
        losses[first] = relative(summed(a, b), weight)
    a, b = kronecker(weight, settings)
    assert relative(summed(a, b), weight) == pytest.approx(min(losses.values()), rel=1e-9)
    assert min(losses.values()) < sorted(losses.values())[len(losses) // 2]


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_a_ratio_is_kept(ratio):
    weight = draw(24, 36)
    a, b = kronecker(weight, Kronecker(ratio=ratio))
    assert a.numel() + b.numel() <= ratio * weight.numel()


def test_energy_takes_the_shape_that_keeps_it_with_the_fewest_parameters():
    weight = summed(draw(2, 4, 6), draw(2, 5, 3, seed=1)) + 0.01 * draw(20, 18, seed=2)
    a, b = kronecker(weight, Kronecker(energy=0.99))
    assert a.shape == (2, 4, 6)
    assert 1 - relative(summed(a, b), weight) ** 2 >= 0.99


def test_every_shape_that_is_tried_costs_less_than_the_matrix():
    settings = Kronecker(ratio=0.9)
    for first in shapes((12, 16), settings):
        size = sides((12, 16), first)
        assert size[0] > 1
        assert size[1] > 1
        assert sum(size) < 12 * 16


def test_a_shape_that_does_not_divide_the_matrix_is_unsuitable():
    with pytest.raises(UnsuitableError, match="5x2 doesn't divide its 12 rows and 16 columns"):
        kronecker(draw(12, 16), Kronecker(shape="5x2"))


def test_a_matrix_without_cheaper_factors_is_unsuitable():
    with pytest.raises(UnsuitableError, match="no Kronecker factors of its 2 rows and 2 columns"):
        kronecker(draw(2, 2), Kronecker(ratio=0.9))
