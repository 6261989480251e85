"""Memory that the allocator keeps is given back, measured by what the system counts as resident."""

from __future__ import annotations

import platform
import subprocess
import sys

import psutil
import pytest
import torch

from modelzip.checkpoints import memory
from modelzip.checkpoints.memory import Heap, apart, give_back

glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="only glibc keeps and gives back so"
)
MEGABYTE = 1 << 20


def resident() -> int:
    return psutil.Process().memory_info().rss


def leave_holes(megabytes: int) -> list[torch.Tensor]:
    """Allocate this much in pieces of 64 KiB and free all but every 16th: the heap can't shrink by itself."""
    pieces = [torch.ones(1 << 14) for _ in range(megabytes * 16)]
    kept = pieces[::16]
    del pieces
    return kept


@glibc
def test_settling_gives_back_what_the_fullest_moment_did_not_need():
    heap, before = Heap(), resident()
    kept = leave_holes(128)
    holey = resident()
    heap.settle()
    settled = resident()
    assert holey - before > 100 * MEGABYTE  # measured: 130
    assert holey - settled > 80 * MEGABYTE  # measured: 119
    assert all(bool((piece == 1).all()) for piece in kept)


@glibc
def test_what_was_in_use_at_the_fullest_moment_may_lie_idle_later(monkeypatch):
    heap, calls = Heap(), []
    monkeypatch.setattr(memory, "give_back", lambda: calls.append(1))
    used = [torch.ones(1 << 14) for _ in range(2048)]
    heap.settle()
    del used[1::2]
    heap.settle()
    assert not calls
    assert len(used) == 1024


@glibc
def test_settling_again_does_nothing_as_long_as_nothing_new_lies_idle(monkeypatch):
    heap, calls = Heap(), []
    monkeypatch.setattr(memory, "give_back", lambda: (calls.append(1), give_back()))
    kept = leave_holes(64)
    for _ in range(3):
        heap.settle()
    assert len(calls) == 1
    assert len(kept) == 64


@glibc
def test_what_every_step_needs_anew_is_given_back_once(monkeypatch):
    heap, calls = Heap(), []
    monkeypatch.setattr(memory, "give_back", lambda: (calls.append(1), give_back()))
    kept = leave_holes(64)
    heap.settle()
    for _ in range(4):  # what a step frees lies between what it leaves, so the heap can't shrink by itself
        pieces = [torch.ones(1 << 14) for _ in range(1024)]
        end = torch.ones(1 << 14)
        del pieces
        heap.settle()
    assert len(calls) <= 2
    assert (len(kept), end.numel()) == (64, 1 << 14)


@glibc
def test_memory_in_use_does_not_count_as_idle_wherever_it_is(monkeypatch):
    heap, calls = Heap(), []
    monkeypatch.setattr(memory, "give_back", lambda: calls.append(1))
    small, large = [torch.ones(1 << 14) for _ in range(1024)], torch.ones(16 * MEGABYTE)
    storage = apart(64 * MEGABYTE).fill_(1)
    heap.settle()
    assert not calls
    assert storage.nbytes() == 64 * MEGABYTE
    assert len(small) * small[0].nbytes + large.nbytes == 128 * MEGABYTE


@glibc
def test_storage_apart_is_given_back_when_it_is_dropped():
    before = resident()
    storage = apart(64 * MEGABYTE).fill_(1)
    full = resident()
    del storage
    assert full - before > 60 * MEGABYTE
    assert resident() - before < 4 * MEGABYTE


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    give_back()
    heap = Heap()
    monkeypatch.setattr(memory, "give_back", lambda: pytest.fail("gave back"))
    heap.settle()


KEEPS = """
import sys
import psutil, torch
from modelzip.checkpoints.memory import give_back, keep_freed
resident = lambda: psutil.Process().memory_info().rss >> 20
if sys.argv[1] == "keep":
    keep_freed()
give_back()
before = resident()
large = torch.ones(16 << 20, dtype=torch.uint8)
del large
freed = resident()
give_back()
print(freed - before, resident() - before)
"""


@glibc
@pytest.mark.parametrize(("asked", "kept"), [("keep", True), ("no", False)])
def test_what_is_freed_is_kept_until_it_is_given_back_if_that_is_asked_for(asked, kept):
    told = subprocess.check_output([sys.executable, "-c", KEEPS, asked], text=True)
    freed, given_back = map(int, told.split())
    assert (freed >= 15) is kept
    assert given_back <= 4
