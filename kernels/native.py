"""The CPU kernels that were compiled when modelzip was installed, if the machine had a C compiler."""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache

from torch import Tensor

ARGUMENTS = {
    "gptq_columns": (*[c_int64] * 2, *[c_void_p] * 6, c_float, c_float, c_int),
    "rounding_errors": (*[c_int64] * 4, *[c_void_p] * 5, c_float, c_float),
}
"""Types of each function's arguments, as the C files have them."""


@cache
def library() -> ctypes.CDLL | None:
    """The library; None if it was not built, or doesn't load here."""
    spec = importlib.util.find_spec("modelzip.kernels._native")
    if spec is None or spec.origin is None:
        return None
    try:
        native = ctypes.CDLL(spec.origin)
    except OSError:  # built for another C library, for example
        return None
    for name, types in ARGUMENTS.items():
        getattr(native, name).argtypes = types
    return native


def pointer(tensor: Tensor) -> int:
    """Where the values of a contiguous CPU tensor lie."""
    return tensor.data_ptr()
