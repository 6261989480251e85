"""The factorizations as the engine sees them: what they expect, what they refuse, and what they note."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.compressors.factorize.methods import METHODS
from modelzip.compressors.factorize.settings import FactorizeSettings, Kronecker, Svd, SvdLlm, TensorTrain
from modelzip.compressors.layer import LayerTask, UnsuitableError
from modelzip.weights.affine import Affine
from modelzip.weights.dense import Dense
from modelzip.weights.low_rank import LowRank
from modelzip.weights.sparse import Sparse

EVERY = [Svd, SvdLlm, Kronecker, TensorTrain]
KINDS = {Svd: "low_rank", SvdLlm: "low_rank", Kronecker: "kronecker", TensorTrain: "tensor_train"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_meta(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Dense:
    return Dense(torch.empty(rows, columns, dtype=dtype, device="meta"))


def compressed(weight: Tensor, settings: FactorizeSettings, dtype: torch.dtype = torch.bfloat16):
    method = METHODS[type(settings)]
    x = draw(200, weight.shape[1], seed=7) * draw(weight.shape[1], seed=8).exp()
    prepared = method.prepare(x.T @ x / len(x), settings) if method.prepare else None
    return method.compress(LayerTask(weight, settings, dtype, torch.Generator(), prepared=prepared))


@pytest.mark.parametrize("settings", EVERY)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("choice", [{"ratio": 0.6}, {"rank": 2}])
def test_what_is_expected_is_what_comes_or_at_most_as_large(settings, shape, choice):
    settings = settings(**choice)
    made = compressed(draw(*shape), settings)
    expected = METHODS[type(settings)].expect(on_meta(*shape), settings, torch.bfloat16)
    assert made.kind == expected.kind == KINDS[type(settings)]
    assert made.shape == expected.shape == shape
    assert made.nbytes <= expected.nbytes < 2 * shape[0] * shape[1]
    if not isinstance(settings, Kronecker):
        assert made.meta() == expected.meta()


@pytest.mark.parametrize("settings", EVERY)
def test_energy_is_expected_at_its_largest(settings):
    settings = settings(energy=0.7)
    made = compressed(draw(24, 40), settings)
    expected = METHODS[type(settings)].expect(on_meta(24, 40), settings, torch.bfloat16)
    assert made.nbytes <= expected.nbytes < 2 * 24 * 40


@pytest.mark.parametrize("settings", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_factors_stand_for_the_weight_and_come_back_bit_for_bit(settings, dtype):
    weight = draw(24, 40) @ torch.diag(torch.logspace(0, -2, 40))
    made = compressed(weight, settings(ratio=0.9), dtype)
    again = type(made).from_tensors(made.tensors(), made.meta())
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in made.tensors().values())
    assert torch.equal(made.dense(), again.dense())
    assert float((made.dense() - weight).norm() / weight.norm()) < 0.4  # measured: 0.15, 0.23, 0.02, 0.28


@pytest.mark.parametrize("settings", EVERY)
def test_factors_that_cost_no_less_are_refused_before_and_after(settings):
    settings = settings(rank=10) if settings is not Kronecker else settings(rank=10, shape="6x2")
    told = METHODS[type(settings)].expect(on_meta(12, 8), settings, torch.bfloat16)
    assert isinstance(told, str)
    assert "and it takes 192 dense" in told
    with pytest.raises(UnsuitableError, match="and it takes 192 dense"):
        compressed(draw(12, 8), settings)


@pytest.mark.parametrize("settings", [Svd, SvdLlm, Kronecker, TensorTrain])
def test_an_energy_that_a_flat_spectrum_only_gives_at_a_loss_is_refused(settings):
    orthogonal = torch.linalg.qr(draw(16, 16))[0]
    with pytest.raises(UnsuitableError, match="its factors would take"):
        compressed(orthogonal, settings(energy=0.999))


@pytest.mark.parametrize("settings", EVERY)
def test_a_pruned_matrix_is_refused_for_its_zeros(settings):
    pruned = Sparse.of_dense(draw(8, 16), draw(8, 16) > 0, dtype=torch.bfloat16)
    told = METHODS[settings].expect(pruned, settings(), torch.bfloat16)
    assert told == "an earlier stage has pruned it, and factors would not keep its zeros"


@pytest.mark.parametrize("settings", EVERY)
def test_a_matrix_that_is_compressed_already_is_refused(settings):
    affine = Affine.from_codes(torch.zeros(8, 16), torch.ones(8, 1), None, bits=4)
    factors = LowRank(Dense(draw(8, 2)), Dense(draw(2, 16)))
    tell = METHODS[settings].expect
    assert tell(affine, settings(), torch.bfloat16) == "an earlier stage has compressed it already (affine)"
    assert tell(factors, settings(), torch.bfloat16) == "an earlier stage has compressed it already (low rank)"


def test_a_kronecker_shape_that_does_not_divide_is_told_at_plan_time():
    told = METHODS[Kronecker].expect(on_meta(12, 16), Kronecker(shape="5x2"), torch.bfloat16)
    assert told == "shape 5x2 doesn't divide its 12 rows and 16 columns"


def test_only_svd_llm_needs_data():
    assert {settings.model_fields["method"].default: METHODS[settings].statistic for settings in EVERY} == {
        "svd": "none",
        "svd-llm": "hessian",
        "kronecker": "none",
        "tensor-train": "none",
    }


def test_the_report_is_told_of_dead_columns_and_of_higher_damping_only():
    method, settings = METHODS[SvdLlm], SvdLlm()
    assert method.note(method.prepare(torch.eye(8), settings), settings) is None
    hessian = torch.eye(8)
    hessian[0, 0] = 0
    hessian[1, 2] = hessian[2, 1] = 1.2
    note = method.note(method.prepare(hessian, settings), settings)
    assert note == (
        "the Hessian needed damping 0.316; 1 input columns were never active and count for little in the factors"
    )
