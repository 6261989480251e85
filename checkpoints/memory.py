"""How much memory the process holds: freed memory given back to the system, and storage outside the heap.

Giving back works where the C library is glibc; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from typing import TYPE_CHECKING, Any, Final

import psutil

if TYPE_CHECKING:
    from torch import UntypedStorage

SLACK_BYTES = 8 << 20
"""Idle memory that is left alone even when the process is at its fullest."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's malloc.h."""

LARGE_BYTES = 32 << 20
"""Allocations from this size on lie apart and are given back at once; glibc allows no higher limit."""

NEVER_BYTES = 1 << 30


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


def keep_freed() -> None:
    """Have the allocator keep what is freed, but for the largest pieces, until `give_back` is called.

    For a process of our own: it holds for the whole process, and for good.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, NEVER_BYTES)


_PAGES: Final[weakref.WeakSet[mmap.mmap]] = weakref.WeakSet()


def apart(size: int) -> UntypedStorage:
    """CPU storage of `size` bytes outside the heap, given back to the system as soon as it is dropped."""
    import torch

    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _PAGES.add(pages)
    return torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()


class Heap:
    """Keeps the process from holding much more memory than it needs at its fullest, and from giving back what it is
    about to use.

    The system clears every page anew that was given back, which takes longer than most of what a forward does with
    it: so only if the process has grown beyond the most that was in use so far, and not as glibc would do it, at every
    large tensor that is freed. What a step holds that began with nothing idle, it needs, and so will the next one.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._mallinfo = _of_libc("mallinfo2")
        if self._mallinfo is not None:
            self._mallinfo.restype = _Mallinfo2
            self._give_back()
            self._most = 0
            self._began_bare = False

    def settle(self) -> None:
        """Give back if too much lies idle. To ask what is in use takes longer than to ask what the process holds."""
        if self._mallinfo is None:
            return
        resident = self._resident()
        if self._began_bare:
            self._began_bare = False
            self._most = max(self._most, resident)
        if resident <= self._most + SLACK_BYTES:
            return
        self._most = max(self._most, self._handed_out() + self._others)
        if resident > self._most + SLACK_BYTES:
            self._give_back()
            self._began_bare = True

    def _give_back(self) -> None:
        give_back()
        self._others = self._resident() - self._handed_out()

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _handed_out(self) -> int:
        info = self._mallinfo()
        return int(info.uordblks + info.hblkhd) + sum(map(len, _PAGES))
