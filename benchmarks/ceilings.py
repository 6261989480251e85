"""What this machine can do at most: matrix rate in fp32 and bf16 at the shapes of the protocol's model, and copying.

    python ceilings.py

Prints JSON. Rates are the best of the runs that fit in a fraction of a second, with torch's own number of threads.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.functional import linear

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
BF16_UNITS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
SHAPES = {  # [tokens, in] times [in, out]
    "attention 4096x576x576": (4096, 576, 576),
    "up 4096x576x1536": (4096, 576, 1536),
    "down 4096x1536x576": (4096, 1536, 576),
    "square 2048x2048x2048": (2048, 2048, 2048),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPY_ELEMENTS = 50_000_000


def cpu() -> dict[str, Any]:
    """The processor's name, its vector and matrix units, cores and memory."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8") if listing.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", lines, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "features": [feature for feature in FEATURES if feature in present],
        "bf16_units": bool(present & BF16_UNITS),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def best_seconds(work: Callable[[], object], budget: float = 0.4) -> float:
    """The shortest of the runs, after a first one for warmth, until the budget is spent."""
    work()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def matrix_rates() -> dict[str, dict[str, float]]:
    """GFLOP/s of `linear` by type and shape, and of the product `xᵀx` that Hessians are made of."""
    rates: dict[str, dict[str, float]] = {}
    for label, dtype in DTYPES.items():
        rates[label] = {}
        for shape, (tokens, columns, rows) in SHAPES.items():
            x, w = torch.randn(tokens, columns).to(dtype), torch.randn(rows, columns).to(dtype)
            seconds = best_seconds(partial(linear, x, w))
            rates[label][shape] = round(2 * tokens * columns * rows / seconds / 1e9, 1)
    x = torch.randn(4096, 1536)
    rates["float32"]["hessian 1536x4096x1536"] = round(2 * x.numel() * 1536 / best_seconds(lambda: x.T @ x) / 1e9, 1)
    return rates


def copy_rate() -> float:
    """GB/s, bytes read and written, of copying an array far larger than the caches."""
    source = torch.ones(COPY_ELEMENTS)
    target = torch.zeros(COPY_ELEMENTS)
    return round(2 * source.nbytes / best_seconds(lambda: target.copy_(source)) / 1e9, 1)


@torch.inference_mode()
def measure() -> dict[str, Any]:
    return {"cpu": cpu(), "gflops": matrix_rates(), "copy_gb_per_s": copy_rate(), "torch": torch.__version__}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
