"""Weights into modules and out again, equal to what transformers' own loading gives."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modelzip.checkpoints.blocks import find_structure
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.reader import NameMap, materialise, release
from modelzip.checkpoints.skeleton import skeleton


def _open(folder):
    checkpoint = Checkpoint.open(str(folder))
    model = skeleton(checkpoint)
    return checkpoint, model, NameMap(model, checkpoint)


def _loaded(folder, *, dtype: torch.dtype | None = torch.float32):
    checkpoint, model, names = _open(folder)
    materialise(model, [""], checkpoint=checkpoint, names=names, device="cpu", dtype=dtype)
    return model


def test_every_weight_and_output_is_that_of_from_pretrained(family, saved, models):
    folder = saved(family)
    ours = _loaded(folder)
    theirs = getattr(transformers, models.FAMILIES[family].model_class).from_pretrained(folder).eval()
    weights, buffers = theirs.state_dict(), dict(theirs.named_buffers())
    assert ours.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in ours.named_buffers())
    pairs = list(zip(models.outputs(ours), models.outputs(theirs), strict=True))
    assert pairs
    # Weights are equal to the bit; the sums' order may follow their place in memory (2e-7 seen in one family).
    assert max((left - right).abs().max().item() for left, right in pairs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "t5", "gpt2", "qwen3-moe"])
def test_half_precision_checkpoints_in_shards_load_as_transformers_loads_them(models, tmp_path, name, dtype):
    folder = models.saved(name, tmp_path, dtype=dtype, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    ours = _loaded(folder, dtype=dtype)
    theirs = getattr(transformers, models.FAMILIES[name].model_class).from_pretrained(folder, dtype=dtype)
    for key, tensor in theirs.state_dict().items():
        assert ours.state_dict()[key].dtype == tensor.dtype, key
        assert torch.equal(ours.state_dict()[key], tensor), key


def test_only_the_modules_asked_for_get_weights_and_release_takes_them_back(saved):
    checkpoint, model, names = _open(saved("llama"))
    materialise(model, ["model.layers.1"], checkpoint=checkpoint, names=names, device="cpu", dtype=torch.float32)
    real = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert real == {name for name in model.state_dict() if name.startswith("model.layers.1.")}
    release(model, ["model.layers.1"])
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_prefix_ends_at_a_dot(models, tmp_path):
    models.FAMILIES["llama"].build(num_hidden_layers=11).save_pretrained(tmp_path)
    checkpoint, model, names = _open(tmp_path)
    materialise(model, ["model.layers.1"], checkpoint=checkpoint, names=names, device="cpu", dtype=torch.float32)
    assert model.model.layers[10].mlp.up_proj.weight.is_meta


@pytest.mark.parametrize("order", [["lm_head", "model.embed_tokens"], ["model.embed_tokens", "lm_head"]])
def test_tied_parameters_are_one_object_in_whatever_order_they_come(saved, order):
    checkpoint, model, names = _open(saved("llama-tied"))
    for prefix in order:
        materialise(model, [prefix], checkpoint=checkpoint, names=names, device="cpu", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_names_given_twice_are_tied_if_equal_and_apart_if_not(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved("llama-tied"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tied = _loaded(folder)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    apart = _loaded(folder)
    assert torch.equal(apart.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(apart.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def _without_prefix(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("name", "prefix"), [("llama-tied", "model."), ("gpt2", "transformer.")])
def test_a_checkpoint_of_the_bare_model_opens_with_a_tied_head(saved, tmp_path, name, prefix):
    folder = tmp_path / "bare"
    shutil.copytree(saved(name), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(_without_prefix(tensors, prefix), folder / "model.safetensors", metadata={"format": "pt"})
    bare, whole = _loaded(folder).state_dict(), _loaded(saved(name)).state_dict()
    assert all(torch.equal(bare[key], whole[key]) for key in whole)


def test_a_checkpoint_of_the_bare_model_lacks_an_untied_head(saved, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(saved("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(_without_prefix(tensors, "model."), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight that LlamaForCausalLM needs"):
        _open(folder)


def test_a_checkpoint_with_a_head_opens_as_the_bare_model(saved, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(saved("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    checkpoint, model, names = _open(folder)
    assert names.unused == ("lm_head.weight",)
    materialise(model, [""], checkpoint=checkpoint, names=names, device="cpu", dtype=torch.float32)
    whole = _loaded(saved("llama")).state_dict()
    assert all(torch.equal(tensor, whole[f"model.{name}"]) for name, tensor in model.state_dict().items())


def test_weights_of_another_shape_than_the_config_says_are_named(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"mlp\..*_proj\.weight has the shape .* config\.json asks for"):
        _open(folder)


def test_a_missing_expert_is_a_sentence(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "experts.3" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="experts"):
        _open(folder)


def test_fused_experts_are_read_from_one_tensor_for_each_expert(saved):
    _, _, names = _open(saved("mixtral"))
    sources = names.sources(["model.layers.0.mlp.experts.gate_up_proj"])
    assert len(sources) == 8  # 4 experts, gate and up
    assert names.source("model.layers.0.mlp.experts.gate_up_proj") is None


@pytest.fixture
def compressed(saved, tmp_path):
    """GPT-2 whose second block's c_fc is stored as two parts, and its name lacks the base model's prefix."""
    folder = tmp_path / "compressed"
    shutil.copytree(saved("gpt2"), folder)
    tensors = _without_prefix(load_file(folder / "model.safetensors"), "transformer.")
    weight = tensors.pop("h.1.mlp.c_fc.weight")
    tensors["h.1.mlp.c_fc.weight_packed"] = (weight.T * 1000).round().to(torch.int32).contiguous()
    tensors["h.1.mlp.c_fc.weight_scale"] = torch.tensor([0.001])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "own"}}))
    return folder, weight


def test_parts_of_a_compressed_linear_are_found_and_decoded(compressed):
    folder, weight = compressed
    checkpoint, model, names = _open(folder)
    assert names.parts("transformer.h.1.mlp.c_fc") == {
        "weight_packed": "h.1.mlp.c_fc.weight_packed",
        "weight_scale": "h.1.mlp.c_fc.weight_scale",
    }
    assert names.parts("transformer.h.0.mlp.c_fc") == {}

    def decode(module, parts):
        assert module == "transformer.h.1.mlp.c_fc"
        return parts["weight_packed"] * parts["weight_scale"]

    arguments = {"checkpoint": checkpoint, "names": names, "device": "cpu", "dtype": torch.float32}
    materialise(model, [""], **arguments)
    assert [name for name, parameter in model.named_parameters() if parameter.is_meta] == [
        "transformer.h.1.mlp.c_fc.weight"
    ]
    materialise(model, [""], **arguments, decode=decode)
    assert (model.transformer.h[1].mlp.c_fc.weight - weight).abs().max() <= 0.5001e-3


def test_a_compressed_linear_counts_as_a_linear(compressed):
    folder, _ = compressed
    checkpoint, model, names = _open(folder)
    found = find_structure(model, checkpoint, names=names).blocks[1].linears
    assert [linear.tensor for linear in found if linear.name.endswith("c_fc")] == ["h.1.mlp.c_fc.weight"]


def test_parts_without_a_quantization_config_are_missing_weights(compressed):
    folder, _ = compressed
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"):
        _open(folder)
