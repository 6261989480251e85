"""modelzip beside its peers on the same work: wall time, memory, size and agreement, in one run.

    python vs_peer.py [MODEL] [--calibration TEXT --evaluation TEXT] [--peer-python PEERS/bin/python]
    python vs_peer.py MODEL ... --weight-only-python OTHERS/bin/python --also-peer hqq='hqq --axis 0'
    python vs_peer.py MODEL ... --also asymmetric='--asymmetric' --also-peer rtn='--method rtn'
    python vs_peer.py MODEL ... --ours 'prune --method sparsegpt' --peer '--method sparsegpt' --name sparsegpt-vs-peer

Without MODEL it makes the protocol's model from the demo package, without texts it takes those of Python's manual, and
without --peer-python (an environment as peers.txt says) it runs ours only. A peer whose options begin with a library's
name is run by peer_weight_only.py, others by peer_llmcompressor.py. Commands run whole and in turn, agreement is
computed after all of them by agreement.py. Writes results/NAME.json and prints tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from side_by_side import alternate, markdown, summarise, table

HERE = Path(__file__).parent
LIBRARIES = ("torch", "transformers", "compressed-tensors")
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--calibration", type=Path, help="text file")
    parser.add_argument("--evaluation", type=Path, help="text file")
    parser.add_argument("--peer-python", help="Python of an environment with llm-compressor")
    parser.add_argument("--weight-only-python", help="Python that has the libraries which --also-peer names")
    parser.add_argument("--peer-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--modelzip", default=shlex.quote(str(Path(sys.executable).with_name("modelzip"))))
    parser.add_argument("--ours", default="quantize --method gptq --bits 4", help="verb and options of modelzip's run")
    parser.add_argument("--peer", default="", help="options of the peer's run")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=OPTIONS", help="another run of modelzip")
    parser.add_argument("--also-peer", action="append", default=[], metavar="NAME=OPTIONS")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 tokens to evaluate on; 0 for none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--name", default="gptq-vs-peer", help="of the file under results/")
    return parser.parse_args()


def script(name: str, *given: str | Path) -> dict[str, Any]:
    """What one of our scripts prints as JSON, from a process of its own: this one must stay small to measure others."""
    done = subprocess.run([sys.executable, HERE / name, *given], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return result


def complete(options: argparse.Namespace, work: Path) -> None:
    """Fill in the model and the texts that were not named."""
    if options.model is None:
        options.model = work / "smollm2-135m-degrid"
        subprocess.run([sys.executable, HERE / "protocol_model.py", options.model], check=True)
    manual = "\n".join(topics[key] for key in sorted(topics))
    for field, half in (("calibration", manual[: len(manual) // 2]), ("evaluation", manual[len(manual) // 2 :])):
        if getattr(options, field) is None:
            setattr(options, field, work / f"python-manual-{field}.txt")
            getattr(options, field).write_text(half, encoding="utf-8")


def commands(options: argparse.Namespace, work: Path, dtype: str) -> dict[str, list[str]]:
    """By name: the whole command of each contestant, whose output is the folder of that name."""
    size = f"--samples {options.samples} --seq-len {options.seq_len}".split()
    group = ["--group-size", str(options.group_size)]
    contestants = {}
    for name, extra in (named.split("=", 1) for named in ("ours=", *options.also)):
        # Options go behind those of `--ours`; words that begin with a verb take their place.
        verb, *own = shlex.split(extra if extra[:1].isalpha() else f"{options.ours} {extra}")
        fixed = f"--no-evaluate --overwrite -o {shlex.quote(str(work / name))}"
        text = ["--calibration", str(options.calibration)]
        program = [*shlex.split(options.modelzip), verb, str(options.model)]
        contestants[name] = [*program, *own, *shlex.split(fixed), *size, *text]
        contestants[name] += group if verb == "quantize" and "--group-size" not in own else []
    for name, extra in peers(options).items():
        rest = [str(options.model), str(work / name), str(options.calibration), *size, *group, "--dtype", dtype]
        contestants[name] = [*program_of(extra, options), *rest, *shlex.split(extra)[is_weight_only(extra) :]]
    return contestants


def peers(options: argparse.Namespace) -> dict[str, str]:
    """Options by name of those whose environment is given."""
    first = [f"peer={options.peer}"] if options.peer_python else []
    named = dict(one.split("=", 1) for one in (*first, *options.also_peer))
    return {
        name: extra
        for name, extra in named.items()
        if (options.weight_only_python if is_weight_only(extra) else options.peer_python)
    }


def is_weight_only(extra: str) -> bool:
    """Whether options begin with the name of a library."""
    return extra[:1].isalpha()


def program_of(extra: str, options: argparse.Namespace) -> list[str]:
    if is_weight_only(extra):
        return [options.weight_only_python, str(HERE / "peer_weight_only.py"), shlex.split(extra)[0]]
    return [options.peer_python, str(HERE / "peer_llmcompressor.py")]


def unpacked(command: list[str], folder: Path, *, is_peer: bool) -> Path:
    """The folder that agreement.py can open: of a peer of weights alone, what its library makes of them."""
    if not is_peer:
        return folder
    subprocess.run([*command, "--dense"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "dense"


def packed_mb(folder: Path) -> float:
    """Size of the weights on disk."""
    files = (file for ending in ("safetensors", "pt", "bin") for file in folder.rglob(f"*.{ending}"))
    return round(sum(file.stat().st_size for file in files if file.parent.name != "dense") / 1e6, 1)


def shown(command: list[str], options: argparse.Namespace, work: Path) -> str:
    """A command as it goes into the results: without this machine's paths."""
    names = {str(options.model): "MODEL", str(options.calibration): "CALIBRATION"}
    names |= {str(options.peer_python): "PYTHON", str(options.weight_only_python): "PYTHON"}
    places = {str(work): "WORK", str(HERE): "benchmarks", str(Path(sys.executable).parent): "BIN"}
    words = [names.get(word, word) for word in command]
    for place, name in places.items():
        words = [word.replace(place, name) for word in words]
    return shlex.join(words)


