"""The CPU kernels that were compiled when modelzip was installed, if the machine had a C compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

ARGUMENTS = {
    "gptq_columns": (*[c_int64] * 4, *[c_void_p] * 6, c_float, c_float, c_int),
    "rounding_errors": (*[c_int64] * 6, *[c_void_p] * 5, c_float, c_float),
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


def in_parts(run: Callable[[int, int], int], count: int, *, least: int) -> None:
    """Call run(begin, end) for ranges that make up 0 ... count, side by side on as many threads as torch uses.

    least: a range is a multiple of this, but for the last one. Raises MemoryError if a call returns anything but 0.
    """
    units = -(-count // least)
    parts = max(1, min(torch.get_num_threads(), units))
    edges = [min(count, units * part // parts * least) for part in range(parts + 1)]
    if any(map(run, edges, edges[1:]) if parts == 1 else _threads().map(run, edges, edges[1:])):
        raise MemoryError("no memory for a kernel's scratch space")


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def pointer(tensor: Tensor) -> int:
    """Where the values of a contiguous CPU tensor lie."""
    return tensor.data_ptr()
