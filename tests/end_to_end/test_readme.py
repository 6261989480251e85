"""The README and docs/ are true: their examples run, their links lead somewhere, their options exist.

A page is run from top to bottom in a folder that holds what its examples name: `my-model` (a pico Llama with a byte
tokenizer), `my-classifier` (a pico BERT), `wiki.txt`, `wiki-test.txt`, and labelled sentences that the classifier can
learn, `train.tsv` and `dev.tsv`. By the words behind the language of a fenced block:

    ```bash, ```python            is run, and must end with exit code 0
    ```bash no-test: REASON       is not run
    ```yaml FILE                  is written to FILE
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from modelzip.recipes.files import library
from modelzip.recipes.schema import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REPRESENTATIVE = frozenset({"README.md", "run.md", "distill.md"})
BLOCK = re.compile(r"^```(?P<language>\w*) *(?P<note>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
VERBS = (
    *STAGES,
    "run",
    "sweep",
    "evaluate",
    "export",
    "inspect",
    "compare",
    "methods",
    "recipe check",
    "recipe show",
    "recipe schema",
)
ACCELERATE = {"--cpu", "--use_fsdp", "--fsdp_version", "--use_deepspeed", "--zero_stage", "--zero3_save_16bit_model"}
NOT_OURS = {"--strict", *ACCELERATE}  # options of other programs that the pages name


@dataclass(frozen=True)
class Block:
    language: str
    note: str
    body: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.note.startswith("no-test")


def blocks(page: Path) -> list[Block]:
    return [Block(**found.groupdict()) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def environment(home: Path) -> dict[str, str]:
    """No network, no user's settings, and the `modelzip` of this interpreter first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    fixed = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "NO_COLOR": "1", "COLUMNS": "200"}
    return {**os.environ, **fixed, "PATH": path}


