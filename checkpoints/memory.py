"""Freed memory given back to the system, where the C library is glibc; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import psutil

SLACK_BYTES = 64 << 20


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2` (since 2.33)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _of_libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def give_back() -> None:
    """Return what the allocator keeps of freed memory."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


class Heap:
    """Keeps the process from holding much more memory than it uses.

    Waiting batches come and go in pieces of a few megabytes, and between them lie freed pieces that no later one fits
    into: left alone, the process grows to twice what is in use. Giving back costs time too, since the system clears
    every page anew that is used again: so only if more than `slack` bytes lie idle.
    """

    def __init__(self, slack: int = SLACK_BYTES) -> None:
        self._slack = slack
        self._process = psutil.Process()
        self._mallinfo = _of_libc("mallinfo2")
        if self._mallinfo is not None:
            self._mallinfo.restype = _Mallinfo2
            self._outside = self._not_in_use()

    def settle(self) -> None:
        """Give back if more than the slack lies idle."""
        if self._mallinfo is not None and self._not_in_use() > self._outside + self._slack:
            give_back()
            self._outside = self._not_in_use()

    def _not_in_use(self) -> int:
        """Bytes that are resident without being handed out by the allocator: what lies idle, and code and the like."""
        info = self._mallinfo()
        return int(self._process.memory_info().rss - info.uordblks - info.hblkhd)
