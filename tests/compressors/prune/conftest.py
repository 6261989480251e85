"""What the pruners' tests share: correlated inputs, and one matrix pruned as the engine does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modelzip.compressors.layer import LayerTask
from modelzip.compressors.methods import METHODS
from modelzip.compressors.settings import MethodSettings
from modelzip.weights.value import CompressedWeight


def _problem(rows: int, columns: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in], and the Hessian [in, in] of inputs that are mixtures of few sources, at many volumes."""
    generator = torch.Generator().manual_seed(seed)
    count = 8 * columns
    sources = torch.randn(count, max(1, columns // 4), generator=generator)
    x = sources @ torch.randn(sources.shape[1], columns, generator=generator)
    x = x + sources.shape[1] ** 0.5 * torch.randn(count, columns, generator=generator)
    x = x * torch.exp(0.7 * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), x.T @ x / count


def _compress(
    weight: Tensor,
    hessian: Tensor,
    settings: MethodSettings,
    *,
    kept: Tensor | None = None,
    surveyed: Any = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CompressedWeight:
    method = METHODS[type(settings)]
    statistic = hessian.diagonal() if method.statistic == "squares" else hessian
    prepared = None if method.prepare is None else method.prepare(statistic, settings)
    generator = torch.Generator().manual_seed(seed)
    task = LayerTask(weight, settings, dtype, generator, prepared=prepared, surveyed=surveyed, kept=kept)
    return method.compress(task)


def _lost(weight: Tensor, made: CompressedWeight | Tensor, hessian: Tensor) -> float:
    """‖(W − Ŵ)X‖ / ‖WX‖ in fp64."""
    dense = made if isinstance(made, Tensor) else made.dense()
    weight, hessian = weight.double(), hessian.double()
    missed = weight - dense.double()
    return float((((missed @ hessian) * missed).sum() / ((weight @ hessian) * weight).sum()) ** 0.5)


@pytest.fixture(scope="session")
def problem() -> Callable[..., tuple[Tensor, Tensor]]:
    return _problem


@pytest.fixture(scope="session")
def compress() -> Callable[..., CompressedWeight]:
    return _compress


@pytest.fixture(scope="session")
def lost() -> Callable[..., float]:
    return _lost
