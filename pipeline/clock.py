"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, since: float) -> float:
        """Book the time since `since` to a phase; returns now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - since
        return now

    def phases(self) -> dict[str, float]:
        """As the report names them: `forward_s` and so on."""
        return {f"{phase}_s": round(seconds, 3) for phase, seconds in self.seconds.items()}


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that waits for all that the device has been asked for."""
    if device.type == "cpu":
        return time.perf_counter

    def now() -> float:
        getattr(torch, device.type).synchronize(device)
        return time.perf_counter()

    return now