def text(seed: int, characters: int) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(300)]
    return " ".join(draw.choices(words, k=characters // 4))[:characters]


@pytest.fixture(scope="module")
def pico(
    tmp_path_factory: pytest.TempPathFactory, save_classifier: Callable[..., Path], write_labelled: Callable[..., Path]
) -> Path:
    """A folder with a Llama of two layers and a tokenizer of one token a byte, and a classifier with its sentences."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pico")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({byte: index + 2 for index, byte in enumerate(alphabet)} | {"<s>": 0, "</s>": 1}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "my-model")
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "my-model")
    save_classifier(folder / "my-classifier")
    _save_encoder(folder / "my-classifier", folder / "my-encoder")
    pairs = [f"{text(seed, 40)}\t{text(seed + 50, 40)}\t{seed / 50:.2f}" for seed in range(50)]
    (folder / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *pairs]) + "\n", encoding="utf-8")
    write_labelled(folder / "train.tsv", 400)
    write_labelled(folder / "dev.tsv", 100, seed=1)
    return folder


def _save_encoder(classifier: Path, folder: Path) -> None:
    """The classifier without its head."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(classifier).save_pretrained(folder)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(folder)


@cache
def help_text(verb: str) -> str:
    command = [str(Path(sys.executable).parent / "modelzip"), *verb.split(), "--help"]
    environ = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout


def run_pages() -> list[Any]:
    """The pages with examples. A command takes seconds to start, so all but a few are for the slow tests."""
    pages = [page for page in PAGES if any(block.runs for block in blocks(page))]
    marks = {page: () if page.name in REPRESENTATIVE else (pytest.mark.slow,) for page in pages}
    return [pytest.param(page, id=page.name, marks=marks[page]) for page in pages]


@pytest.mark.parametrize("page", run_pages())
def test_every_example_of_the_page_runs(page: Path, pico: Path, tmp_path: Path) -> None:
    for name in ("my-model", "my-classifier", "my-encoder", "pairs.tsv", "train.tsv", "dev.tsv"):
        (tmp_path / name).symlink_to(pico / name)
    (tmp_path / "wiki.txt").write_text(text(0, 80_000), encoding="utf-8")
    (tmp_path / "wiki-test.txt").write_text(text(1, 40_000), encoding="utf-8")
    for block in blocks(page):
        if block.language == "yaml" and block.note:
            (tmp_path / block.note).write_text(block.body, encoding="utf-8")
        if block.runs:
            interpreter = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*interpreter, block.body],
                cwd=tmp_path,
                env=environment(tmp_path / "home"),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{block.body}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_that_is_not_run_states_a_reason(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("bash", "python") and not block.runs:
            assert re.fullmatch(r"no-test: \w.{10,}", block.note), block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        if path.startswith("https:"):
            continue
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {title.lower().replace(" ", "-") for title in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_named_on_the_page_is_in_the_help_of_some_command(page: Path) -> None:
    known = set(re.findall(r"--[a-z][a-z0-9_-]*[a-z]", " ".join(help_text(verb) for verb in VERBS)))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z]", page.read_text(encoding="utf-8")))
    assert named - known - NOT_OURS == set()


def test_every_method_has_a_row_under_its_verb() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    for kind, stage in STAGES.items():
        rows = set(re.findall(r"^\| `([a-z0-9-]+)` \|", sections[kind], flags=re.MULTILINE))
        assert set(stage.methods) - rows == set(), kind


def test_every_verb_has_a_page_that_names_its_methods() -> None:
    for kind, stage in STAGES.items():
        page = (ROOT / "docs" / f"{kind}.md").read_text(encoding="utf-8")
        assert [name for name in stage.methods if f"`{name}`" not in page and f"method {name} " not in page] == [], kind


def test_every_shipped_recipe_is_listed() -> None:
    page = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    assert [name for name in library() if f"`{name}`" not in page] == []


def test_the_readme_begins_with_the_two_commands_that_the_makefile_has() -> None:
    first = blocks(ROOT / "README.md")[0]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert (ROOT / "README.md").read_text(encoding="utf-8").startswith("```bash")
    assert [line.split("#")[0].strip() for line in first.body.splitlines()] == ["make demo", "make test"]
    for page in PAGES:
        for name in re.findall(r"^make ([a-z -]+?) *(?:#|$)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert set(name.split()) <= set(targets), name


def test_every_direct_dependency_is_pinned_and_nothing_else() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    own, *others = extras["dev"]
    assert own == "modelzip[export]"
    wanted = [*project["dependencies"], *extras["export"], *others]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    assert pins == [re.split(r"[<>=~; ]", one)[0] for one in wanted]


def table_after(page: str, link: str) -> dict[str, list[str]]:
    """The cells of each row of the first table behind a link, by what the row begins with."""
    rows: dict[str, list[str]] = {}
    for line in page.partition(link)[2].splitlines():
        if line.startswith("|"):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[first] = cells
        elif rows:
            break
    return rows


def large(number: float) -> str:
    """A perplexity: some are beyond all bounds."""
    if number < 1e6:
        return f"{number:.2f}"
    digits, _, power = f"{number:.1e}".partition("e+")
    return f"{digits} × 10{str(int(power)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


GPTQ = {
    "asymmetric": "--asymmetric",
    "nf": "--grid nf",
    "gptq-3": "--bits 3",
    "mixed-4.25": "--target-bits 4.25",
    "mixed-3.25": "--target-bits 3.25",
}
"""Runs of the benchmarks by name, with the options beside `gptq` that the README shows."""

OTHERS = {
    "nf4": "modelzip `rtn --grid nf`",
    "peer-rtn": "llm-compressor `RTN`",
    "gptqmodel": "GPTQModel `GPTQ`",
    "auto-round-0": "AutoRound, 0 steps",
    "peer-nf4": "bitsandbytes `NF4`",
    "peer-hqq": "HQQ, axis 1",
    "peer-hqq-axis-0": "HQQ, axis 0",
    "auto-round": "AutoRound",
}
"""Runs by name that the README calls otherwise."""


@pytest.mark.parametrize(
    ("file", "ours", "peer"),
    [
        ("gptq-vs-peer.json", "modelzip `gptq`", "llm-compressor `GPTQ`"),
        ("methods.json", "modelzip `gptq`", "llm-compressor `GPTQ`"),
        ("weight-only.json", "modelzip `gptq`", "llm-compressor `GPTQ`"),
        ("learned-and-smoothed.json", "modelzip `smoothquant`", "llm-compressor `SmoothQuant`"),
        ("sparsegpt-vs-peer.json", "modelzip `sparsegpt`", "llm-compressor `SparseGPT`"),
        ("prune-2of4.json", "modelzip `sparsegpt`", ""),
        ("svd-80.json", "modelzip `svd-llm`", ""),
    ],
)
def test_the_results_are_those_of_the_committed_benchmarks(file, ours, peer) -> None:
    rows = table_after((ROOT / "README.md").read_text(encoding="utf-8"), f"[{file}](benchmarks/results/{file})")
    measured = json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))
    names = {"ours": ours, "peer": peer, **OTHERS}
    names |= {name: f"modelzip `gptq {options}`" for name, options in GPTQ.items()}
    for key, result in measured["results"].items():
        agreement, median = measured["agreement"][key], result["median"]
        assert rows[names.get(key, f"modelzip `{key}`")][-6:] == [
            f"{median['seconds']:.0f} s",
            f"{median['main_mb']:.0f} MB",
            f"{agreement['disk_mb']:.0f} MB",
            large(agreement["perplexity"]),
            f"{agreement['kl']:.3f}",
            f"{agreement['top1_percent']:.1f} %",
        ]


def test_the_classifiers_are_those_of_the_committed_benchmark() -> None:
    """A model with exits is told at the threshold that the README names."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = table_after(page, "[classifier.json](benchmarks/results/classifier.json)")
    results = json.loads((ROOT / "benchmarks" / "results" / "classifier.json").read_text())["results"]
    assert {name.strip("`") for name in rows if name.startswith("`")} == results.keys()
    for name, result in results.items():
        told = result["evaluation"]
        exits = [row for row in told["exits"] or () if f"below {row['threshold']:g}" in rows[f"`{name}`"][0]]
        accuracy, latency = told["accuracy"], told["latency"] or {}
        share = accuracy["compressed"]
        if exits:
            accuracy, latency = exits[0], exits[0]["latency"]
            share = accuracy["accuracy"]
        speeds = [latency[way]["speedup"] if way in latency else None for way in ("single", "batched")]
        assert rows[f"`{name}`"][1:] == [
            f"{100 * share:.1f} % ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})",
            f"{result['bytes'] / 1e6:.1f} MB",
            *("" if speed is None else f"{speed:.{2 if speed < 10 else 1}f} ×" for speed in speeds),
        ]


def test_memory_by_depth_is_that_of_the_committed_benchmark() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    depths = json.loads((ROOT / "benchmarks" / "results" / "depth.json").read_text(encoding="utf-8"))["depths"]
    told = ", ".join(f"{one['main_mb']:.0f}" for one in depths[:-1]) + f" and {depths[-1]['main_mb']:.0f} MB"
    assert f"{told}\n" in readme
