"""What the kernels' tests share: poisoned outputs, and how far a result is from the truth."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from modelzip.kernels import dispatch
from modelzip.kernels.native import library


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _name(path: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if path == "compiled" and library() is None:
        assert shutil.which("cc") is None, "there is a C compiler, but the compiled kernels aren't there"
        pytest.skip("there is no C compiler")
    monkeypatch.setenv("MODELZIP_KERNELS", path)
    return path


@pytest.fixture(params=["reference", "compiled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path that the kernel has on a CPU."""
    return _name(request.param, monkeypatch)


def _require_avx2() -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")


@pytest.fixture
def product_path(path: str) -> str:
    """The same for matrix products, whose compiled path takes AVX2."""
    if path == "compiled":
        _require_avx2()
    return path


@pytest.fixture(params=["reference", "compiled", "compiled-bf16"])
def moment_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path to a Hessian; `compiled-bf16` is taken by bf16 rows only."""
    if _name(request.param.removesuffix("-bf16"), monkeypatch) == "compiled":
        _require_avx2()
    if request.param != "compiled-bf16":
        monkeypatch.setattr(dispatch, "has_pairs", lambda: False)
    elif not dispatch.has_pairs():
        pytest.skip("this CPU has no AVX-512 BF16")
    return str(request.param)


@pytest.fixture(scope="session")
def distance() -> Callable[[Tensor, Tensor], tuple[float, float]]:
    """distance(found, truth) -> relative Frobenius norm of the difference, and its worst row over the typical row."""

    def of(found: Tensor, truth: Tensor) -> tuple[float, float]:
        assert found.shape == truth.shape
        found, truth = (part.double().reshape(-1, part.shape[-1]) for part in (found, truth))
        size, difference = truth.norm().clamp(min=1e-30), (found - truth).norm(dim=1)
        return float(difference.norm() / size), float(difference.max() / size * len(truth) ** 0.5)

    return of


@pytest.fixture(autouse=True)
def threads():
    """Several, whatever the machine or the run has: they share the work in other places each time."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
