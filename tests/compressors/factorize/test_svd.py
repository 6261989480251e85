"""The truncated SVD held against Eckart and Young's identity, torch's own SVD and random projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.compressors.factorize.settings import Svd
from modelzip.compressors.factorize.spectrum import affordable_rank, rank_for_ratio, spectrum
from modelzip.compressors.factorize.svd import svd


def random_weight(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative(made: Tensor, truth: Tensor) -> float:
    return float((made.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 7, 23])
def test_the_squared_error_is_the_sum_of_the_squared_singular_values_left_out(rows, columns, rank):
    weight = random_weight(rows, columns)
    left, right = svd(weight, Svd(rank=rank))
    assert (left.shape, right.shape) == ((rows, rank), (rank, columns))
    lost = float((weight.double() - left @ right).square().sum())
    dropped = float(torch.linalg.svdvals(weight.double())[rank:].square().sum())
    assert lost == pytest.approx(dropped, rel=1e-10)  # measured: 1e-15


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24)])
def test_no_random_projection_comes_as_close(rows, columns):
    weight = random_weight(rows, columns).double()
    left, right = svd(weight, Svd(rank=8))
    ours = relative(left @ right, weight)
    for seed in range(10):
        basis, _ = torch.linalg.qr(random_weight(rows, 8, seed=seed).double())
        assert relative(basis @ (basis.T @ weight), weight) > ours


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24)])
def test_both_factors_carry_the_root_of_each_singular_value(rows, columns):
    weight = random_weight(rows, columns)
    left, right = svd(weight, Svd(rank=9))
    values = torch.linalg.svdvals(weight.double())[:9]
    assert relative(left.T @ left, torch.diag(values)) < 1e-10  # measured: 2e-15
    assert relative(right @ right.T, torch.diag(values)) < 1e-10  # measured: 2e-15


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24)])
def test_a_matrix_of_low_rank_comes_back_also_when_more_ranks_are_asked_for(rows, columns):
    weight = random_weight(rows, 5).double() @ random_weight(5, columns, seed=1).double()
    left, right = svd(weight, Svd(rank=12))
    assert relative(left @ right, weight) < 1e-12  # measured: 8e-16
    assert float(left.abs().max()) < 10 * float(left[:, :5].abs().max())


def test_a_matrix_of_zeros_stays_one():
    left, right = svd(torch.zeros(6, 9), Svd(rank=2))
    assert torch.equal(left @ right, torch.zeros(6, 9, dtype=torch.float64))


def test_steep_spectra_lose_no_accuracy_to_the_gram_matrix():
    weight = (random_weight(96, 64) * torch.logspace(0, -5, 64)) @ torch.linalg.qr(random_weight(64, 64, seed=1))[0]
    left, right = svd(weight, Svd(rank=40))
    best = float(torch.linalg.svdvals(weight.double())[40:].norm())
    assert float((weight.double() - left @ right).norm()) == pytest.approx(best, rel=1e-9)  # measured: 1e-14


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_energy_takes_the_least_rank_that_keeps_this_share(energy):
    weight = random_weight(30, 50).double()
    left, right = svd(weight, Svd(energy=energy))
    shares = torch.linalg.svdvals(weight).square().cumsum(0) / weight.square().sum()
    rank = left.shape[1]
    assert shares[rank - 1] >= energy
    assert rank == 1 or shares[rank - 2] < energy
    assert 1 - relative(left @ right, weight) ** 2 >= energy - 1e-12


@pytest.mark.parametrize(("rows", "columns"), [(576, 1536), (192, 576), (7, 5)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_a_ratios_rank_is_the_largest_that_costs_no_more(rows, columns, ratio):
    rank = rank_for_ratio(ratio, (rows, columns))
    assert rank == 1 or rank * (rows + columns) <= ratio * rows * columns
    assert (rank + 1) * (rows + columns) > ratio * rows * columns


@pytest.mark.parametrize(("rows", "columns"), [(576, 1536), (6, 3), (1, 50), (2, 2)])
def test_an_affordable_rank_costs_less_than_the_matrix_and_the_next_one_does_not(rows, columns):
    rank = affordable_rank((rows, columns))
    assert rank * (rows + columns) < rows * columns
    assert (rank + 1) * (rows + columns) >= rows * columns


@pytest.mark.parametrize(("rows", "columns"), [(12, 30), (30, 12)])
def test_left_vectors_are_orthonormal_and_span_what_is_kept(rows, columns):
    weight = random_weight(rows, columns).double()
    basis = spectrum(weight).left_vectors(5)
    left, right = svd(weight, Svd(rank=5))
    assert relative(basis.T @ basis, torch.eye(5)) < 1e-12  # measured: 1e-15
    assert relative(basis @ (basis.T @ weight), left @ right) < 1e-12  # measured: 7e-16


def test_the_weight_stays_as_it_was():
    weight = random_weight(8, 12).double()
    before = weight.clone()
    svd(weight, Svd(rank=2))
    assert torch.equal(weight, before)
