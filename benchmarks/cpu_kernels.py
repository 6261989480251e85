"""Each compiled CPU kernel beside its plain-torch reference, alternating in one process, on one column block or slab.

python benchmarks/cpu_kernels.py        # prints a table and writes benchmarks/results/cpu-kernels.json
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modelzip.kernels.gptq_columns import gptq_columns
from modelzip.kernels.rounding_errors import rounding_errors
from modelzip.pipeline.environment import environment

HERE = Path(__file__).parent
ROUNDS = 15
PATHS = ("reference", "compiled")


def columns(block: int, out: int) -> Callable[[], object]:
    """One block of GPTQ's columns, 4 bit."""
    weight, scale, zero = torch.randn(block, out), torch.full((block, out), 0.3), torch.zeros(block, out)
    factor = torch.eye(block) + 0.1 * torch.randn(block, block).triu(1)
    return lambda: gptq_columns(weight.clone(), factor, scale, zero, bits=4, value_dtype=torch.bfloat16)


def search(out: int, columns: int, grids: int = 24) -> Callable[[], object]:
    """The clip search of a slab of rows: all grids of every group of 64, 4 bit."""
    grouped, scale = torch.randn(out, columns // 64, 64), torch.rand(grids, out, columns // 64) + 0.1
    root = torch.rand(1, columns // 64, 64)
    return lambda: rounding_errors(grouped, scale, None, bits=4, root=root)


CASES = {
    "gptq_columns [128, 192]": columns(128, 192),
    "gptq_columns [128, 576]": columns(128, 576),
    "gptq_columns [128, 1536]": columns(128, 1536),
    "gptq_columns [128, 4096]": columns(128, 4096),
    "rounding_errors [227, 576] x 24": search(227, 576),
    "rounding_errors [85, 1536] x 24": search(85, 1536),
}


def timed(run: Callable[[], object], path: str) -> float:
    os.environ["MODELZIP_KERNELS"] = path
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    found = {}
    for name, run in CASES.items():
        times: dict[str, list[float]] = {path: [] for path in PATHS}
        for _ in range(ROUNDS):
            for path in PATHS:
                times[path].append(timed(run, path))
        median = {path: statistics.median(times[path][1:]) for path in PATHS}
        ratio = median["reference"] / median["compiled"]
        found[name] = {**{f"{path}_ms": round(median[path], 3) for path in PATHS}, "ratio": round(ratio, 1)}
        told = "   ".join(f"{path} {median[path]:8.2f} ms" for path in PATHS)
        print(f"{name:34} {told}   {ratio:5.1f}x")
    where = environment(torch.device("cpu"))
    settings = {"command": "python benchmarks/cpu_kernels.py", "cpu": where["cpu"], "threads": where["threads"]}
    target = HERE / "results" / "cpu-kernels.json"
    target.write_text(json.dumps({**settings, "median_of": ROUNDS - 1, "kernels": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
