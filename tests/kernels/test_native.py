"""The compiled library: one that doesn't load here, and the threads that it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelzip.kernels import native


def test_a_library_that_does_not_load_is_as_good_as_none(monkeypatch, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"\x7fELF, but no more")
    for spec in (SimpleNamespace(origin=str(broken)), SimpleNamespace(origin=None), None):
        monkeypatch.setattr(native.importlib.util, "find_spec", lambda _, spec=spec: spec)
        assert native.library.__wrapped__() is None


@pytest.mark.skipif(native.library() is None, reason="the compiled kernels aren't there")
def test_no_second_openmp_is_loaded():
    """Two of them would each have threads that wait for work by spinning, and both be slow."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("there is no /proc")
    program = "import torch, modelzip.kernels.native as n; n.library(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    files = {line.split()[-1] for line in maps.splitlines() if "omp" in line.rsplit("/", 1)[-1]}
    assert len({file for file in files if "gomp" in file or "iomp" in file}) <= 1
