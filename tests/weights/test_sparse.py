"""Sparse weights: what is kept, what is zero, and what it costs."""

from __future__ import annotations

import itertools

import pytest
import torch

from modelzip.weights.affine import Affine
from modelzip.weights.layouts import Scheme
from modelzip.weights.sparse import Sparse

PATTERNS = [None, (2, 4), (4, 8), (1, 4), (3, 6)]


def _mask(shape, pattern, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if pattern is None:
        return torch.rand(shape, generator=generator) < 0.3
    n, m = pattern
    return torch.rand(shape[0], shape[1] // m, m, generator=generator).argsort(-1).lt(n).reshape(shape)


def _random(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(5, 24), (1, 48), (16, 120)])
def test_kept_entries_are_the_matrixs_and_all_others_zero(pattern, shape):
    weight, kept = _random(shape), _mask(shape, pattern)
    sparse = Sparse.of_dense(weight, kept, pattern=pattern, dtype=torch.float32)
    assert torch.equal(sparse.dense(), torch.where(kept, weight, 0.0))
    assert torch.equal(sparse.kept, kept)


def test_columns_need_not_fill_bytes():
    for columns in (1, 7, 9, 33):
        weight, kept = _random((3, columns)), _mask((3, columns), None)
        sparse = Sparse.of_dense(weight, kept, dtype=torch.float32)
        assert torch.equal(sparse.dense(), torch.where(kept, weight, 0.0))
    weight, kept = _random((3, 12)), _mask((3, 12), (2, 4))
    sparse = Sparse.of_dense(weight, kept, pattern=(2, 4), dtype=torch.float32)
    assert tuple(sparse.positions.shape) == (3, 2)
    assert torch.equal(sparse.dense(), torch.where(kept, weight, 0.0))


def test_every_choice_of_at_most_two_in_four_is_held():
    choices = [c for count in range(3) for c in itertools.combinations(range(4), count)]
    kept = torch.zeros(len(choices), 4, dtype=torch.bool)
    for row, choice in enumerate(choices):
        kept[row, list(choice)] = True
    weight = _random(tuple(kept.shape))
    sparse = Sparse.of_dense(weight, kept, pattern=(2, 4), dtype=torch.float32)
    assert torch.equal(sparse.dense(), torch.where(kept, weight, 0.0))
    assert (sparse.kept.sum(-1) == 2).all()
    assert (sparse.kept | ~kept).all()


def test_the_metadata_of_2_to_4_is_two_2_bit_indices_a_group_the_lower_one_first():
    kept = torch.tensor([[False, True, False, True, True, True, False, False]])
    weight = torch.arange(8.0).reshape(1, 8) + 1
    sparse = Sparse.of_dense(weight, kept, pattern=(2, 4), dtype=torch.float32)
    assert sparse.values.tolist() == [[2, 4, 5, 6]]
    assert sparse.positions.tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4]]


def test_the_mask_has_one_bit_a_column_the_first_one_lowest():
    kept = torch.tensor([[True, False, False, True, False, False, False, False, True]])
    assert Sparse.of_dense(torch.ones(1, 9), kept, dtype=torch.float32).positions.tolist() == [[9, 1]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_kept_entry_that_happens_to_be_zero_stays_kept(pattern):
    kept = _mask((4, 24), pattern)
    sparse = Sparse.of_dense(torch.zeros(4, 24), kept, pattern=pattern, dtype=torch.float32)
    assert torch.equal(sparse.kept, kept)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "size"), [("group", 8), ("channel", None), ("tensor", None)])
def test_kept_codes_are_the_affine_weights_to_the_bit(pattern, symmetric, strategy, size, random_weight):
    for bits, dtype in ((3, torch.bfloat16), (4, torch.float16), (8, torch.float32)):
        affine = random_weight((6, 48), Scheme(bits, strategy, size, symmetric), dtype)
        kept = _mask((6, 48), pattern)
        sparse = Sparse.of_affine(affine, kept, pattern=pattern)
        assert torch.equal(sparse.dense()[kept], affine.dense()[kept])
        assert (sparse.dense()[~kept] == 0).all()


def test_codes_that_fill_up_stand_for_zero(random_weight):
    affine = random_weight((6, 48), Scheme(4, "group", 8, False))
    kept = _mask((6, 48), (1, 4))
    sparse = Sparse.of_affine(affine, kept, pattern=(2, 4))
    assert int(sparse.kept.sum()) == 6 * 24
    assert torch.equal(sparse.dense(), torch.where(kept, affine.dense(), 0.0))


def test_it_is_as_small_as_it_says():
    """Of 1,024 columns: a half in bf16, and one bit an entry; of 2:4 as well, two indices of 2 bits for each four."""
    weight = _random((256, 1024))
    for pattern in ((2, 4), (4, 8)):
        sparse = Sparse.of_dense(weight, _mask((256, 1024), pattern), pattern=pattern, dtype=torch.bfloat16)
        assert sparse.nbytes == 256 * 512 * 2 + 256 * 128
    affine = Affine.from_codes(torch.zeros(256, 1024), torch.ones(256, 8, dtype=torch.bfloat16), None, bits=4)
    packed = Sparse.of_affine(affine, _mask((256, 1024), (4, 8)), pattern=(4, 8))
    assert packed.nbytes == 256 * 512 // 2 + 256 * 128 + 256 * 8 * 2
    assert packed.nbytes < affine.nbytes


def test_a_mask_that_breaks_its_pattern_is_refused(random_weight):
    with pytest.raises(ValueError, match="keeps 4 entries; the pattern is 2:4"):
        Sparse.of_dense(torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool), pattern=(2, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match="6 columns can't be split into groups of 4"):
        Sparse.of_dense(torch.ones(2, 6), torch.zeros(2, 6, dtype=torch.bool), pattern=(2, 4), dtype=torch.float32)


def test_nothing_kept_is_a_matrix_of_zeros():
    sparse = Sparse.of_dense(torch.ones(3, 8), torch.zeros(3, 8, dtype=torch.bool), dtype=torch.float32)
    assert torch.equal(sparse.dense(), torch.zeros(3, 8))
    assert Sparse.empty(sparse.meta()).nbytes == sparse.nbytes == 3
