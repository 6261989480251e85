"""The symmetric update: against xᵀx in fp64."""

from __future__ import annotations

import pytest
import torch

from modelzip.kernels.second_moment import add_second_moment

pytestmark = pytest.mark.usefixtures("moment_path")

WIDTHS = [1, 3, 4, 8, 23, 24, 25, 47, 48, 49, 127, 128, 129, 192, 200, 400]
TOKENS = [0, 1, 255, 256, 257, 1100]
"""On both sides of the compiled paths' tiles, blocks and depths, and of the reference's panels and slabs."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_adds_the_products_under_the_diagonal(width, dtype):
    generator = torch.Generator().manual_seed(width)
    for tokens in TOKENS:
        rows = (torch.randn(tokens, width, generator=generator) + 0.5).to(dtype)
        before = torch.randn(width, width, generator=generator)
        total = before.clone()
        add_second_moment(total, rows)
        exact = before.double() + rows.double().T @ rows.double()
        difference = (total.double() - exact).tril()
        assert float(difference.norm() / exact.tril().norm()) < 5e-6  # measured: 2.7e-6, at a width of 1
        assert float(difference.abs().max() / exact.abs().max()) < 5e-6  # measured: 2.7e-6


def test_rows_in_any_strides_stay_as_they_were():
    rows = torch.randn(70, 130)
    spread = rows.T.contiguous().T
    totals = torch.zeros(3, 130, 130)
    for total, given in zip(totals, (rows, spread, rows), strict=True):
        before = given.clone()
        add_second_moment(total, given)
        assert torch.equal(given, before)
    assert torch.equal(totals[0].tril(), totals[2].tril())
    assert torch.allclose(totals[0].tril(), totals[1].tril(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_change_the_result(threads, monkeypatch):
    rows = torch.randn(600, 250).bfloat16()
    wanted, found = torch.zeros(2, 250, 250)
    add_second_moment(wanted, rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    add_second_moment(found, rows)
    assert torch.equal(found.tril(), wanted.tril())


def test_what_is_not_finite_is_not_lost():
    rows = torch.ones(300, 60).bfloat16()
    rows[299, 7], rows[0, 50] = float("nan"), float("inf")
    total = torch.zeros(60, 60)
    add_second_moment(total, rows)
    lower = total.tril()
    assert lower[7, :8].isnan().all()
    assert lower[8:, 7].isnan().all()
    assert lower[50, 50] == float("inf")
    assert lower[6, :7].eq(300).all()


def test_shapes_and_types_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rows \(7, 3\) don't fit a total of \(4, 4\)"):
        add_second_moment(torch.zeros(4, 4), torch.ones(7, 3))
    with pytest.raises(ValueError, match="don't fit"):
        add_second_moment(torch.zeros(3, 3), torch.ones(2, 7, 3))
    with pytest.raises(ValueError, match=r"total must be contiguous fp32, not torch\.float64"):
        add_second_moment(torch.zeros(3, 3).double(), torch.ones(7, 3))
    with pytest.raises(ValueError, match=r"strides \(1, 3\)"):
        add_second_moment(torch.randn(3, 3).T, torch.ones(7, 3))
