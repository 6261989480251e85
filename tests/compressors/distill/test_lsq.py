"""Learned steps: the paper's gradients one by one, numerical derivatives, and the packed weight at the end."""

from __future__ import annotations

import math

import pytest
import torch

from modelzip.compressors.distill.lsq import LsqLinear, fake_quantize, lsq_start
from modelzip.compressors.quantize.grid import fit_grid
from modelzip.compressors.quantize.rtn import rtn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _fitted(weight, *, bits=4, group_size=None, symmetric=True, dtype=torch.float32):
    grid = fit_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric, clip="mse", dtype=dtype)
    return rtn(weight, grid)


def test_each_gradient_is_the_papers_formula():
    """3 bits: Qn = 4, Qp = 3; s = 0.5, so v = w / s is -6, -4, -1.2, 0.3, 2.6, 3, 8."""
    v = torch.tensor([[-6.0, -4.0, -1.2, 0.3, 2.6, 3.0, 8.0]])
    weight, step = (0.5 * v).requires_grad_(), torch.tensor([[0.5]], requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6]])
    value = fake_quantize(weight, step, None, bits=3, dtype=torch.float32)
    (value * upstream).sum().backward()
    assert torch.allclose(value, 0.5 * torch.tensor([[-4.0, -4.0, -1.0, 0.0, 3.0, 3.0, 3.0]]))
    inside = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    assert torch.equal(weight.grad, inside * upstream)
    of_step = torch.tensor([[-4.0, -4.0, -1 + 1.2, 0 - 0.3, 3 - 2.6, 3.0, 3.0]])
    assert float(step.grad) == pytest.approx(float((of_step * upstream).sum()) / math.sqrt(7 * 3), rel=1e-6)


def test_with_a_zero_point_the_clipped_weights_move_it():
    """2 bits: codes -2 ... 1; s = 0.5, z = -1: v = w / s + z is -3, -1.3, 0.4, 5."""
    v = torch.tensor([[-3.0, -1.3, 0.4, 5.0]])
    weight = (0.5 * (v + 1)).requires_grad_()
    step, zero = torch.tensor([[0.5]], requires_grad=True), torch.tensor([[-1.2]], requires_grad=True)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1e3]])
    value = fake_quantize(weight, step, zero, bits=2, dtype=torch.float32)
    (value * upstream).sum().backward()
    assert torch.allclose(value, 0.5 * (torch.tensor([[-2.0, -1.0, 0.0, 1.0]]) + 1))
    g = 1 / math.sqrt(4 * 1)
    assert torch.equal(weight.grad, torch.tensor([[0.0, 10.0, 100.0, 0.0]]))
    of_step = torch.tensor([[-2.0 + 1, -1 + 1.3, 0 - 0.4, 1.0 + 1]])
    assert float(step.grad) == pytest.approx(g * float((of_step * upstream).sum()), rel=1e-5)
    assert float(zero.grad) == pytest.approx(g * -0.5 * (1 + 1e3))


@pytest.mark.parametrize("symmetric", [True, False])
def test_where_weights_are_clipped_the_gradient_of_the_step_is_the_numerical_derivative(symmetric):
    """A clipped value is code times step, which has a derivative; a rounded one is learned straight through."""
    weight = 100 * _weight(3, 8).sign() + _weight(3, 8, seed=1)
    step = torch.rand(3, 2, generator=torch.Generator().manual_seed(2)) + 0.5
    zero = None if symmetric else torch.tensor([[1.0, -2.0]] * 3)
    step.requires_grad_()
    slope = _weight(3, 8, seed=3)

    def loss(step):
        return (fake_quantize(weight, step, zero, bits=3, dtype=torch.float32, rescale=False) * slope).sum()

    loss(step).backward()
    for place in [(0, 0), (1, 1), (2, 0)]:
        nudge = torch.zeros(3, 2)
        nudge[place] = 2**-6
        with torch.no_grad():
            numerical = (loss(step + nudge) - loss(step - nudge)) / 2**-5
        assert float(step.grad[place]) == pytest.approx(float(numerical), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32, 8])
def test_the_forward_pass_is_the_packed_weight_bit_for_bit(dtype, symmetric, group_size):
    weight = _weight(6, 32)
    start = _fitted(weight, group_size=group_size, symmetric=symmetric, dtype=dtype)
    linear = LsqLinear(weight, start)
    assert torch.equal(linear.rounded(), start.dense())  # what rounding to nearest gives, at the start
    with torch.no_grad():
        linear.step.mul_(1.037)
        linear.weight.add_(0.1)
        if linear.zero_point is not None:
            linear.zero_point.add_(0.7)
    frozen = linear.freeze()
    assert torch.equal(linear.rounded(), frozen.dense())
    assert not torch.equal(frozen.dense(), start.dense())
    assert frozen.scale.dtype == dtype
    assert (frozen.strategy, frozen.bits) == (start.strategy, start.bits)


def test_the_papers_start_is_twice_the_mean_over_the_root_of_qp():
    weight = torch.tensor([[1.0, -3.0, 0.5, 0.5]])
    start = lsq_start(weight, bits=3, group_size=2, dtype=torch.float32)
    assert torch.allclose(start.scale, torch.tensor([[4 / math.sqrt(3), 1 / math.sqrt(3)]]))
    assert start.codes().tolist() == [[0, -1, 1, 1]]


def test_training_finds_a_better_grid_than_rounding_to_nearest():
    weight, x = _weight(8, 16), _weight(64, 4, seed=1) @ _weight(4, 16, seed=2)  # correlated, as activations are
    start = _fitted(weight, bits=2)
    linear, truth = LsqLinear(weight, start), x @ weight.T
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (linear(x) - truth).square().mean().backward()
        optimizer.step()
    before, after = (float((x @ part.dense().T - truth).norm() / truth.norm()) for part in (start, linear.freeze()))
    assert before > 0.3  # measured: 0.318
    assert after < 0.6 * before  # measured: 0.145, 0.46 times as much


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_pruned_stays_exactly_zero_and_gets_no_gradient(symmetric):
    weight = _weight(4, 16) + 0.5
    kept = _weight(4, 16, seed=1) > 0
    linear = LsqLinear(weight, _fitted(weight * kept, symmetric=symmetric, group_size=8), kept=kept)
    linear(_weight(5, 16, seed=2)).square().sum().backward()
    assert not linear.weight.grad[~kept].any()
    assert linear.weight.grad[kept].any()
    with torch.no_grad():
        linear.weight.sub_(0.1 * linear.weight.grad + 0.3)
    frozen = linear.freeze()
    assert torch.equal(frozen.kept, kept)
    assert not linear.rounded()[~kept].any()
    assert torch.equal(linear.rounded(), frozen.dense())


def test_a_state_comes_back_from_a_checkpoint():
    weight = _weight(4, 16)
    start = _fitted(weight, symmetric=False)
    linear, again = (LsqLinear(weight, start, torch.zeros(4), kept=weight > 0) for _ in range(2))
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(1.1)
    again.load_state_dict(linear.state_dict())
    assert torch.equal(again.rounded(), linear.rounded())


def test_a_step_that_falls_to_zero_stays_usable():
    linear = LsqLinear(_weight(2, 4), _fitted(_weight(2, 4), dtype=torch.bfloat16))
    with torch.no_grad():
        linear.step.zero_()
    linear(torch.ones(1, 4)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in linear.parameters())
    assert torch.equal(linear.rounded(), linear.freeze().dense())
