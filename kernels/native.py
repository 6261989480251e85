"""The CPU kernels that were compiled when modelzip was installed, if the machine had a C compiler."""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

ARGUMENTS = {
    "obs_columns": (c_int, *[c_int64] * 2, *[c_void_p] * 7, c_int, c_int, c_float, c_float, c_int, c_void_p),
    "rounding_errors": (c_int, *[c_int64] * 4, *[c_void_p] * 5, c_float, c_float),
}
"""Types of each function's arguments, as the C files have them. The first is how many threads it may take."""

PRODUCTS = {
    "mixed_linear": (c_int, *[c_int64] * 6, c_int, *[c_void_p] * 6),
    "second_moment": (c_int, *[c_int64] * 2, c_int, *[c_void_p] * 4),
}
"""The same for those that only x86-64 has."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of values, as native.h numbers them."""

TILE_COLUMNS = 24
"""As tile.h has it."""


@cache
def library() -> ctypes.CDLL | None:
    """The library; None if it was not built, or doesn't load here."""
    spec = importlib.util.find_spec("modelzip.kernels._native")
    if spec is None or spec.origin is None:
        return None
    try:
        native = ctypes.CDLL(spec.origin)
    except OSError:  # built for another C library, or torch has another way to run threads
        return None
    for name, types in ARGUMENTS.items():
        getattr(native, name).argtypes = types
    for name, types in PRODUCTS.items():
        if hasattr(native, name):
            getattr(native, name).argtypes = types
    return native


def pointer(tensor: Tensor) -> int:
    """Where the values of a contiguous CPU tensor lie."""
    return tensor.data_ptr()
