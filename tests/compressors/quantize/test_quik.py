"""QUIK: its loop and its product written out, and what outliers cost without it."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from modelzip.compressors.obs import inverse_factor
from modelzip.compressors.quantize.gptq import gptq
from modelzip.compressors.quantize.grid import fit_grid
from modelzip.compressors.quantize.quik import quik, split
from modelzip.compressors.quantize.settings_quik import Quik
from modelzip.weights.kinds import empty, from_tensors
from modelzip.weights.mixed_columns import ColumnRounding
from modelzip.weights.trainable import holds_codes

ROWS, WIDTH, COUNT = 24, 40, 5
FACTOR = {"damping": 0.01, "max_damping": 1.0, "order": "activation"}


@pytest.fixture(scope="module")
def case():
    """A weight, inputs [300, in] that hang together, five columns 30 times as large, and what is known of them."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=draw)
    x = torch.randn(300, WIDTH, generator=draw) @ (torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=draw))
    large = torch.tensor([3, 11, 12, 30, 39])
    x[:, large] *= 30
    return weight, x, (x.double().T @ x.double() / len(x)).float(), x.abs().amax(0), large


def _made(case, bits=4, **changed):
    weight, _, hessian, largest, _ = case
    parts = split(hessian, largest, count=changed.pop("count", COUNT), **FACTOR)
    return quik(weight, parts, **{"bits": bits, "input_bits": bits, "clip": "mse", "dtype": torch.float32, **changed})


def test_the_columns_of_the_largest_inputs_stay_exact(case):
    _, _, hessian, largest, large = case
    assert torch.equal(split(hessian, largest, count=COUNT, **FACTOR).columns, large)
    one = largest.clone()
    one[7] = 1e6
    assert 7 in split(hessian, one, count=1, **FACTOR).columns


def test_it_is_gptq_on_permuted_columns_with_the_exact_ones_last(case):
    """Column by column in double precision, as the authors' code has it: the exact columns take part in all updates and
    are never rounded. Measured: the same codes; exact columns to 6e-7 of the largest."""
    weight, _, hessian, _, large = case
    made = _made(case)
    others = torch.tensor([column for column in range(WIDTH) if column not in large])
    diagonal = hessian.diagonal()
    order = torch.cat([others[diagonal[others].argsort(descending=True, stable=True)], large])
    damped = hessian.double() + 0.01 * diagonal.double().mean() * torch.eye(WIDTH, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left, scale = weight.double()[:, order].clone(), made.inner.scale.double()
    for place in range(WIDTH - COUNT):
        value = left[:, place].clone()
        rounded = (value / scale[:, 0]).round().clamp(-8, 7) * scale[:, 0]
        error = (value - rounded) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
        left[:, place] = rounded
    wanted = torch.empty_like(left)
    wanted[:, order] = left
    assert torch.equal(made.inner.dense(torch.float64), wanted[:, others].float().double())
    assert torch.allclose(made.exact.double(), wanted[:, large], rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert float((made.exact - weight[:, large]).norm()) > 0.001  # they have moved


def test_with_no_exact_columns_it_is_gptq(case):
    weight, _, hessian, _, _ = case
    factor = inverse_factor(hessian, **FACTOR)
    grid = fit_grid(
        weight,
        bits=4,
        group_size=WIDTH,
        symmetric=True,
        clip="mse",
        dtype=torch.float32,
        importance=factor.importance(),
    )
    assert torch.equal(_made(case, count=0).inner.codes(), gptq(weight, factor, grid).codes())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_product_is_that_of_the_papers_formula(case, bits):
    """Token by token: a scale and a whole zero point over the other columns, exact columns as they are."""
    _, x, _, _, large = case
    made, dense = _made(case, bits), _made(case, bits).dense(torch.float64)
    top = 2**bits - 1
    for token in x[:20]:
        others = [column for column in range(WIDTH) if column not in large]
        rest = token[others].double()
        low, high = min(0.0, float(rest.min())), max(0.0, float(rest.max()))
        scale = (high - low) / top
        zero = round(-low / scale)
        codes = [min(max(round(float(value) / scale) + zero, 0), top) for value in rest]
        given = token.double().clone()
        given[others] = torch.tensor([(code - zero) * scale for code in codes], dtype=torch.float64)
        assert torch.allclose(made.matmul(token).double(), dense @ given, rtol=1e-5, atol=1e-4)
        assert torch.allclose(made.round_inputs(token).double(), given, rtol=1e-5, atol=1e-5)


def test_with_large_inputs_it_loses_far_less_than_rounding_them_to_4_bits(case):
    """Relative error of the output. Measured: 0.0103; 0.116 with no exact columns, 0.110 with those of small inputs."""
    weight, x, hessian, largest, _ = case
    wanted = x @ weight.T
    chance = torch.rand(WIDTH, generator=torch.Generator().manual_seed(5))
    chance[largest > 20] = 0
    errors = {
        "quik": _made(case),
        "plain": _made(case, count=0),
        "chance": quik(
            weight, split(hessian, chance, count=COUNT, **FACTOR), bits=4, input_bits=4, clip="mse", dtype=torch.float32
        ),
    }
    errors = {name: float((made.matmul(x) - wanted).norm() / wanted.norm()) for name, made in errors.items()}
    assert errors["quik"] < 0.15 * errors["plain"]
    assert errors["quik"] < 0.15 * errors["chance"]


def test_errors_flow_into_the_exact_columns(case):
    """Relative error of the output with inputs as they are, so that only weights count. Measured: 0.0134 and 0.0148."""
    weight, x, _, _, large = case
    made = _made(case, 3)
    still = made.dense()
    still[:, large] = weight[:, large]
    wanted = x @ weight.T
    fed, unfed = (float((x @ dense.T - wanted).norm() / wanted.norm()) for dense in (made.dense(), still))
    assert fed < 0.95 * unfed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, COUNT])
