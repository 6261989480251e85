"""How much memory a model takes once it is opened, and at most while it runs: measured in a process of its own.

Run as a module it is that process: `python -m modelzip.pipeline.resident FOLDER TOKENS DTYPE`.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Final

from modelzip.checkpoints.fresh import FreshProcessError, fresh
from modelzip.checkpoints.index import Checkpoint

STATUS: Final = Path("/proc/self/status")


def resident(checkpoint: Checkpoint, *, tokens: int, dtype: str) -> dict[str, float] | None:
    """`rest_mb` and `peak_mb` (10^6 bytes) above the libraries', for one text of so many tokens on the CPU.

    None where the system doesn't tell, or the model can't be opened so.
    """
    if not STATUS.exists():
        return None
    with tempfile.TemporaryDirectory(prefix="modelzip-") as name:
        try:
            with fresh(__name__, str(checkpoint.folder.absolute()), str(tokens), dtype, place=Path(name)) as lines:
                *_, told = ["{}", *lines]  # libraries may have spoken before
        except FreshProcessError:
            return None
    found: dict[str, float] = json.loads(told)
    return found


def _main(folder: str, tokens: str, dtype: str) -> None:
    import torch

    from .calibrate import forward_inputs
    from .opened import open_by_transformers

    checkpoint = Checkpoint.open(folder)
    window = torch.zeros(1, int(tokens), dtype=torch.int64)
    gc.collect()
    before = _told("VmRSS")
    model = open_by_transformers(checkpoint, torch.device("cpu"), dtype=dtype)
    inputs = forward_inputs(model)(window)
    gc.collect()
    rest = _told("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with torch.no_grad():
        model(**inputs)
    print(json.dumps({"rest_mb": rest - before, "peak_mb": _told("VmHWM") - before}))


def _told(name: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


if __name__ == "__main__":
    _main(*sys.argv[1:])
