"""The affine grid: its range, its clip search and its rounding, against brute force over all grid points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelzip.compressors.obs import inverse_factor
from modelzip.compressors.quantize import grid as grid_module
from modelzip.compressors.quantize.gptq import gptq
from modelzip.compressors.quantize.grid import AffineGrid, fit_grid
from modelzip.compressors.quantize.rtn import rtn

BOTH = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
SIZES = pytest.mark.parametrize("group", [16, 64, None], ids=["group", "channel", "tensor"])


def heavy_tailed(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Weights with a few that are much larger than the rest, so that clipping pays."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3


def fit(weight: Tensor, group: int | None, **changes) -> AffineGrid:
    options = {"bits": 4, "symmetric": True, "clip": "mse", "dtype": torch.float32}
    return fit_grid(weight, group_size=group, **{**options, **changes})


def values(grid: AffineGrid, codes: Tensor) -> Tensor:
    """What the codes [out, in] stand for, in fp64."""
    grouped = codes.double().reshape(codes.shape[0], grid.scale.shape[1], -1)
    return ((grouped - grid.zero_point.double()[..., None]) * grid.scale.double()[..., None]).reshape(codes.shape)


def group_errors(weight: Tensor, grid: AffineGrid, importance: Tensor | None = None) -> Tensor:
    """Squared rounding error of each scale's weights, fp64, [out, groups] ([1, 1] for one scale a tensor)."""
    squared = (weight.double() - values(grid, grid.nearest(weight))) ** 2
    squared = squared if importance is None else squared * importance.double()
    return squared.reshape(*grid.scale.shape, -1).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@BOTH
@SIZES
def test_the_clip_search_never_does_worse_than_the_full_range(bits, symmetric, group):
    weight = heavy_tailed(24, 64)
    searched, full = (
        group_errors(weight, fit(weight, group, bits=bits, symmetric=symmetric, clip=clip)) for clip in ("mse", "none")
    )
    assert (searched <= full * (1 + 1e-5)).all()
    assert bits == 8 or searched.sum() < full.sum()  # 8 bits are too many for clipping to pay at times


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@BOTH
@pytest.mark.parametrize("group", [16, 64], ids=["group", "channel"])
def test_the_weighted_clip_search_never_does_worse_in_the_weighted_error(bits, symmetric, group):
    weight = heavy_tailed(24, 64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4
    searched, full = (
        group_errors(
            weight, fit(weight, group, bits=bits, symmetric=symmetric, clip=clip, importance=importance), importance
        )
        for clip in ("mse", "none")
    )
    assert (searched <= full * (1 + 1e-5)).all()
    assert searched.sum() < full.sum()


@BOTH
def test_importance_decides_whether_an_outlier_is_clipped(symmetric):
    weight = 0.1 * torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 5] = 0.6
    precious = torch.full((64,), 1e-4)
    precious[5] = 1.0
    careless = torch.ones(64)
    careless[5] = 0.0
    options = {"bits": 3, "symmetric": symmetric}
    kept, clipped = (fit(weight, 64, importance=importance, **options) for importance in (precious, careless))
    assert kept.scale.abs() > clipped.scale.abs() * 1.5
    for importance, better, worse in ((precious, kept, clipped), (careless, clipped, kept)):
        assert group_errors(weight, better, importance) < group_errors(weight, worse, importance)


