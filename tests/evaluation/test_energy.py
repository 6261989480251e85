"""Joules as the kernel's counters tell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelzip.evaluation.energy import meter


def domain(root: Path, name: str, now: int, most: int = 1000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / "energy_uj").write_text(f"{now}\n")
    return folder / "energy_uj"


def test_packages_are_added_up_and_a_counter_that_starts_again_goes_on(tmp_path):
    first, second = domain(tmp_path, "intel-rapl:0", 900), domain(tmp_path, "intel-rapl:1", 0)
    inner = domain(tmp_path, "intel-rapl:0:0", 5)
    joules = meter("cpu", root=tmp_path)
    assert joules is not None
    assert joules() == 0
    first.write_text("100")  # 101 up to the top and over it, and 100 more
    second.write_text("50")
    inner.write_text("700")
    assert joules() == pytest.approx((201 + 50) * 1e-6)
    first.write_text("300")
    assert joules() == pytest.approx((201 + 50 + 200) * 1e-6)


def test_a_machine_without_counters_and_one_that_hides_them_tell_nothing(tmp_path):
    assert meter("cpu", root=tmp_path / "none") is None
    assert meter("cpu", root=tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert meter("cpu", root=tmp_path) is None
