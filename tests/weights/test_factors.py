"""Products of factors: each kind against the definition of the product that it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch

from modelzip.weights.dense import Dense
from modelzip.weights.kronecker import Kronecker
from modelzip.weights.layouts import Scheme
from modelzip.weights.low_rank import LowRank
from modelzip.weights.tensor_train import TensorTrain


def _random(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_a_low_rank_weight_is_the_product_of_its_factors(random_weight):
    left, right = _random(6, 3), random_weight((3, 16), Scheme(4, "group", 8, False))
    weight = LowRank(Dense(left), right)
    assert (weight.shape, weight.rank) == ((6, 16), 3)
    truth = left.double() @ right.dense(torch.float64)
    assert float((weight.dense() - truth).norm() / truth.norm()) < 1e-6  # measured: 3.5e-8
    assert weight.tensors().keys() == {"weight_left", "weight_right_packed", "weight_right_shape"} | {
        f"weight_right_{name}" for name in ("scale", "zero_point")
    }


def test_factors_whose_ranks_differ_are_refused():
    with pytest.raises(ValueError, match=r"left \(6, 3\) and right \(4, 8\)"):
        LowRank(Dense(torch.ones(6, 3)), Dense(torch.ones(4, 8)))


def test_a_factor_must_be_of_a_plain_kind():
    inner = {"kind": "kronecker", "shape": [4, 4], "a": [1, 2, 2], "b": [1, 2, 2], "dtype": "float32"}
    with pytest.raises(ValueError, match="a factor of kind 'kronecker'"):
        LowRank.empty({"kind": "low_rank", "shape": [4, 4], "left": inner, "right": inner})


@pytest.mark.parametrize(("a", "b"), [((2, 3, 5), (2, 4, 2)), ((1, 8, 2), (1, 2, 8)), ((3, 1, 6), (3, 5, 1))])
def test_a_kronecker_weight_is_torchs_kron_summed(a, b):
    weight = Kronecker(_random(*a), _random(*b, seed=1))
    truth = torch.stack([torch.kron(one, other) for one, other in zip(weight.a, weight.b, strict=True)]).sum(0)
    assert weight.shape == tuple(truth.shape)
    assert float((weight.dense() - truth).norm() / truth.norm()) < 1e-6  # measured: 0
    x = _random(7, truth.shape[1], seed=2)
    assert float((weight.matmul(x) - x @ truth.T).norm() / (x @ truth.T).norm()) < 1e-6  # measured: 9.2e-8


def test_a_and_b_must_have_as_many_terms():
    with pytest.raises(ValueError, match=r"a \(2, 3, 3\) and b \(1, 3, 3\)"):
        Kronecker(torch.ones(2, 3, 3), torch.ones(1, 3, 3))


def test_a_tensor_trains_entries_are_products_of_slices_of_its_cores():
    cores = (_random(1, 2, 3, 4), _random(4, 3, 2, 5, seed=1), _random(5, 2, 2, 1, seed=2))
    weight = TensorTrain(cores)
    assert weight.shape == (12, 12)
    truth = torch.empty(12, 12)
    for rows in itertools.product(*(range(core.shape[1]) for core in cores)):
        for columns in itertools.product(*(range(core.shape[2]) for core in cores)):
            value = torch.eye(1)
            for core, i, j in zip(cores, rows, columns, strict=True):
                value = value @ core[:, i, j]
            row = (rows[0] * 3 + rows[1]) * 2 + rows[2]
            column = (columns[0] * 2 + columns[1]) * 2 + columns[2]
            truth[row, column] = value
    assert float((weight.dense() - truth).norm() / truth.norm()) < 1e-6  # measured: 7.1e-8


def test_one_core_is_the_matrix_itself():
    matrix = _random(4, 6)
    weight = TensorTrain((matrix.reshape(1, 4, 6, 1),))
    assert torch.equal(weight.dense(), matrix)
    assert torch.equal(weight.rows(torch.tensor([2])), matrix[2:3])


@pytest.mark.parametrize("shapes", [[(1, 2, 2, 3), (4, 2, 2, 1)], [(2, 2, 2, 1)], [(1, 2, 2, 2)], [(1, 2, 1)]])
def test_cores_that_do_not_fit_together_are_refused(shapes):
    with pytest.raises(ValueError, match="must be"):
        TensorTrain(tuple(torch.ones(shape) for shape in shapes))


def test_products_of_factors_multiply_less_than_the_matrix_would(counted_multiplications):
    """The naive product with the dense matrix takes tokens x out x in."""
    x, dense = _random(4, 64), 4 * 64 * 64
    kronecker = Kronecker(_random(1, 8, 8), _random(1, 8, 8))
    train = TensorTrain((_random(1, 8, 8, 2), _random(2, 8, 8, 1)))
    low_rank = LowRank(Dense(_random(64, 4)), Dense(_random(4, 64)))
    assert counted_multiplications(kronecker, x) == dense / 4
    assert counted_multiplications(train, x) == dense / 2
    assert counted_multiplications(low_rank, x) == dense / 8
    lopsided = Kronecker(_random(1, 32, 2), _random(1, 2, 32))  # b first makes the small intermediate
    assert counted_multiplications(lopsided, x) == 4 * (2 * 32 * 2 + 2 * 2 * 32)
    mirrored = Kronecker(_random(1, 2, 32), _random(1, 32, 2))
    assert counted_multiplications(mirrored, x) == 4 * (2 * 32 * 2 + 2 * 2 * 32)


@pytest.fixture
def counted_multiplications():
    from torch.utils.flop_counter import FlopCounterMode

    def count(weight, x):
        with FlopCounterMode(display=False) as counter:
            weight.matmul(x)
        return counter.get_total_flops() / 2

    return count
