"""LLM.int8() from a recipe to a model that finds outliers as it runs."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.pipeline.measure import streamed_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["llama", "bert", "gpt2"])
def test_it_opens_through_the_plug_in(speaking, compress, tmp_path, model):
    report = compress(speaking(model), tmp_path / "out", {"quantize": {"method": "llm-int8"}}).report
    assert report["verification"] is not None
    assert {module["form"] for module in report["modules"]} == {
        "8 bit, one scale a row, inputs of 8 bit, columns exact from 6"
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert {meta["inputs"]["threshold"] for meta in config["modules"].values()} == {6.0}


def test_what_is_measured_is_what_the_model_computes_and_the_threshold_counts(speaking, compress, tmp_path):
    """A threshold that some inputs of this small model reach. Measured: 0 and 2.3e-7; 0.019 from the original, 0.029
    where no column stays exact."""
    ids = torch.arange(3, 35).reshape(2, 16)
    original = transformers.AutoModelForCausalLM.from_pretrained(speaking("llama"), dtype=torch.float32)
    off = {}
    with torch.no_grad():
        exact = original(ids).logits
        for threshold in (1.0, 1e6):
            folder = tmp_path / str(threshold)
            compress(speaking("llama"), folder, {"quantize": {"method": "llm-int8", "threshold": threshold}})
            checkpoint = Checkpoint.open(str(folder))
            opened = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            streamed = next(streamed_model(checkpoint, torch.float32, CPU).outputs([{"input_ids": ids}])).logits
            whole = load_whole(checkpoint, dtype=torch.float32, device=CPU)(ids).logits
            off[threshold] = [
                float((one - two).norm() / two.norm())
                for one, two in ((streamed, opened), (whole, streamed), (opened, exact))
            ]
    assert off[1.0][0] == 0  # the same products of integers: with floats in their place, 2.3e-7
    assert off[1.0][1] < 1e-4
    assert off[1.0][2] < 0.8 * off[1e6][2]
