"""Headers of tensors that aren't written yet."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from torch import Tensor

from modelzip.checkpoints.headers import TensorInfo
from modelzip.checkpoints.index import DTYPES

NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def info_of(name: str, tensor: Tensor) -> TensorInfo:
    """Right in name, type, shape and size; its values lie nowhere."""
    return TensorInfo(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, Path(), 0)
