"""TT-SVD held against planted trains, against the bound of Oseledets and against the two-core case."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modelzip.compressors.factorize.kronecker import kronecker
from modelzip.compressors.factorize.settings import Kronecker, TensorTrain
from modelzip.compressors.factorize.tensor_train import (
    as_tensor,
    modes,
    paired_modes,
    parameters,
    planned_ranks,
    tensor_train,
    uniform_ranks,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entry(cores: tuple[Tensor, ...], row: int, column: int) -> float:
    """One entry of the matrix, by the definition: a product of one small matrix a core."""
    product = torch.ones(1, 1, dtype=torch.float64)
    for core in reversed(cores):
        _, m, n, _ = core.shape
        product = core[:, row % m, column % n].double() @ product
        row, column = row // m, column // n
    return float(product)


def dense(cores: tuple[Tensor, ...]) -> Tensor:
    rows, columns = (math.prod(core.shape[axis] for core in cores) for axis in (1, 2))
    return torch.tensor([[entry(cores, i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64)


def planted(pairs, ranks) -> Tensor:
    ends = (1, *ranks, 1)
    return dense(tuple(draw(ends[k], *pair, ends[k + 1], seed=k) for k, pair in enumerate(pairs)))


def relative(made: Tensor, truth: Tensor) -> float:
    return float((made.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(("shape", "dims", "rank"), [((12, 18), 3, 3), ((16, 16), 4, 2), ((12, 10), 2, 4)])
def test_a_planted_train_is_recovered_to_rounding(shape, dims, rank):
    pairs = paired_modes(shape, dims)
    weight = planted(pairs, uniform_ranks(pairs, rank))
    cores = tensor_train(weight, TensorTrain(rank=rank, dims=dims))
    assert [tuple(core.shape[1:3]) for core in cores] == list(pairs)
    assert relative(dense(cores), weight) < 1e-12  # measured: 9e-16


def test_a_planted_train_comes_back_also_when_more_ranks_are_asked_for():
    pairs = paired_modes((12, 18), 3)
    weight = planted(pairs, (2, 2))
    assert relative(dense(tensor_train(weight, TensorTrain(rank=4))), weight) < 1e-12  # measured: 7e-16


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_lies_within_the_bound_and_is_no_less_than_any_one_unfolding_must_lose(rank):
    weight = draw(12, 18)
    pairs = paired_modes((12, 18), 3)
    tensor = as_tensor(weight.double(), pairs)
    ranks = uniform_ranks(pairs, rank)
    tails = [
        float(torch.linalg.svdvals(tensor.reshape(math.prod(tensor.shape[:k]), -1))[r:].square().sum())
        for k, r in enumerate(ranks, 1)
    ]
    lost = float((dense(tensor_train(weight, TensorTrain(rank=rank))) - weight).square().sum())
    assert max(tails) * (1 - 1e-9) <= lost <= sum(tails) * (1 + 1e-9)


def test_at_full_rank_nothing_is_lost():
    weight = draw(12, 18)
    assert relative(dense(tensor_train(weight, TensorTrain(rank=10_000))), weight) < 1e-12  # measured: 1e-15


def test_two_cores_are_the_nearest_sum_of_kronecker_products():
    weight = draw(12, 10)
    (rows, columns), _ = paired_modes((12, 10), 2)
    a, b = kronecker(weight, Kronecker(rank=3, shape=f"{rows}x{columns}"))
    cores = tensor_train(weight, TensorTrain(rank=3, dims=2))
    assert relative(dense(cores), torch.einsum("tij,tkl->ikjl", a, b).reshape(12, 10)) < 1e-10  # measured: 1e-16


def test_it_loses_less_than_the_same_train_fitted_to_random_columns():
    weight = draw(12, 18).double()
    ours = tensor_train(weight, TensorTrain(rank=4))
    pairs = paired_modes((12, 18), 3)
    tensor = as_tensor(weight, pairs)
    first = torch.linalg.qr(draw(tensor.shape[0], 4).double())[0]
    rest = (first.T @ tensor.reshape(tensor.shape[0], -1)).reshape(4 * tensor.shape[1], -1)
    second = torch.linalg.qr(draw(len(rest), 4, seed=1).double())[0]
    naive = (
        first.reshape(1, *pairs[0], 4),
        second.reshape(4, *pairs[1], 4),
        (second.T @ rest).reshape(4, *pairs[2], 1),
    )
    assert relative(dense(ours), weight) < 0.75 * relative(dense(naive), weight)  # measured: 0.62 (0.58 of 0.94)


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_energy_is_kept(energy):
    weight = draw(16, 24)
    cores = tensor_train(weight, TensorTrain(energy=energy))
    assert energy <= 1 - relative(dense(cores), weight) ** 2 < 1


def test_energy_finds_the_ranks_of_a_planted_train_under_noise():
    pairs = paired_modes((16, 24), 3)
    weight = planted(pairs, (2, 3))
    weight += 0.01 * weight.std() * draw(16, 24)
    cores = tensor_train(weight, TensorTrain(energy=0.999))
    assert [core.shape[3] for core in cores[:-1]] == [2, 3]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(576, 1536), (192, 576), (12, 18)])
def test_a_ratios_ranks_are_the_largest_that_cost_no_more(ratio, shape):
    settings = TensorTrain(ratio=ratio)
    ranks = planned_ranks(shape, settings)
    pairs = paired_modes(shape, 3)
    budget = ratio * shape[0] * shape[1]
    assert parameters(pairs, ranks) <= budget < parameters(pairs, uniform_ranks(pairs, max(ranks) + 1))


def test_planned_ranks_are_those_of_the_cores():
    for settings in (TensorTrain(ratio=0.5), TensorTrain(rank=5), TensorTrain(ratio=0.5, dims=4)):
        cores = tensor_train(draw(16, 24), settings)
        assert tuple(core.shape[3] for core in cores[:-1]) == planned_ranks((16, 24), settings)
        pairs = paired_modes((16, 24), settings.dims)
        assert sum(core.numel() for core in cores) == parameters(pairs, planned_ranks((16, 24), settings))


@pytest.mark.parametrize("size", [1, 2, 17, 96, 576, 1536, 49152])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_modes_multiply_to_the_size_and_fall(size, dims):
    parts = modes(size, dims)
    assert math.prod(parts) == size
    assert list(parts) == sorted(parts, reverse=True)


def test_modes_are_alike_where_the_size_allows():
    assert modes(576, 3) == (9, 8, 8)
    assert modes(1536, 3) == (16, 12, 8)
    assert modes(34, 3) == (17, 2, 1)