def test_even_importance_is_no_importance():
    weight = heavy_tailed(8, 64)
    plain, weighted = fit(weight, 16), fit(weight, 16, importance=torch.full((64,), 2.0))
    assert torch.equal(plain.scale, weighted.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@BOTH
@SIZES
def test_nearest_is_nearest_over_all_grid_points(bits, symmetric, group):
    weight = heavy_tailed(12, 64)
    grid = fit(weight, group, bits=bits, symmetric=symmetric)
    half = 1 << (bits - 1)
    everything = torch.stack([values(grid, torch.full_like(weight, code)) for code in range(-half, half)])
    least = (everything - weight.double()).abs().amin(0)
    ours = (values(grid, grid.nearest(weight)) - weight.double()).abs()
    assert float(((ours - least) / grid.scale.abs().max()).max()) < 1e-6  # measured: 0


def test_negative_scales_round_to_the_nearest_point_too():
    weight = torch.tensor([[0.81, -0.74, 0.1, -0.1]])
    grid = AffineGrid(torch.tensor([[-0.1]]), torch.zeros(1, 1), 4, True, torch.float32)
    assert grid.nearest(weight).tolist() == [[-8.0, 7.0, -1.0, 1.0]]
    assert torch.allclose(grid.weight(grid.nearest(weight)).dense(), torch.tensor([[0.8, -0.7, 0.1, -0.1]]))


def test_the_search_turns_the_grid_round_where_the_largest_weight_is_positive():
    weight = 0.3 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 1.6
    up, down = fit(weight, 32, bits=3), fit(-weight, 32, bits=3)
    assert up.scale < 0 < down.scale
    assert torch.equal(up.nearest(weight), down.nearest(-weight))
    assert up.nearest(weight)[0, 0] == -4


@BOTH
def test_there_is_a_scale_for_every_group_every_row_or_the_tensor(symmetric):
    weight = heavy_tailed(6, 64)
    for group, shape in ((16, (6, 4)), (64, (6, 1)), (1, (6, 64)), (None, (1, 1))):
        grid = fit(weight, group, symmetric=symmetric)
        assert grid.scale.shape == grid.zero_point.shape == shape
        assert grid.nearest(weight).shape == weight.shape


@BOTH
def test_a_groups_scale_depends_on_its_own_weights_only(symmetric):
    weight = heavy_tailed(6, 64)
    grid = fit(weight, 16, symmetric=symmetric)
    alone = fit(weight[2:3, 32:48].contiguous(), 16, symmetric=symmetric)
    assert torch.equal(grid.scale[2, 2], alone.scale[0, 0])
    assert torch.equal(grid.zero_point[2, 2], alone.zero_point[0, 0])


@BOTH
def test_a_tall_matrix_searched_in_slabs_gives_the_same_grid(symmetric, monkeypatch):
    weight = heavy_tailed(37, 64)
    whole = fit(weight, 16, symmetric=symmetric)
    monkeypatch.setattr(grid_module, "SLAB_ELEMENTS", 5 * 64)
    slabs = fit(weight, 16, symmetric=symmetric)
    assert torch.equal(whole.scale, slabs.scale)
    assert torch.equal(whole.zero_point, slabs.zero_point)


@SIZES
def test_columns_gives_every_column_the_scale_of_its_group(group):
    weight, index = heavy_tailed(6, 64), torch.tensor([63, 0, 16, 15, 40])
    grid = fit(weight, group, symmetric=False)
    scale, zero_point, _ = grid.columns(index, rows=6, in_features=64)
    size = 64 // grid.scale.shape[1]
    for place, column in enumerate(index.tolist()):
        assert torch.equal(scale[place], grid.scale[:, column // size].expand(6))
        assert torch.equal(zero_point[place], grid.zero_point[:, column // size].expand(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@BOTH
def test_scales_hold_values_of_the_stored_precision(symmetric, dtype):
    grid = fit(heavy_tailed(8, 64), 16, symmetric=symmetric, dtype=dtype)
    assert torch.equal(grid.scale, grid.scale.to(dtype).float())
    assert grid.weight(grid.nearest(heavy_tailed(8, 64))).scale.dtype == dtype


def test_the_full_range_of_an_asymmetric_grid_reaches_both_ends():
    weight = torch.linspace(-1, 2, 64)[None]
    grid = fit(weight, 64, symmetric=False, clip="none")
    codes = grid.nearest(weight)
    assert (codes.min(), codes.max()) == (-8, 7)
    assert float((weight - values(grid, codes)).abs().max()) <= 0.1001  # half a step of 3 / 15


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-4])
def test_rows_of_one_value_are_kept_by_an_asymmetric_grid(value):
    weight = torch.full((2, 32), value)
    grid = fit(weight, 32, symmetric=False, clip="none")
    assert torch.allclose(grid.weight(grid.nearest(weight)).dense(), weight, rtol=1e-6)


FINITE = st.floats(min_value=-1.0, max_value=1.0, width=32, allow_subnormal=False)


@st.composite
def awkward_weights(draw) -> Tensor:
    """[rows, 8] of a drawn magnitude, with rows of zeros, of one value, and with one huge outlier among them."""
    magnitude = draw(st.sampled_from([1e-30, 1e-8, 1e-6, 1e-2, 1.0, 1e3]))
    rows = [magnitude * torch.tensor(draw(st.lists(FINITE, min_size=8, max_size=8)))]
    for kind in draw(st.lists(st.sampled_from(["zero", "constant", "outlier"]), max_size=3)):
        row = torch.zeros(8) if kind == "zero" else torch.full((8,), magnitude * draw(FINITE))
        if kind == "outlier":
            row[draw(st.integers(0, 7))] = draw(st.sampled_from([-4e4, 4e4]))
        rows.append(row)
    return torch.stack(rows)


OPTIONS = st.fixed_dictionaries(
    {
        "bits": st.integers(2, 8),
        "symmetric": st.booleans(),
        "clip": st.sampled_from(["none", "mse"]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    }
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weight=awkward_weights(), group=st.sampled_from([2, 8, None]), options=OPTIONS)
def test_any_weights_get_a_usable_grid_and_codes_within_it(weight, group, options):
    grid = fit_grid(weight, group_size=group, **options)
    half = 1 << (options["bits"] - 1)
    assert torch.isfinite(grid.scale).all()
    assert (grid.scale != 0).all()
    assert torch.equal(grid.zero_point, grid.zero_point.round().clamp(-half, half - 1))
    codes = grid.nearest(weight)
    assert torch.equal(codes, codes.round().clamp(-half, half - 1))
    dense = rtn(weight, grid).dense()
    assert torch.isfinite(dense).all()
    assert (dense[(weight == 0).all(dim=1)] == 0).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(weight=awkward_weights(), group=st.sampled_from([2, 8, None]), options=OPTIONS, seed=st.integers(0, 9))
def test_gptq_stays_within_any_such_grid(weight, group, options, seed):
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
    factor = inverse_factor(x.T @ x / 20, damping=0.01, max_damping=1.0, order="activation")
    made = gptq(weight, factor, fit_grid(weight, group_size=group, **options), block_size=3)
    half = 1 << (options["bits"] - 1)
    assert int(made.codes().min()) >= -half
    assert int(made.codes().max()) < half
    assert torch.isfinite(made.dense()).all()


@pytest.mark.parametrize("magnitude", [6e-8, 5e-7, 1e-6])
@BOTH
def test_weights_too_small_for_an_fp16_scale_lose_at_most_themselves(symmetric, magnitude):
    weight = (magnitude * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))).half().float()
    made = rtn(weight, fit(weight, 32, symmetric=symmetric, dtype=torch.float16))
    assert (made.scale != 0).all()
    assert float((weight - made.dense()).norm() / weight.norm()) <= 1.0  # measured: 1.0, 0.10, 0.09