def arithmetic(model: Path, *, tokens: int) -> dict[str, float]:
    """TFLOP that GPTQ needs at least on a Llama: one forward, four symmetric Hessians a block, the column updates."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "num_key_value_heads" not in config or "intermediate_size" not in config:
        return {}
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = 2 * hidden * (hidden + keys) + 3 * hidden * inner  # of one block
    updates = 2 * hidden * (hidden + keys) * hidden + 2 * hidden * inner * hidden + hidden * inner * inner
    flop = {
        "forward": 2 * tokens * weights * layers,
        "hessians": tokens * (3 * hidden**2 + inner**2) * layers,
        "updates": updates * layers,
    }
    return {name: round(value / 1e12, 3) for name, value in flop.items()}


def versions(python: str, names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-P", "-c", VERSIONS, *names], text=True))
    return found


def described(text: Path) -> dict[str, str]:
    return {"name": text.name, "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}


def report(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run everything and gather what goes into the results."""
    ceilings = script("ceilings.py")
    fast = "bfloat16" if ceilings["cpu"]["bf16_units"] else "float32"
    dtype = fast if options.peer_dtype == "auto" else options.peer_dtype
    contest = commands(options, work, dtype)
    peer_versions = versions(options.peer_python, ("llmcompressor", *LIBRARIES)) if options.peer_python else {}
    others = {name: shlex.split(extra)[0] for name, extra in peers(options).items() if is_weight_only(extra)}
    if others:
        peer_versions |= versions(options.weight_only_python, tuple(sorted(set(others.values()))))
    runs = summarise(alternate(contest, rounds=options.rounds, logs=work))
    agreed = {}
    for name in contest if options.windows else ():
        print(f"agreement: {name}", file=sys.stderr, flush=True)
        limits = ("--windows", str(options.windows))
        folder = unpacked(contest[name], work / name, is_peer=name in others)
        agreed[name] = script("agreement.py", options.model, folder, options.evaluation, *limits)
        agreed[name]["disk_mb"] = packed_mb(work / name)
    reports = {name: work / name / "report.json" for name in contest if (work / name / "report.json").is_file()}
    work_tflop = arithmetic(options.model, tokens=options.samples * options.seq_len)
    rate = max(ceilings["gflops"][fast].values())
    return {
        "commands": {name: shown(command, options, work) for name, command in contest.items()},
        "model": options.model.name,
        "calibration": described(options.calibration),
        "evaluation": described(options.evaluation),
        "versions": {name: metadata.version(name) for name in ("modelzip", *LIBRARIES)},
        "peer_versions": peer_versions,
        "peer_dtype": dtype,
        "peer_dtype_reason": f"this CPU's matrix units are fastest in {fast}",
        "ceilings": ceilings,
        "arithmetic_tflop": work_tflop,
        "seconds_at_matrix_rate": round(sum(work_tflop.values()) * 1000 / rate, 1),
        "results": runs,
        "phases_s": {
            name: json.loads(file.read_text(encoding="utf-8"))["time"]["phases"] for name, file in reports.items()
        },
        "agreement": agreed,
    }


def tables(found: dict[str, Any]) -> str:
    cpu, gflops = found["ceilings"]["cpu"], found["ceilings"]["gflops"]
    rates = ", ".join(f"{dtype} {max(of.values()):.0f} GFLOP/s" for dtype, of in gflops.items())
    header = ("", "perplexity", "KL", "top-1 %", "weights MB")
    rows = [
        (name, f"{of['perplexity']:.2f}", f"{of['kl']:.4f}", f"{of['top1_percent']:.1f}", of["disk_mb"])
        for name, of in found["agreement"].items()
    ]
    named = ", ".join(f"{name} {version}" for name, version in found["peer_versions"].items())
    peer = (
        f"Peer: {named}; run in {found['peer_dtype']}: {found['peer_dtype_reason']}." if named else "No peer was run."
    )
    dense = {f"{of['perplexity_original']:.2f}" for of in found["agreement"].values()}
    lines = [
        f"{cpu['name']}, {cpu['cores']} cores, {', '.join(cpu['features'])}; {rates}; copy "
        f"{found['ceilings']['copy_gb_per_s']} GB/s. Least arithmetic {found['arithmetic_tflop']} TFLOP: "
        f"{found['seconds_at_matrix_rate']} s at the matrix rate.",
        peer,
        table(found["results"]),
        markdown(header, rows),
        f"Perplexity of the original: {', '.join(dense) or 'not measured'}.",
    ]
    return "\n\n".join(lines)


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        complete(options, work)
        found = report(options, work)
    (HERE / "results").mkdir(exist_ok=True)
    target = HERE / "results" / f"{options.name}.json"
    target.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(tables(found))


if __name__ == "__main__":
    main()
