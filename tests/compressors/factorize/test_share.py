"""Shared weights held against an independent least-squares solver on the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.compressors.factorize.share import LeastSquares, average, runs
from modelzip.compressors.layer import UnsuitableError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(count: int = 3, rows: int = 6, columns: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Weights [out, in] and inputs [tokens, in]; each layer's inputs at other volumes, fp64."""
    return [
        (
            draw(rows, columns, seed=layer).double(),
            (draw(50, columns, seed=10 + layer) * draw(columns, seed=20 + layer).exp()).double(),
        )
        for layer in range(count)
    ]


def moments(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(weight, x.T @ x / len(x)) for weight, x in pairs]


def loss(shared: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> float:
    return sum(float(((shared.double() - weight) @ x.T).square().sum()) for weight, x in pairs)


def least_squares(stats: list[tuple[torch.Tensor, torch.Tensor]], *, damping: float) -> torch.Tensor:
    fit = LeastSquares()
    for weight, hessian in stats:
        fit.add(weight, hessian)
    return fit.solve(damping=damping)


def test_the_fit_is_what_lstsq_finds_on_all_layers_inputs_and_outputs():
    pairs = layers()
    shared = least_squares(moments(pairs), damping=1e-12)
    x = torch.cat([x for _, x in pairs])
    y = torch.cat([x @ weight.T for weight, x in pairs])
    truth = torch.linalg.lstsq(x, y).solution.T
    assert float((shared.double() - truth).norm() / truth.norm()) < 1e-6  # measured: 2e-8, the rounding to fp32


def test_with_damping_it_is_what_lstsq_finds_when_the_mean_is_one_more_wish():
    pairs = layers()
    stats = moments(pairs)
    shared = least_squares(stats, damping=0.3)
    mean = torch.stack([weight for weight, _ in pairs]).mean(0)
    level = 0.3 * torch.stack([hessian for _, hessian in stats]).sum(0).diagonal().mean()
    x = torch.cat([*(x / len(x) ** 0.5 for _, x in pairs), level.sqrt() * torch.eye(8).double()])
    y = torch.cat([*(x @ weight.T / len(x) ** 0.5 for weight, x in pairs), level.sqrt() * mean.T])
    truth = torch.linalg.lstsq(x, y).solution.T
    assert float((shared.double() - truth).norm() / truth.norm()) < 1e-6  # measured: 3e-8, the rounding to fp32


def test_it_loses_less_than_the_average():
    pairs = layers()
    ratio = loss(least_squares(moments(pairs), damping=0.01), pairs) / loss(average(w for w, _ in pairs), pairs)
    assert ratio < 0.5  # measured: 0.35


def test_where_no_input_ever_is_the_shared_weight_is_the_average():
    pairs = layers()
    for _, x in pairs:
        x[:, 3] = 0
    mean = average(weight for weight, _ in pairs)
    shared = least_squares(moments(pairs), damping=0.01)
    assert torch.allclose(shared[:, 3], mean[:, 3], atol=1e-6)
    nothing = least_squares([(weight, torch.zeros(8, 8)) for weight, _ in pairs], damping=0.01)
    assert torch.allclose(nothing, mean, atol=1e-6)


def test_layers_with_one_weight_share_it():
    weight = draw(6, 8)
    shared = least_squares([(weight, hessian) for _, hessian in moments(layers())], damping=0.01)
    assert torch.allclose(shared, weight, atol=1e-5)
    assert torch.equal(average([weight, weight]), weight)


def test_the_average_is_taken_in_more_than_the_weights_precision():
    thirds = [torch.full((2,), value).to(torch.bfloat16) for value in (1.0, 1.0, 1.0078125)]
    assert float(average(thirds)[0]) == pytest.approx(1.00260416, abs=1e-7)


def test_weights_and_hessians_stay_as_they_were():
    stats = moments(layers())
    before = [(weight.clone(), hessian.clone()) for weight, hessian in stats]
    least_squares(stats, damping=0.01)
    average(weight for weight, _ in stats)
    assert all(torch.equal(a, b) for old, new in zip(before, stats, strict=True) for a, b in zip(old, new, strict=True))


def test_a_hessian_that_is_not_finite_is_unsuitable():
    weight, hessian = moments(layers(1))[0]
    hessian[0, 0] = torch.nan
    with pytest.raises(UnsuitableError, match="overflowed"):
        least_squares([(weight, hessian)], damping=0.01)


@pytest.mark.parametrize(
    ("layer_count", "groups", "expected"),
    [(6, 1, [[0, 1, 2, 3, 4, 5]]), (6, 3, [[0, 1], [2, 3], [4, 5]]), (7, 3, [[0, 1, 2], [3, 4], [5, 6]])],
)
def test_runs_are_neighbours_and_as_equal_as_can_be(layer_count, groups, expected):
    assert [list(run) for run in runs(layer_count, groups)] == expected