def test_it_is_read_back_bit_for_bit_and_every_part_is_counted(case, dtype, count):
    made = _made(case, dtype=dtype, count=count)
    meta = json.loads(json.dumps(made.meta()))
    again = from_tensors(made.tensors(), meta)
    x = case[1].to(dtype)
    assert torch.equal(again.matmul(x), made.matmul(x))
    assert again.meta() == made.meta() == empty(meta).meta()
    words = -(-(WIDTH - count) * 4 // 32) * 4
    counted = ROWS * (words + dtype.itemsize + count * dtype.itemsize) + 4 * count + 16
    assert empty(meta).nbytes == made.nbytes == counted
    assert made.shape == (ROWS, WIDTH)
    assert torch.equal(made.rows(torch.tensor([[3, 1]])), made.dense()[torch.tensor([[3, 1]])])
    assert all(name.startswith("weight") and "." not in name for name in made.tensors())
    assert holds_codes(made)


def test_tokens_of_zeros_and_of_one_sign_keep_their_zero():
    way = ColumnRounding(4, torch.tensor([1], dtype=torch.int32))
    assert torch.equal(way.rounded(torch.zeros(2, 4)), torch.zeros(2, 4))
    x = torch.tensor([[15.0, 1000.0, 3.0, 0.0], [-15.0, 1000.0, -4.0, 0.0]])
    assert torch.equal(way.rounded(x), x)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"outliers": 0.6}, "less than or equal to 0.5"),
        ({"layout": "compressed-tensors"}, "needs modelzip's layout"),
        ({"embeddings": True}, "rounds no embeddings"),
        ({"bits": 16}, "bits"),
        ({"activation_bits": 1}, "activation_bits"),
        ({"group_size": 64}, "group_size"),
    ],
)
def test_what_it_does_not_do_is_refused(settings, told):
    with pytest.raises(ValidationError, match=told):
        Quik(**settings)
