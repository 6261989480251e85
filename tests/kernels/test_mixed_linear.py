"""The linear in fp32 between activations in fewer bits: against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.kernels.mixed_linear import cpu, mixed_linear

pytestmark = pytest.mark.usefixtures("product_path")

TOKENS, IN, OUT = [0, 1, 3, 48, 53, 600], [1, 7, 191, 192, 200, 577], [1, 23, 24, 25, 50]
"""On both sides of the compiled path's tiles, strips and depths, and of the reference's slabs of tokens."""

SUMMING = 4
"""Most that summing in fp32 may miss, in fp32's epsilons times the sizes of the two rows. Measured: 1.6."""


def given(tokens: int, width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + width + out)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    return x, torch.randn(out, width, generator=generator), torch.randn(out, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out", OUT)
@pytest.mark.parametrize("width", IN)
def test_it_is_the_linear_rounded_once(width, out, dtype):
    for tokens in TOKENS:
        x, weight, bias = given(tokens, width, out, dtype)
        for shift in (None, bias):
            found = mixed_linear(x, weight, shift)
            exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
            assert found.dtype == dtype
            assert found.shape == (tokens, out)
            sizes = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1) + (0 if shift is None else 4)
            summing = SUMMING * torch.finfo(torch.float32).eps * sizes
            rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + summing) + torch.finfo(dtype).smallest_normal
            assert bool(((found.double() - exact).abs() <= summing + rounding).all())


def test_leading_dimensions_and_strides_are_kept_apart():
    x, weight, bias = given(60, 40, 30, torch.bfloat16)
    wanted = mixed_linear(x, weight, bias)
    assert torch.equal(mixed_linear(x.view(3, 20, 40), weight, bias), wanted.view(3, 20, 30))
    assert torch.equal(mixed_linear(x.T.contiguous().T, weight, bias), wanted)
    assert torch.equal(mixed_linear(x, weight.T.contiguous().T, bias), wanted)
    wide = torch.cat([bias[:, None]] * 2, 1)[:, 0]
    assert torch.equal(mixed_linear(x[::2], weight[1::3], wide[1::3]), wanted[::2, 1::3])


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_change_the_result(threads, monkeypatch):
    x, weight, bias = given(200, 300, 70, torch.bfloat16)
    wanted = mixed_linear(x, weight, bias)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(mixed_linear(x, weight, bias), wanted)


@pytest.mark.parametrize("span", [1, 10_000, 20_000])
def test_spans_of_the_outputs_do_not_change_the_result(span, monkeypatch):
    x, weight, bias = given(70, 100, 70, torch.bfloat16)  # three panels of 24 * 100 * 4 bytes
    wanted = mixed_linear(x, weight, bias)
    monkeypatch.setattr(cpu, "SPAN_BYTES", span)
    assert torch.equal(mixed_linear(x, weight, bias), wanted)


def test_values_that_are_not_finite_reach_what_they_should():
    x, weight, _ = given(6, 9, 5, torch.bfloat16)
    x[1, 2], x[3, 4] = float("nan"), float("inf")
    found = mixed_linear(x, weight)
    assert bool(found[1].isnan().all())
    assert torch.equal(found[3].float(), torch.full((5,), float("inf")) * weight[:, 4].sign())
    assert bool(found[[0, 2, 4, 5]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_nan_of_any_bits_stays_one_when_it_is_rounded(dtype):
    x, weight, _ = given(6, 9, 5, dtype)
    weight.view(torch.int32)[2, 3] = 0x7FFFFFFF  # half a bf16 step more would be -0
    found = mixed_linear(x, weight)
    assert bool(found[:, 2].isnan().all())
    assert bool(found[:, [0, 1, 3, 4]].isfinite().all())


def test_shapes_and_types_that_do_not_fit_are_refused():
    x, weight, bias = given(6, 9, 5, torch.bfloat16)
    with pytest.raises(ValueError, match=r"inputs \(6, 8\) and bias don't fit a weight of \(5, 9\)"):
        mixed_linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="don't fit"):
        mixed_linear(x, weight, bias[1:])
    with pytest.raises(ValueError, match="must be fp32"):
        mixed_linear(x, weight.bfloat16())
