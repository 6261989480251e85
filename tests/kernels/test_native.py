"""The compiled library: work in ranges, and a library that doesn't load here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from modelzip.kernels import native


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100, 1000])
def test_the_ranges_make_up_the_whole_once(monkeypatch, count, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    done: list[int] = []
    spans: list[tuple[int, int]] = []

    def run(begin: int, end: int) -> int:
        done.extend(range(begin, end))
        spans.append((begin, end))
        return 0

    native.in_parts(run, count, least=32)
    assert sorted(done) == list(range(count))
    assert len(spans) == min(threads, -(-count // 32))
    assert all(begin % 32 == 0 for begin, _ in spans)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_call_that_fails_is_told(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with pytest.raises(MemoryError, match="no memory for a kernel's scratch space"):
        native.in_parts(lambda begin, end: -1 if end == 100 else 0, 100, least=32)


def test_a_library_that_does_not_load_is_as_good_as_none(monkeypatch, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"\x7fELF, but no more")
    for spec in (SimpleNamespace(origin=str(broken)), SimpleNamespace(origin=None), None):
        monkeypatch.setattr(native.importlib.util, "find_spec", lambda _, spec=spec: spec)
        assert native.library.__wrapped__() is None
