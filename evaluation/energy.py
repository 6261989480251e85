"""Joules that the machine has used, where it tells: the processor by RAPL, an NVIDIA GPU by NVML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

RAPL: Final = Path("/sys/class/powercap")


@dataclass
class Counter:
    """A counter of microjoules that starts again at 0 once it has come to `most`."""

    file: Path
    most: int
    last: int = 0
    total: int = 0

    def read(self) -> int:
        """Microjoules since the first reading."""
        now = int(self.file.read_text())
        self.total += (now - self.last) % (self.most + 1)
        self.last = now
        return self.total


def meter(device: str, *, root: Path = RAPL) -> Callable[[], float] | None:
    """A function that tells joules since some moment; None where the machine doesn't tell. device: cpu or cuda."""
    if device == "cuda":
        return _nvml()
    counters = []
    for domain in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
        if domain.name.count(":") > 1:  # a part of a package, which is counted with it
            continue
        try:
            file = domain / "energy_uj"
            counters.append(Counter(file, int((domain / "max_energy_range_uj").read_text()), int(file.read_text())))
        except (OSError, ValueError):  # kernels let root alone read it
            return None
    return (lambda: sum(counter.read() for counter in counters) / 1e6) if counters else None


def _nvml() -> Callable[[], float] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
