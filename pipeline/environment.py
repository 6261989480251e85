"""Where a run took place: versions, machine, memory."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from modelzip.kernels import dispatch


def package_version(name: str) -> str:
    """The installed version, or `unknown`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def environment(device: torch.device) -> dict[str, str | int]:
    """The report's `environment` section."""
    name = "cpu" if device.type == "cpu" else f"{device.type} ({torch.cuda.get_device_name(device)})"
    return {
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "compressed_tensors": package_version("compressed-tensors"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "device": name,
        "threads": torch.get_num_threads(),
        "kernels": dispatch.path(torch.empty(0, device=device)),
        "products": dispatch.moment_path(torch.empty(0, dtype=torch.bfloat16, device=device)),
    }


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
