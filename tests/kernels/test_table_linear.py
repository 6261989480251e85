"""The linear on packed indices into tables: every value against the definition, entry by entry, in plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.kernels.bitpack import pack
from modelzip.kernels.table_linear import Values, reference, table_linear, table_values

SHAPES = [(1, 1, 1), (1, 31, 33), (5, 7, 96), (3, 50, 64), (0, 4, 32)]
"""Tokens, rows and columns; rows on both sides of a slab of 20."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(rows: int, columns: int, *, bits: int, groups: int | None, offset: bool, own: bool) -> tuple[Tensor, Values]:
    """Indices [rows, columns] and what they stand for; own: a table a row."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    indices = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    table = drawn(rows if own else 1, 1 << bits, seed=1)
    scale = None if groups is None else drawn(rows, groups, seed=2)
    return indices, Values(table, scale, drawn(rows, groups or 1, seed=3) if offset else None)


def looked_up(indices: Tensor, values: Values) -> Tensor:
    """Each entry by itself, fp32."""
    table, scale, offset = values
    made = torch.empty(indices.shape)
    for row in range(indices.shape[0]):
        for column in range(indices.shape[1]):
            entry = table[0 if len(table) == 1 else row, indices[row, column]]
            if scale is not None:
                tile = row * len(scale) // len(indices), column * scale.shape[1] // indices.shape[1]
                entry = entry * scale[tile]
                entry = entry if offset is None else entry + offset[tile]
            made[row, column] = entry
    return made


FORMS = [
    (2, None, False, True),
    (4, 1, False, False),
    (3, 1, True, False),
    (8, 1, False, True),
    (5, None, False, False),
]


@pytest.mark.parametrize(("bits", "groups", "offset", "own"), FORMS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_entry_times_scale_plus_offset_rounded_once(bits, groups, offset, own, stored):
    for _, rows, columns in SHAPES:
        indices, values = given(rows, columns, bits=bits, groups=groups, offset=offset, own=own)
        made = table_values(indices.to(torch.uint8), values, dtype=stored)
        assert made.dtype == stored
        assert torch.equal(made, looked_up(indices, values).to(stored))


@pytest.mark.parametrize("groups", [2, 4])
def test_each_group_of_columns_has_its_own_scale_and_offset(groups):
    indices, values = given(6, 64, bits=4, groups=groups, offset=True, own=False)
    made = table_values(indices.to(torch.uint8), values, dtype=torch.float32)
    assert torch.equal(made, looked_up(indices, values))


@pytest.mark.parametrize(("bands", "groups"), [(3, 64), (1, 1), (1, 64), (2, 4), (6, 1)])
def test_a_scale_may_be_of_a_tile_of_rows_and_columns(bands, groups, monkeypatch):
    indices, values = given(6, 64, bits=4, groups=groups, offset=True, own=False)
    values = Values(values.table, values.scale[:bands], values.offset[:bands])
    made, truth = table_values(indices.to(torch.uint8), values, dtype=torch.float32), looked_up(indices, values)
    assert torch.equal(made, truth)
    chosen = torch.tensor([5, 0, 5, 2])
    assert torch.equal(table_values(indices[chosen], values.rows(chosen, 6), dtype=torch.float32), truth[chosen])
    monkeypatch.setattr(reference, "SLAB_ELEMENTS", 64)  # slabs of one row, or of as many as a scale takes
    x, packed = drawn(3, 64, seed=5), pack(indices.to(torch.uint8), 4)
    found = table_linear(x, packed, values, bits=4, columns=64, dtype=torch.float32)
    assert torch.allclose(found, x @ truth.T, atol=1e-5)


@pytest.mark.parametrize(("bits", "groups", "offset", "own"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_is_that_of_the_values(bits, groups, offset, own, dtype, distance, monkeypatch):
    for tokens, rows, columns in SHAPES:
        monkeypatch.setattr(reference, "SLAB_ELEMENTS", 20 * columns)
        indices, values = given(rows, columns, bits=bits, groups=groups, offset=offset, own=own)
        x = drawn(tokens, columns, seed=5).to(dtype)
        packed = pack(indices.to(torch.uint8), bits)
        found = table_linear(x, packed, values, bits=bits, columns=columns, dtype=dtype)
        assert found.dtype == dtype
        truth = x.double() @ looked_up(indices, values).to(dtype).double().T
        if tokens:
            assert max(distance(found, truth)) < (1e-6 if dtype == torch.float32 else 5e-3)  # measured: 1.8e-7, 3.9e-3
        else:
            assert found.shape == (0, rows)


def test_leading_dimensions_are_kept():
    indices, values = given(5, 64, bits=4, groups=2, offset=False, own=False)
    packed, x = pack(indices.to(torch.uint8), 4), drawn(2, 3, 64)
    options = {"bits": 4, "columns": 64, "dtype": torch.float32}
    flat = table_linear(x.reshape(6, 64), packed, values, **options)
    assert torch.allclose(table_linear(x, packed, values, **options), flat.reshape(2, 3, 5), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"columns": 32}, "x has 64 columns; the weight has 32"),
        ({"bits": 8}, r"packed \(5, 8\) and table \(1, 16\) don't fit 64 columns of 8 bits"),
        ({"values": Values(torch.zeros(1, 16), torch.ones(5, 3))}, r"scale \(5, 3\) doesn't fit 5 rows of 64 col"),
        ({"values": Values(torch.zeros(1, 16), torch.ones(2, 4))}, r"scale \(2, 4\) doesn't fit 5 rows of 64 col"),
        ({"values": Values(torch.zeros(1, 16), None, torch.ones(5, 1))}, r"offset \(5, 1\) has no scale of its shape"),
        (
            {"values": Values(torch.zeros(1, 16), torch.ones(5, 2), torch.ones(5, 1))},
            r"offset \(5, 1\) has no scale of its shape",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, told):
    indices, values = given(5, 64, bits=4, groups=2, offset=False, own=False)
    options = {"values": values, "bits": 4, "columns": 64, "dtype": torch.float32, **change}
    with pytest.raises(ValueError, match=told):
        table_linear(drawn(2, 64), pack(indices.to(torch.uint8), 4), **options)
