"""LLM.int8(): the formula of the paper and of the authors' library, written out."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from modelzip.compressors.quantize.llm_int8 import by_rows
from modelzip.compressors.quantize.settings_llm_int8 import LlmInt8
from modelzip.weights.inputs import OutlierRounding
from modelzip.weights.int8 import Int8
from modelzip.weights.kinds import empty, from_tensors


def _case(dtype=torch.float32):
    """A weight [12, 32] and inputs [2, 5, 32] of which columns 3 and 17 hold a value over 6, 20 one just below."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 32, generator=draw)
    x = torch.randn(2, 5, 32, generator=draw).clamp(-4, 4)
    x[0, 1, 3], x[1, 4, 17], x[0, 0, 20] = 40.0, -25.0, 5.9
    return weight, x.to(dtype)


def _by_hand(weight, x, threshold):
    """Row by row and token by token: absmax vector-wise quantization to ±127 of what isn't in an outlier column, the
    outlier columns in floats with the dequantized columns of the weight."""
    rows, tokens = weight.double(), x.reshape(-1, x.shape[-1]).double()
    codes = torch.stack([torch.round(row * (127 / row.abs().max())) for row in rows])
    absmax = rows.abs().amax(1)
    outliers = [column for column in range(x.shape[-1]) if any(abs(token[column]) >= threshold for token in tokens)]
    made = torch.zeros(len(tokens), len(rows), dtype=torch.float64)
    for number, token in enumerate(tokens):
        kept = token.clone()
        kept[outliers] = 0
        largest = kept.abs().max()
        whole = torch.round(kept * (127 / largest)) @ codes.T
        made[number] = (
            whole * largest * absmax / 127**2 + token[outliers] @ (codes * absmax[:, None] / 127)[:, outliers].T
        )
    return made.reshape(*x.shape[:-1], len(rows)), outliers


@pytest.mark.parametrize("threshold", [6.0, 100.0])
def test_the_product_is_that_of_the_formula(threshold):
    weight, x = _case()
    wanted, outliers = _by_hand(weight, x, threshold)
    assert outliers == ([3, 17] if threshold == 6 else [])
    made = Int8(*by_rows(weight, torch.float32), OutlierRounding(threshold))
    assert made.inputs.exact(x).tolist() == outliers
    assert torch.allclose(made.matmul(x).double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.allclose(made.round_inputs(x) @ made.dense().T, made.matmul(x), rtol=1e-5, atol=1e-4)


def test_with_outliers_it_is_nearer_to_the_exact_product_than_rounding_all_columns():
    """Relative errors against x Wᵀ, where rounded weights have their share, and against x Ŵᵀ. Measured: 0.0059 mixed
    and 0.0080 plain, 0.0023 and 0.0083; without outliers both are the same."""
    weight, x = _case()
    mixed, plain = (Int8(*by_rows(weight, torch.float32), OutlierRounding(limit)) for limit in (6.0, 1e9))
    for wanted, share in ((x @ weight.T, 0.85), (x @ mixed.dense().T, 0.4)):
        one, other = (float((made.matmul(x) - wanted).norm() / wanted.norm()) for made in (mixed, plain))
        assert one < share * other
    calm = x.clamp(-4, 4)
    assert torch.equal(mixed.matmul(calm), plain.matmul(calm))
    assert not torch.equal(mixed.matmul(x), plain.matmul(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_nearest_and_symmetric(dtype):
    weight, _ = _case()
    codes, scale = by_rows(weight, dtype)
    assert scale.dtype == dtype
    assert int(codes.min()) >= -127
    possible = torch.arange(-127, 128) * scale.float()[:, :, None]
    assert torch.equal((weight[:, :, None] - possible).abs().amin(-1), (weight - codes * scale.float()).abs())
    assert int(codes.abs().amax(1).min()) == 127


def test_rows_and_inputs_of_zeros_stay_zeros():
    made = Int8(*by_rows(torch.zeros(3, 8), torch.float32), OutlierRounding(6.0))
    assert torch.equal(made.matmul(torch.ones(2, 8)), torch.zeros(2, 3))
    assert torch.equal(made.round_inputs(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_it_is_read_back_bit_for_bit():
    weight, x = _case()
    made = Int8(*by_rows(weight, torch.bfloat16), OutlierRounding(6.0))
    again = from_tensors(made.tensors(), json.loads(json.dumps(made.meta())))
    assert torch.equal(again.matmul(x), made.matmul(x))
    assert empty(made.meta()).nbytes == made.nbytes == 12 * 32 + 12 * 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"threshold": 0}, "greater than 0"),
        ({"layout": "compressed-tensors"}, "needs modelzip's layout"),
        ({"embeddings": True}, "rounds no embeddings"),
        ({"bits": 4}, "bits"),
    ],
)
def test_what_it_does_not_do_is_refused(settings, told):
    with pytest.raises(ValidationError, match=told):
        LlmInt8(**settings)
