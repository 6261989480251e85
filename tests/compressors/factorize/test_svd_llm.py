"""SVD-LLM held against the loss it promises, against other low-rank weights, and against plain SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.compressors.factorize.settings import Svd, SvdLlm
from modelzip.compressors.factorize.svd import svd
from modelzip.compressors.factorize.svd_llm import svd_llm, whitening
from modelzip.compressors.layer import UnsuitableError

LADDER = {"damping": 0.01, "max_damping": 1.0}
SHAPES = [(24, 40), (40, 24), (32, 32)]


def inputs(columns: int, *, tokens: int = 400, seed: int = 0) -> Tensor:
    """x [tokens, in], fp64: mixtures of few sources plus some noise, at very different volumes."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(tokens, columns // 4, generator=generator)
    mixed = sources @ torch.randn(columns // 4, columns, generator=generator)
    mixed += torch.randn(tokens, columns, generator=generator)
    return (mixed * torch.exp(torch.randn(columns, generator=generator))).double()


def second_moment(x: Tensor) -> Tensor:
    return (x.T @ x) / len(x)


def random_weight(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def run(weight: Tensor, hessian: Tensor, **settings) -> Tensor:
    left, right = svd_llm(weight, whitening(hessian, **LADDER), SvdLlm(**settings))
    return left @ right


def loss(weight: Tensor, made: Tensor, x: Tensor) -> float:
    """‖(W − Ŵ)X‖² a token, measured on the inputs themselves."""
    return float(((weight.double() - made) @ x.T).square().sum() / len(x))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_the_measured_loss_of_outputs_is_the_sum_of_the_squared_singular_values_left_out(rows, columns, rank):
    weight, x = random_weight(rows, columns), inputs(columns)
    barely_damped = whitening(second_moment(x), damping=1e-13, max_damping=1e-13)
    left, right = svd_llm(weight, barely_damped, SvdLlm(rank=rank))
    # The paper's own way, in fp64: S by Cholesky, singular values of W S by torch.
    dropped = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(second_moment(x)))[rank:].square().sum()
    assert loss(weight, left @ right, x) == pytest.approx(
        float(dropped), rel=1e-10
    )  # measured: 1e-14, the damping's part among it


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_with_damping_the_identity_holds_of_the_loss_with_the_weights_own_error_in_it(rows, columns):
    weight, x = random_weight(rows, columns), inputs(columns)
    hessian = second_moment(x)
    made = run(weight, hessian, rank=8)
    level = 0.01 * float(hessian.diagonal().mean())
    factor = torch.linalg.cholesky(hessian + level * torch.eye(columns, dtype=torch.float64))
    dropped = float(torch.linalg.svdvals(weight.double() @ factor)[8:].square().sum())
    both = loss(weight, made, x) + level * float((weight.double() - made).square().sum())
    assert both == pytest.approx(dropped, rel=1e-10)  # measured: 7e-15


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_it_is_the_weight_that_the_papers_formula_gives(rows, columns):
    weight, hessian = random_weight(rows, columns), second_moment(inputs(columns))
    factor = whitening(hessian, **LADDER).factor
    u, s, v = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    paper = (u[:, :8] * s[:8]) @ v[:8] @ torch.linalg.inv(factor)
    made = run(weight, hessian, rank=8)
    assert float((made - paper).norm() / paper.norm()) < 1e-10  # measured: 1e-14


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_alternating_least_squares_on_the_outputs_finds_nothing_better(rows, columns):
    weight, x = random_weight(rows, columns), inputs(columns)
    hessian = whitening(second_moment(x), damping=1e-12, max_damping=1e-12)
    left, right = svd_llm(weight, hessian, SvdLlm(rank=6))
    ours = loss(weight, left @ right, x)
    y = x @ weight.double().T
    left = random_weight(rows, 6, seed=3).double()
    for _ in range(300):
        hidden = torch.linalg.lstsq(left, y.T).solution.T  # what right @ x should be, [tokens, rank]
        right = torch.linalg.lstsq(x, hidden).solution.T
        left = torch.linalg.lstsq(x @ right.T, y).solution.T
    assert ours <= loss(weight, left @ right, x) * (1 + 1e-9)
    assert loss(weight, left @ right, x) == pytest.approx(ours, rel=1e-6)  # measured: 2e-16


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_on_correlated_inputs_it_loses_far_less_than_plain_svd(rows, columns):
    weight, x = random_weight(rows, columns), inputs(columns)
    left, right = svd(weight, Svd(ratio=0.8))
    ours = loss(weight, run(weight, second_moment(x), ratio=0.8), x)
    assert (ours / loss(weight, left @ right, x)) ** 0.5 < 0.35  # measured: 0.25, 0.16, 0.22


def test_with_white_inputs_it_is_plain_svd():
    weight = random_weight(24, 40)
    left, right = svd(weight, Svd(rank=8))
    made = run(weight, 3 * torch.eye(40), rank=8)
    assert float((made - left @ right).norm() / made.norm()) < 1e-10  # measured: 3e-15


def test_energy_counts_outputs_not_weights():
    weight, x = random_weight(40, 40), inputs(40)
    whitened = whitening(second_moment(x), **LADDER)
    few = svd_llm(weight, whitened, SvdLlm(energy=0.95))[0].shape[1]
    many = svd(weight, Svd(energy=0.95))[0].shape[1]
    kept = torch.linalg.svdvals(weight.double() @ whitened.factor).square().cumsum(0)
    assert kept[few - 1] >= 0.95 * kept[-1] > kept[few - 2]
    assert few < many / 2  # measured: 8 and 24


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_dead_columns_are_counted_and_change_nothing_about_the_loss_on_the_living(rows, columns):
    weight, x, dead = random_weight(rows, columns), inputs(columns), [0, 5, 23]
    x[:, dead] = 0
    alive = [column for column in range(columns) if column not in dead]
    whitened = whitening(second_moment(x), **LADDER)
    assert (whitened.dead, whitened.damping) == (3, 0.01)
    ours = loss(weight, run(weight, second_moment(x), rank=8), x)
    without = loss(weight[:, alive], run(weight[:, alive], second_moment(x[:, alive]), rank=8), x[:, alive])
    assert ours == pytest.approx(without, rel=0.01)  # measured: 7e-4


def test_where_nothing_was_ever_active_it_is_plain_svd():
    weight = random_weight(24, 40)
    whitened = whitening(torch.zeros(40, 40), **LADDER)
    left, right = svd(weight, Svd(rank=8))
    a, b = svd_llm(weight, whitened, SvdLlm(rank=8))
    assert whitened.dead == 40
    assert float((a @ b - left @ right).norm() / (a @ b).norm()) < 1e-10  # measured: 2e-15


def test_a_hessian_that_rounding_has_made_indefinite_climbs_the_ladder_by_roots_of_ten():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.2  # smallest eigenvalue -0.2
    whitened = whitening(hessian, **LADDER)
    assert whitened.damping == pytest.approx(0.01 * 10**1.5)
    damped = hessian.double() + whitened.damping * torch.eye(8, dtype=torch.float64)
    assert float((whitened.factor @ whitened.factor.T - damped).norm()) < 1e-12  # measured: 7e-16


def test_a_hessian_that_no_damping_mends_is_unsuitable():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 5.0
    with pytest.raises(UnsuitableError, match="damping up to 1 of its mean diagonal"):
        whitening(hessian, **LADDER)


def test_a_hessian_that_is_not_finite_is_unsuitable():
    hessian = torch.eye(8)
    hessian[3] = torch.inf
    with pytest.raises(UnsuitableError, match="overflowed"):
        whitening(hessian, **LADDER)


def test_weight_and_hessian_stay_as_they_were():
    weight, hessian = random_weight(8, 12).double(), second_moment(inputs(12))
    before = weight.clone(), hessian.clone()
    run(weight, hessian, rank=3)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
