"""Which modules cache keys and values, in every family."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module

from modelzip.checkpoints.cached import cached_modules, unopened_by_compressed_tensors
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton

WITHOUT = {"bert", "bert-classifier", "bert-mlm", "minilm", "roberta", "distilbert"}
TWO = {"t5", "bart", "switch"}
ELSEWHERE = {"gpt2", "gpt-neox", "opt"}
"""Families whose cache compressed-tensors doesn't round."""


@pytest.fixture(scope="module")
def of_family(saved):
    """of_family(name) -> the skeleton of that pico model, in the type that fused experts take on the meta device."""
    return lambda name: skeleton(Checkpoint.open(str(saved(name))), dtype=torch.bfloat16)


def test_modules_and_shapes_are_those_of_transformers_own_cache(family, models, of_family):
    if family in WITHOUT | TWO:
        told = "keeps two caches" if family in TWO else "keeps no cache of keys and values"
        with pytest.raises(CheckpointError, match=told):
            cached_modules(of_family(family))
        return
    model = models.FAMILIES[family].build()
    with torch.no_grad():
        layers = model(models.tokens(), use_cache=True).past_key_values.layers
    found = cached_modules(of_family(family))
    shapes = [(layer.keys.shape[1], (layer.keys.shape[3], layer.values.shape[3])) for layer in layers]
    assert [(one.heads, one.widths) for one in found] == shapes
    assert all(type(model.get_submodule(one.module)).__name__.endswith("Attention") for one in found)
    assert [one.numbers for one in found] == [layer.keys[0, :, 0].numel() * 2 for layer in layers]


def test_what_compressed_tensors_would_round_is_known(family, models, of_family):
    if family in WITHOUT | TWO:
        return
    heads = {one.module: one.heads for one in cached_modules(of_family(family))}
    model = models.FAMILIES[family].build()
    theirs = {name for name, module in model.named_modules() if is_cached_attention_module(module)}
    told = unopened_by_compressed_tensors(model, heads, by_head=True)
    assert (told == "") == (theirs == heads.keys() and hasattr(model.config, "num_key_value_heads"))
    assert (told != "") == (family in ELSEWHERE)


def test_layers_with_different_numbers_of_heads_have_no_scales_by_head_in_compressed_tensors(models):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**models.FAMILIES["llama"].config))
    heads = {"model.layers.0.self_attn": 2, "model.layers.1.self_attn": 1}
    assert "one number of heads" in unopened_by_compressed_tensors(model, heads, by_head=True)
    assert unopened_by_compressed_tensors(model, heads, by_head=False) == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "tensor"}, "has no scales for it"),
        ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, "8-bit int by token, dynamic"),
    ],
)
def test_a_checkpoint_whose_cache_can_not_be_read_is_refused(saved, tmp_path, words, told):
    shutil.copytree(saved("llama"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "modelzip", "modules": {}, "kv_cache_scheme": words}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=told):
        skeleton(Checkpoint.open(str(tmp_path / "model")))
