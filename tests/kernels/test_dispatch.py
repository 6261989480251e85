"""A path that is named is taken or refused; only `auto` falls back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from modelzip.kernels import dispatch
from modelzip.kernels.native import library

HERE, ELSEWHERE = torch.ones(1), torch.ones(1, device="meta")


def test_the_compiled_path_is_taken_where_it_is_there(monkeypatch):
    monkeypatch.delenv("MODELZIP_KERNELS", raising=False)
    assert dispatch.path(HERE) == ("reference" if library() is None else "compiled")
    assert dispatch.path(HERE, ELSEWHERE) == "reference"
    monkeypatch.setattr(dispatch, "library", lambda: object())
    assert dispatch.path(HERE) == "compiled"
    monkeypatch.setattr(dispatch, "library", lambda: None)
    assert dispatch.path(HERE) == "reference"


def test_a_path_that_is_named_is_taken_or_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "library", lambda: object())
    monkeypatch.setenv("MODELZIP_KERNELS", "reference")
    assert dispatch.path(HERE) == "reference"
    monkeypatch.setenv("MODELZIP_KERNELS", "compiled")
    assert dispatch.path(HERE) == "compiled"
    with pytest.raises(ValueError, match="compiled kernels take tensors on the CPU"):
        dispatch.path(ELSEWHERE)
    monkeypatch.setattr(dispatch, "library", lambda: None)
    with pytest.raises(ValueError, match="was installed without the compiled kernels"):
        dispatch.path(HERE)
    monkeypatch.setenv("MODELZIP_KERNELS", "fastest")
    with pytest.raises(ValueError, match="it must be auto, reference or compiled"):
        dispatch.path(HERE)


@pytest.mark.parametrize(
    ("wanted", "capability", "taken"),
    [
        ("auto", "AVX2", "compiled"),
        ("auto", "AVX512", "reference"),
        ("auto", "DEFAULT", "reference"),
        ("compiled", "AVX2", "compiled"),
        ("compiled", "AVX512", "compiled"),
        ("reference", "AVX2", "reference"),
    ],
)
def test_a_product_is_compiled_where_that_pays(monkeypatch, wanted, capability, taken):
    monkeypatch.setattr(dispatch, "library", lambda: object())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setenv("MODELZIP_KERNELS", wanted)
    assert dispatch.product_path(HERE) == taken


@pytest.mark.parametrize(
    ("wanted", "units", "dtype", "taken"),
    [
        ("auto", True, torch.bfloat16, "compiled-bf16"),
        ("auto", False, torch.bfloat16, "reference"),
        ("auto", True, torch.float32, "reference"),
        ("compiled", True, torch.bfloat16, "compiled-bf16"),
        ("compiled", False, torch.bfloat16, "compiled"),
        ("reference", True, torch.bfloat16, "reference"),
    ],
)
def test_a_hessian_of_bf16_is_compiled_where_the_cpu_has_units_for_it(monkeypatch, wanted, units, dtype, taken):
    monkeypatch.setattr(dispatch, "library", lambda: SimpleNamespace(second_moment_pairs=None))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setenv("MODELZIP_KERNELS", wanted)
    assert dispatch.moment_path(HERE, HERE.to(dtype)) == taken


def test_a_compiled_product_that_this_cpu_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "library", lambda: object())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setenv("MODELZIP_KERNELS", "compiled")
    with pytest.raises(ValueError, match="its matrix products need AVX2; this CPU has DEFAULT"):
        dispatch.product_path(HERE)
