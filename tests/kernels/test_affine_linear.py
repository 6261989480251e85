"""x @ W.T from packed integers, against the dense product in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.kernels.affine_linear import affine_linear, reference
from modelzip.kernels.bitpack import pack

BITS = range(2, 9)
BOUNDS = {torch.float32: (3e-7, 8e-7), torch.bfloat16: (2.5e-3, 5e-3), torch.float16: (3e-4, 6e-4)}
"""Relative Frobenius norm and worst row of the error. Measured over all cases of this file: fp32 1.8e-7 and 4.1e-7,
bf16 1.9e-3 and 2.9e-3, fp16 2.4e-4 and 3.5e-4, which is the rounding of the output."""

SHAPES = [(1, 1, 1), (1, 33, 1), (7, 5, 5), (5, 96, 3), (33, 64, 2), (16, 70, 1), (3, 130, 13)]
"""Rows, columns, groups."""


class Case:
    """Random operands, and the dense matrix that they stand for, as the runtime multiplies it."""

    def __init__(self, rows: int, columns: int, *, groups: int, bits: int, symmetric: bool, scale_dtype: torch.dtype):
        generator = torch.Generator().manual_seed(rows * columns + bits)
        half = 1 << (bits - 1)
        scales = (1, 1) if groups == 0 else (rows, groups)
        codes = torch.randint(-half, half, (rows, columns), generator=generator)
        scale = (0.01 + torch.rand(scales, generator=generator)).to(scale_dtype)
        zero = torch.zeros(scales) if symmetric else torch.randint(-half, half, scales, generator=generator)
        width = columns // max(groups, 1)
        self.scale, self.zero_point = scale, None if symmetric else zero.to(torch.int8)
        self.packed, self.bits, self.columns = pack(codes + half, bits), bits, columns
        difference = codes - zero.repeat_interleave(width, dim=1)
        self.dense = difference.to(scale_dtype) * scale.repeat_interleave(width, dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        return affine_linear(
            x, self.packed, self.scale, zero_point=self.zero_point, bits=self.bits, columns=self.columns
        )

    def truth(self, x: Tensor) -> Tensor:
        return x.double() @ self.dense.to(x.dtype).double().T


def _check(case: Case, x: Tensor, distance) -> None:
    found = case(x)
    assert found.dtype == x.dtype
    assert found.shape == (*x.shape[:-1], case.packed.shape[0])
    whole, worst = distance(found, case.truth(x))
    assert whole < BOUNDS[x.dtype][0]
    assert worst < BOUNDS[x.dtype][1]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_it_is_the_product_with_the_dense_matrix_at_every_width_and_shape(bits, symmetric, distance):
    for rows, columns, groups in SHAPES:
        case = Case(rows, columns, groups=groups, bits=bits, symmetric=symmetric, scale_dtype=torch.float32)
        _check(case, torch.randn(9, columns, generator=torch.Generator().manual_seed(1)), distance)


@pytest.mark.parametrize("x_dtype", BOUNDS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [0, 1, 4], ids=["tensor", "channel", "group"])
def test_codes_are_scaled_in_the_scales_dtype_and_multiplied_in_that_of_x(groups, scale_dtype, x_dtype, distance):
    case = Case(19, 64, groups=groups, bits=4, symmetric=False, scale_dtype=scale_dtype)
    _check(case, torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).to(x_dtype), distance)


@pytest.mark.parametrize("batch", [(0,), (), (1,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_x_may_have_any_leading_dimensions(batch, distance):
    case = Case(11, 48, groups=3, bits=3, symmetric=False, scale_dtype=torch.float32)
    x = torch.randn(*batch, 48, generator=torch.Generator().manual_seed(3))
    if x.numel():
        _check(case, x, distance)
    else:
        assert case(x).shape == (*batch, 11)


@pytest.mark.parametrize("groups", [0, 1, 4], ids=["tensor", "channel", "group"])
@pytest.mark.parametrize("elements", [1, 63, 64, 65, 3 * 64, 7 * 64 + 1, 1 << 22])
def test_the_slab_size_makes_no_difference(elements, groups, distance, monkeypatch):
    case = Case(20, 64, groups=groups, bits=5, symmetric=False, scale_dtype=torch.bfloat16)
    monkeypatch.setattr(reference, "SLAB_ELEMENTS", elements)
    _check(case, torch.randn(4, 64, generator=torch.Generator().manual_seed(4)), distance)


def test_no_more_than_a_slab_is_dense_at_once(monkeypatch):
    case = Case(20, 64, groups=4, bits=4, symmetric=True, scale_dtype=torch.float32)
    unpacked = []

    def spy(words: Tensor, bits: int, columns: int) -> Tensor:
        unpacked.append(words.shape[0])
        return unpack(words, bits, columns)

    unpack = reference.unpack
    monkeypatch.setattr(reference, "unpack", spy)
    monkeypatch.setattr(reference, "SLAB_ELEMENTS", 3 * 64)
    case(torch.ones(1, 64))
    assert unpacked == [3, 3, 3, 3, 3, 3, 2]


def test_strided_x_is_read_as_it_looks(distance):
    case = Case(11, 48, groups=3, bits=4, symmetric=True, scale_dtype=torch.float32)
    wide = torch.randn(96, 10, generator=torch.Generator().manual_seed(5))
    _check(case, wide[::2].T, distance)


def test_shapes_that_do_not_fit_are_refused():
    case = Case(11, 48, groups=3, bits=4, symmetric=True, scale_dtype=torch.float32)
    with pytest.raises(ValueError, match="x has 47 columns; the weight has 48"):
        case(torch.ones(2, 47))
    with pytest.raises(ValueError, match="don't fit 96 columns of 4 bits"):
        affine_linear(torch.ones(2, 96), case.packed, case.scale, zero_point=None, bits=4, columns=96)
    with pytest.raises(ValueError, match=r"scale \(11, 5\) don't fit 48 columns"):
        affine_linear(torch.ones(2, 48), case.packed, torch.ones(11, 5), zero_point=None, bits=4, columns=48)
