"""Random, magnitude and Wanda: which weights go, by independent truths; all pruners ranked on correlated inputs."""

from __future__ import annotations

import itertools

import pytest
import torch

from modelzip.compressors import PRUNE
from modelzip.compressors.methods import FALLBACK, METHODS
from modelzip.compressors.prune.settings import Magnitude, Random, SparseGpt, Wanda
from modelzip.weights.dense import Dense
from modelzip.weights.sparse import Sparse

METHOD_NAMES = tuple(name for name, settings in PRUNE.items() if settings in METHODS)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4", "4:8"])
def test_on_correlated_inputs_sparsegpt_beats_wanda_beats_magnitude_beats_random(sparsity, problem, compress, lost):
    weight, hessian = problem(64, 128)
    settings = [cls(sparsity=sparsity) for cls in (SparseGpt, Wanda, Magnitude, Random)]
    errors = [lost(weight, compress(weight, hessian, one), hessian) for one in settings]
    ratios = [better / worse for better, worse in itertools.pairwise(errors)]
    assert ratios[0] < 0.9  # measured: 0.84, 0.88, 0.83, 0.84
    assert ratios[1] < 0.75  # measured: 0.64, 0.66, 0.68, 0.64
    assert ratios[2] < 0.65  # measured: 0.36, 0.56, 0.53, 0.46


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_share_is_kept_to_the_entry_and_expected_so(method, bits, problem, compress):
    weight, hessian = problem(33, 96)
    for sparsity in (0.1, 0.5, 0.9):
        settings = PRUNE[method](sparsity=sparsity, bits=bits, group_size=32)
        made = compress(weight, hessian, settings, dtype=torch.bfloat16)
        wanted = 33 * (96 - round(sparsity * 96)) if method == "wanda" else 33 * 96 - round(sparsity * 33 * 96)
        assert int(made.kept.sum()) == wanted
        assert (made.dense()[~made.kept] == 0).all()
        expected = METHODS[type(settings)].expect(Dense(weight), settings, torch.bfloat16)
        assert expected.meta() == made.meta()
        assert expected.nbytes == made.nbytes


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("sparsity", ["2:4", "4:8"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_group_of_a_pattern_keeps_its_number(method, sparsity, bits, problem, compress):
    weight, hessian = problem(33, 96)
    settings = PRUNE[method](sparsity=sparsity, bits=bits, group_size="channel")
    made = compress(weight, hessian, settings)
    most, wide = settings.pattern
    assert (made.kept.reshape(-1, wide).sum(1) == most).all()
    assert made.pattern == (most, wide)
    expected = METHODS[type(settings)].expect(Dense(weight), settings, torch.float32)
    assert (expected.meta(), expected.nbytes) == (made.meta(), made.nbytes)


def test_magnitude_keeps_the_largest_unchanged(problem, compress):
    weight, hessian = problem(16, 32)
    made = compress(weight, hessian, Magnitude(sparsity=0.25)).dense()
    threshold = weight.abs().flatten().sort().values[16 * 32 // 4]
    assert torch.equal(made, torch.where(weight.abs() >= threshold, weight, 0.0))


def test_wanda_compares_size_times_input_norm_in_each_row(problem, compress):
    weight, hessian = problem(16, 32)
    made = compress(weight, hessian, Wanda(sparsity=0.5)).dense()
    for row, found in zip(weight, made, strict=True):
        scores = row.abs() * hessian.diagonal().sqrt()
        keep = set(scores.argsort(descending=True)[:16].tolist())
        assert torch.equal(found, torch.tensor([float(w) if i in keep else 0.0 for i, w in enumerate(row)]))


def test_where_all_inputs_are_of_one_size_wanda_is_magnitude_in_each_row(problem, compress):
    weight, _ = problem(16, 64)
    for sparsity in (0.3, "2:4"):
        ours = compress(weight, 3.0 * torch.eye(64), Wanda(sparsity=sparsity))
        if sparsity == "2:4":
            assert torch.equal(ours.dense(), compress(weight, torch.eye(64), Magnitude(sparsity=sparsity)).dense())
        rows = [compress(row[None], torch.eye(64), Magnitude(sparsity=sparsity)).dense() for row in weight]
        assert torch.equal(ours.dense(), torch.cat(rows))


def test_random_draws_from_the_tasks_generator(problem, compress):
    weight, hessian = problem(16, 64)
    one, again, other = (compress(weight, hessian, Random(), seed=seed).kept for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert 0.3 < float((one == other).float().mean()) < 0.7  # measured: 0.51


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_global_threshold_is_that_of_all_entries_sorted_together(dtype, compress):
    generator = torch.Generator().manual_seed(0)
    sizes = (1.0, 0.3, 3.0)
    weights = [(size * torch.randn(40, 64, generator=generator)).to(dtype).float() for size in sizes]
    settings, others = Magnitude(scope="global", sparsity=0.6), Magnitude(scope="global", sparsity=0.2)
    stage = [*((settings, weight) for weight in weights), (others, 100 * weights[0]), (Magnitude(), weights[1])]
    found = METHODS[Magnitude].survey(iter(stage))
    masks = [compress(weight, torch.eye(64), settings, surveyed=found, dtype=dtype).kept for weight in weights]
    everything, kept = (torch.cat([part.flatten() for part in parts]) for parts in (weights, masks))
    assert abs(int((~kept).sum()) - round(0.6 * len(kept))) <= 2  # half an entry for each matrix; measured: 1
    threshold = everything.abs().sort().values[round(0.6 * len(kept)) - 1]
    assert not kept[everything.abs() < threshold].any()
    assert kept[everything.abs() > threshold].all()
    shares = [float((~mask).float().mean()) for mask in masks]
    assert shares[1] > 0.9 > 0.5 > shares[2]  # measured: 0.994, 0.21


def test_of_fp32_weights_a_global_threshold_is_as_sharp_as_its_sizes(compress):
    weights = [torch.randn(40, 640, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    settings = Magnitude(scope="global", sparsity=0.5)
    found = METHODS[Magnitude].survey((settings, weight) for weight in weights)
    masks = [compress(weight, torch.eye(640), settings, surveyed=found).kept for weight in weights]
    everything = torch.cat([weight.flatten() for weight in weights]).abs()
    kept = torch.cat([mask.flatten() for mask in masks])
    assert abs(int((~kept).sum()) - len(kept) // 2) <= 2
    exact = everything > everything.sort().values[len(kept) // 2 - 1]
    assert float((exact != kept).float().mean()) < 1e-4  # measured: 1.3e-5


def test_a_global_threshold_takes_no_pattern():
    with pytest.raises(ValueError, match="scope global needs a share"):
        Magnitude(scope="global", sparsity="2:4")


@pytest.mark.parametrize("sparsity", [0.3, 0.5, "2:4"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_where_sparsity_is_already_there_nothing_changes(method, sparsity, problem, compress):
    weight, hessian = problem(32, 64)
    before = compress(weight, hessian, Magnitude(sparsity="2:4"))
    after = compress(before.dense(), hessian, PRUNE[method](sparsity=sparsity), kept=before.kept)
    assert torch.equal(after.dense(), before.dense())
    assert torch.equal(after.kept, before.kept)
    assert after.pattern == before.pattern


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_what_was_pruned_before_stays_and_counts(method, problem, compress):
    weight, hessian = problem(32, 64)
    before = compress(weight, hessian, Random(sparsity=0.3))
    after = compress(before.dense(), hessian, PRUNE[method](sparsity=0.6), kept=before.kept)
    assert not (after.kept & ~before.kept).any()
    share = 1 - float(after.kept.float().mean())
    assert share == pytest.approx(0.6, abs=0.01)  # rows of Wanda lose whole entries; measured: 0.594 there


def test_what_can_not_be_pruned_is_told(problem, compress):
    weight, hessian = problem(8, 36)
    sparse = compress(weight, hessian, Magnitude(bits=4, group_size="channel"))
    expect = METHODS[Magnitude].expect
    assert expect(sparse, Magnitude(), torch.float32) == (
        "its kept weights are quantized already; prune before quantizing"
    )
    assert expect(Dense(weight), Magnitude(sparsity="4:8"), torch.float32) == "4:8 takes columns by 8, and it has 36"
    told = expect(Dense(weight), Magnitude(bits=4, group_size=8), torch.float32)
    assert told == "group 8 doesn't divide 36 columns"


@pytest.mark.parametrize("bits", [None, 3])
def test_the_fallback_prunes_as_much_by_magnitude(bits, problem, compress):
    weight, hessian = problem(16, 64)
    for settings in (SparseGpt(sparsity=0.7, bits=bits, group_size=16), Wanda(sparsity="4:8", bits=bits)):
        plain = FALLBACK[type(settings)](settings)
        assert isinstance(plain, Magnitude)
        assert (plain.sparsity, plain.bits, plain.group_size) == (settings.sparsity, bits, settings.group_size)
    made = compress(weight, hessian, FALLBACK[SparseGpt](SparseGpt(sparsity=0.75)))
    assert isinstance(made, Sparse)
    assert made.count == 256
