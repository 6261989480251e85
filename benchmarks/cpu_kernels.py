"""Each compiled CPU kernel beside its plain-torch reference, alternating in one process, on sizes of real layers.

python benchmarks/cpu_kernels.py        # prints a table and writes benchmarks/results/cpu-kernels.json

The file holds one machine for each path that products take: `compiled` (AVX2), `compiled-bf16` (AVX-512 BF16).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modelzip.checkpoints.memory import keep_freed
from modelzip.kernels.mixed_linear import mixed_linear
from modelzip.kernels.obs_columns import Grid, obs_columns
from modelzip.kernels.rounding_errors import rounding_errors
from modelzip.kernels.second_moment import add_second_moment
from modelzip.pipeline.environment import environment

HERE = Path(__file__).parent
ROUNDS = 15
PATHS = ("reference", "compiled")


def columns(block: int, out: int) -> Callable[[], object]:
    """One block of GPTQ's columns, 4 bit."""
    weight, scale, zero = torch.randn(block, out), torch.full((block, out), 0.3), torch.zeros(block, out)
    factor = torch.eye(block) + 0.1 * torch.randn(block, block).triu(1)
    return lambda: obs_columns(weight.clone(), factor, grid=Grid(scale, zero, 4), value_dtype=torch.bfloat16)


def search(out: int, columns: int, grids: int = 24) -> Callable[[], object]:
    """The clip search of a slab of rows: all grids of every group of 64, 4 bit."""
    grouped, scale = torch.randn(out, columns // 64, 64), torch.rand(grids, out, columns // 64) + 0.1
    root = torch.rand(1, columns // 64, 64)
    return lambda: rounding_errors(grouped, scale, None, bits=4, root=root)


def linear(width: int, out: int, tokens: int = 2048) -> Callable[[], object]:
    """A forward through one linear, bf16 activations and fp32 weight."""
    x, weight = torch.randn(tokens, width).bfloat16(), torch.randn(out, width)
    return lambda: mixed_linear(x, weight)


def moment(width: int, tokens: int = 2048, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """What a batch adds to a Hessian."""
    total, rows = torch.zeros(width, width), torch.randn(tokens, width).to(dtype)
    return lambda: add_second_moment(total, rows)


CASES = {
    "obs_columns [128, 192]": columns(128, 192),
    "obs_columns [128, 576]": columns(128, 576),
    "obs_columns [128, 1536]": columns(128, 1536),
    "obs_columns [128, 4096]": columns(128, 4096),
    "rounding_errors [227, 576] x 24": search(227, 576),
    "rounding_errors [85, 1536] x 24": search(85, 1536),
    "mixed_linear [192, 576]": linear(576, 192),
    "mixed_linear [576, 576]": linear(576, 576),
    "mixed_linear [1536, 576]": linear(576, 1536),
    "mixed_linear [576, 1536]": linear(1536, 576),
    "mixed_linear [4096, 4096]": linear(4096, 4096),
    "second_moment [576, 576]": moment(576),
    "second_moment [1536, 1536]": moment(1536),
    "second_moment [4096, 4096]": moment(4096),
    "second_moment [576, 576] fp32": moment(576, dtype=torch.float32),
    "second_moment [1536, 1536] fp32": moment(1536, dtype=torch.float32),
}


def timed(run: Callable[[], object], path: str) -> float:
    os.environ["MODELZIP_KERNELS"] = path
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    keep_freed()  # as the command line does: else much of the time goes into pages that the system clears
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
    os.environ["MODELZIP_KERNELS"] = "auto"
    where = environment(torch.device("cpu"))
    settings = {"cpu": where["cpu"], "threads": where["threads"], "torch": where["torch"]}
    target = HERE / "results" / "cpu-kernels.json"
    machines = json.loads(target.read_text())["machines"] if target.is_file() else {}
    machines[str(where["products"])] = {**settings, "median_of": ROUNDS - 1, "kernels": found}
    told = {"command": "python benchmarks/cpu_kernels.py", "machines": dict(sorted(machines.items()))}
    target.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
