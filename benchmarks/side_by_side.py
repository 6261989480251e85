"""Run whole commands alternately (A B A B ...) and compare wall time and peak resident memory.

    python side_by_side.py --rounds 3 ours='modelzip quantize ...' peer='python other.py ...'

Memory is taken in two ways: every 50 ms from each process of the tree (where the system keeps a high-water mark, that
one, so nothing is missed in between), and from the system's account of the command when it ends. The main process and
the largest process of the tree are reported apart. The system's account starts at the size of the process that starts
the command, so whatever imports this module must stay small: no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

POLL_SECONDS = 0.05
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Run:
    """One command, once: seconds on the wall, and peaks of resident memory in MB (millions of bytes)."""

    seconds: float
    main_mb: float
    largest_mb: float


def resident(process: psutil.Process) -> int:
    """Bytes of resident memory: the peak so far where the system tells it, else the present size; 0 once it is gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8", errors="replace")
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
        return int(peak[1]) * 1024 if peak else 0
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def tree_below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def run_once(command: Sequence[str], log: Path) -> Run:
    """Run one command to its end with its output in `log`; a failure ends the benchmark with the log's last lines."""
    main = largest = 0
    with log.open("wb") as output:
        start = time.perf_counter()
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        process = psutil.Process(started.pid)
        while True:
            pid, status, usage = os.wait4(started.pid, os.WNOHANG)
            if pid:
                break
            main = max(main, resident(process))
            largest = max(largest, main, *map(resident, tree_below(process)))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - start
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"{shlex.join(command)} failed with exit code {started.returncode}:\n{tail}")
    largest = max(largest, usage.ru_maxrss * MAXRSS_BYTES)
    return Run(round(seconds, 2), round(main / 1e6, 1), round(largest / 1e6, 1))


def alternate(commands: Mapping[str, Sequence[str]], *, rounds: int, logs: Path) -> dict[str, list[Run]]:
    """Every command once a round, in turn, so that a slow moment of the machine meets them all."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            runs[name].append(run_once(command, logs / f"{name}-{number}.log"))
    return runs


def summarise(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """By name: all runs, their medians, and each median over that of the first name."""
    fields = ("seconds", "main_mb", "largest_mb")
    medians = {
        name: {field: median(getattr(run, field) for run in repeats) for field in fields}
        for name, repeats in runs.items()
    }
    first = next(iter(medians.values()))
    return {
        name: {
            "runs": [asdict(run) for run in runs[name]],
            "median": values,
            "ratio_to_first": {field: round(values[field] / max(first[field], 1e-9), 3) for field in fields},
        }
        for name, values in medians.items()
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    header = ("", "runs", "wall s", "peak MB, main", "peak MB, largest", "time ratio", "memory ratio")
    rows = []
    for name, entry in summary.items():
        middle, ratio = entry["median"], entry["ratio_to_first"]
        sizes = (round(middle["main_mb"]), round(middle["largest_mb"]))
        ratios = (ratio["seconds"], ratio["largest_mb"])
        rows.append((name, len(entry["runs"]), round(middle["seconds"], 1), *sizes, *ratios))
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="+", metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    named = dict(command.split("=", 1) for command in options.commands)
    with tempfile.TemporaryDirectory() as logs:
        split = {name: shlex.split(command) for name, command in named.items()}
        summary = summarise(alternate(split, rounds=options.rounds, logs=Path(logs)))
    result = json.dumps({"commands": named, "results": summary}, indent=2)
    if options.output:
        options.output.write_text(result + "\n", encoding="utf-8")
    print(table(summary), result, sep="\n\n")


if __name__ == "__main__":
    main()
