"""The CPU kernels that were compiled when modelzip was installed; without a C compiler there are none."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache

from torch import Tensor


@cache
def library() -> ctypes.CDLL | None:
    """The library, None if it was not built."""
    spec = importlib.util.find_spec("modelzip.kernels._native")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Where the values of a contiguous CPU tensor lie."""
    return ctypes.c_void_p(tensor.data_ptr())
