"""The shipped recipes for classifiers on a real data set: accuracy, size and latency of each, beside the teacher.

    python classifier.py ENCODER DATA [--work FOLDER] [NAME ...]

ENCODER: an encoder without a classifier, such as MiniLM. DATA: a folder with SST-2's train.tsv and dev.tsv. The teacher
is made of the encoder by the recipe fine-tuned; each recipe runs as a whole command in DATA, unless WORK holds its
result already, then all results are measured against the teacher in turn, with latency. Writes results/classifier.json,
where recipes that were not named keep their rows, each with the environment that it was measured in, and prints its
table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from side_by_side import markdown

HERE = Path(__file__).parent
TEACHER = "fine-tuned"
FROM_ENCODER = (TEACHER, "lottery-60")
RECIPES = (
    TEACHER,
    "heads-30",
    "layers-healed",
    "half-depth",
    "bilstm",
    "fastbert",
    "svd-50-healed",
    "lottery-60",
    "smallest-classifier",
)
LIBRARIES = ("modelzip", "torch", "transformers")


def run(name: str, *, model: Path, data: Path, output: Path) -> list[str]:
    """Run a shipped recipe to its end, going on where it was interrupted; its command."""
    command = [str(Path(sys.executable).with_name("modelzip")), "run", name, str(model), "-o", str(output), "--resume"]
    if not output.is_dir():
        print(f"run: {name}", file=sys.stderr, flush=True)
        subprocess.run(command, check=True, cwd=data, stdout=subprocess.DEVNULL)
    return ["modelzip", "run", name, "ENCODER" if name in FROM_ENCODER else TEACHER, "-o", name]


def measure(output: Path, *, teacher: Path, data: Path) -> dict[str, Any]:
    """What `modelzip evaluate` says of a result beside the teacher, latency too, through each exit if it has any."""
    print(f"measure: {output.name}", file=sys.stderr, flush=True)
    exits = thresholds(output)
    options = ["--data", "dev.tsv", "--json"]
    options += ["--against", str(teacher), "--latency"] if output != teacher else []
    options += ["--exit-threshold", ",".join(map(str, exits))] if exits else []
    program = str(Path(sys.executable).with_name("modelzip"))
    done = subprocess.run([program, "evaluate", str(output), *options], check=True, cwd=data, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def thresholds(output: Path) -> list[float]:
    """At which uncertainties the recipe lets texts leave early."""
    found: list[float] = report_of(output)["recipe"]["evaluate"].get("exit_threshold", [])
    return found


def report_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return found


def result(name: str, *, command: list[str], work: Path, data: Path) -> dict[str, Any]:
    """One recipe's figures: of its own report, and of a measurement beside the teacher."""
    report = report_of(work / name)
    teacher = work / TEACHER
    measured = measure(work / name, teacher=teacher, data=data)
    return {
        "command": shlex.join(command),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "environment": measured["environment"],
        "peak_memory_mb": report["peak_memory_mb"],
        "bytes": report["size"]["bytes_after"],
        "stages": [staged(stage) for stage in report["stages"]],
        "evaluation": {
            key: measured["evaluation"].get(key) for key in ("accuracy", "kl", "top1_agreement", "latency", "exits")
        },
    }


def staged(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage did and left, without this machine's paths."""
    found = {key: stage.get(key) for key in ("kind", "method", "bytes_after", "evaluation")}
    details = {key: value for key, value in (stage.get("details") or {}).items() if key not in ("teacher", "data")}
    return found | {"details": details}


def kept(target: Path, **about: Any) -> dict[str, Any]:
    """The results of earlier runs on the same encoder and data."""
    found = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    results: dict[str, Any] = found["results"] if all(found.get(key) == about[key] for key in about) else {}
    return results


def table(results: dict[str, Any]) -> str:
    whole = results[TEACHER]["bytes"]
    rows = []
    for name, one in results.items():
        accuracy, latency = one["evaluation"]["accuracy"], one["evaluation"]["latency"] or {}
        faster = [f"{latency[way]['speedup']:.2f}" if way in latency else "" for way in ("single", "batched")]
        sizes = (round(one["bytes"] / 1e6, 2), f"{100 * one['bytes'] / whole:.1f}")
        rows.append((name, *shown(accuracy["compressed"], accuracy["low"], accuracy["high"]), *sizes, *faster))
    header = ("", "accuracy %", "95 % interval", "MB", "% of bytes", "times as fast", "in batches")
    return markdown(header, rows)


def exits_table(results: dict[str, Any]) -> str:
    rows = []
    for name, one in results.items():
        for row in one["evaluation"]["exits"] or ():
            faster = [f"{row['latency'][way]['speedup']:.2f}" for way in ("single", "batched")]
            accuracy = shown(row["accuracy"], row["low"], row["high"])
            rows.append((name, row["threshold"], *accuracy, f"{row['layers']:.2f}", *faster))
    header = ("", "threshold", "accuracy %", "95 % interval", "layers", "times as fast", "in batches")
    return markdown(header, rows)


def shown(share: float, low: float, high: float) -> tuple[str, str]:
    return f"{100 * share:.2f}", f"{100 * low:.1f} to {100 * high:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("data", type=Path, help="folder with train.tsv and dev.tsv")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"recipes among {', '.join(RECIPES)}; all without one")
    parser.add_argument("--work", type=Path, default=Path("classifier-work"), help="where results are kept")
    parser.add_argument("--no-measure", action="store_true", help="only run the recipes")
    options = parser.parse_intermixed_args()
    work, data = options.work.resolve(), options.data.resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in RECIPES if name == TEACHER or name in (options.names or RECIPES)]
    commands = {
        name: run(
            name,
            model=options.encoder.resolve() if name in FROM_ENCODER else work / TEACHER,
            data=data,
            output=work / name,
        )
        for name in chosen
    }
    if options.no_measure:
        return
    files = {file: hashlib.sha256((data / file).read_bytes()).hexdigest() for file in ("train.tsv", "dev.tsv")}
    encoder = json.loads((options.encoder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    target = HERE / "results" / "classifier.json"
    results = kept(target, encoder=encoder, data_sha256=files)
    results |= {name: result(name, command=commands[name], work=work, data=data) for name in chosen}
    results = {name: results[name] for name in RECIPES if name in results}
    found = {"encoder": encoder, "data_sha256": files, "results": results}
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(results), exits_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
