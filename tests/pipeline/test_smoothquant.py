"""SmoothQuant from a recipe to int8 weights and activations in compressed-tensors."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from modelzip.checkpoints.errors import ModelzipError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import decode_of
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.exporters.formats import refusal
from modelzip.exporters.request import Request
from modelzip.pipeline.measure import streamed_model
from modelzip.pipeline.run import plan_recipe
from modelzip.weights.layouts import decoder, rounds_inputs

CPU = torch.device("cpu")
STAGE = {"quantize": {"method": "smoothquant"}}


def test_it_is_stored_as_integers_that_plain_transformers_opens(lopsided, compress, recipe_of, tensors_of, tmp_path):
    (plan,) = plan_recipe(recipe_of(lopsided, STAGE), output=tmp_path / "out")
    assert plan.needs_data
    report = compress(lopsided, tmp_path / "out", STAGE).report
    assert report["verification"] is not None  # a fresh process with compressed-tensors gives the same logits
    assert report["size"]["bytes_after"] == plan.bytes_after == Checkpoint.open(str(tmp_path / "out")).nbytes
    tensors = tensors_of(tmp_path / "out")
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.int8
    count = sum(matrix.numel() for matrix in tensors.values() if matrix.dtype == torch.int8)
    scales = sum(matrix.nbytes for name, matrix in tensors.items() if name.endswith("weight_scale"))
    assert report["size"]["bits_per_weight"] == pytest.approx(8 + 8 * scales / count)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "int-quantized")
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_activations_are_rounded_in_what_is_measured_too(lopsided, compress, tmp_path):
    """The streamed model gives what compressed-tensors' linears give. Measured: 0, and 0.021 from
    a model that only has the rounded weights."""
    compress(lopsided, tmp_path / "out", STAGE)
    ids = torch.arange(3, 35)[None]
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    checkpoint = Checkpoint.open(str(tmp_path / "out"))
    with torch.no_grad():
        wanted = opened(ids).logits
        streamed = streamed_model(checkpoint, torch.float32, CPU)
        found = next(streamed.outputs([{"input_ids": ids}])).logits
        streamed = StreamedModel(checkpoint, dtype=torch.float32, device=CPU, decode=decode_of(checkpoint))
        exact = next(streamed.outputs([{"input_ids": ids}])).logits
    off, without = (float((one - wanted).norm() / wanted.norm()) for one in (found, exact))
    assert off < 1e-4
    assert without > 0.005


def test_it_loses_less_than_rounding_weights_alone_where_a_few_inputs_are_large(lopsided, compress, tmp_path):
    """Measured: 0.0007, and 0.040 for weights alone, whose small columns meet the large inputs."""
    rtn = {"quantize": {"method": "rtn", "bits": 8, "group_size": "channel", "clip": "none"}}
    mine, plain = (
        compress(lopsided, tmp_path / str(number), stage, evaluate={"enabled": True}).report["evaluation"]["kl"]
        for number, stage in enumerate((STAGE, rtn))
    )
    assert mine < 0.1 * plain


@pytest.mark.parametrize("model", ["bert", "opt", "qwen2"])
def test_encoders_and_biases_too(speaking, compress, tmp_path, model):
    report = compress(speaking(model), tmp_path / "out", STAGE).report
    assert report["verification"] is not None
    assert {module["form"] for module in report["modules"]} == {"8 bit, one scale a row, inputs of 8 bit"}


def test_a_run_that_was_killed_ends_in_the_same_bytes(lopsided, compress, killed_at, tensors_of, tmp_path):
    compress(lopsided, tmp_path / "whole", STAGE)
    with killed_at("quantize", 1) as progress:
        compress(lopsided, tmp_path / "killed", STAGE, progress=progress)
    compress(lopsided, tmp_path / "killed", STAGE, resume=True)
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("model", "settings", "told"),
    [
        ("llama", {"embeddings": True}, "embeddings have no activations to round"),
        ("llama", {"bits": 4}, "bits"),
        ("gpt2", {"layout": "compressed-tensors"}, "holds integers of 8 bits in plain linears"),
    ],
)
def test_what_can_not_be_is_told_before_any_work(speaking, recipe_of, tmp_path, model, settings, told):
    stage, folder = {"quantize": {"method": "smoothquant", **settings}}, speaking(model)
    with pytest.raises(ModelzipError) as refused:
        plan_recipe(recipe_of(folder, stage), output=tmp_path / "out")
    assert told in str(refused.value)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_mixtures_that_transformers_could_not_open_are_in_modelzips_layout(saved, recipe_of, tmp_path, name):
    (plan,) = plan_recipe(recipe_of(saved(name), STAGE), output=tmp_path / "out")
    assert plan.layout == "modelzip"
    assert any("transformers opens experts one by one through modelzip alone" in note for note in plan.notes)


def test_linears_that_lie_transposed_are_in_modelzips_layout(speaking, compress, tmp_path):
    report = compress(speaking("gpt2"), tmp_path / "out", STAGE).report
    assert report["verification"] is not None  # opened through the plug-in, which gives the same logits
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["quant_method"] == "modelzip"
    assert {meta["kind"] for meta in config["modules"].values()} == {"int8"}


@pytest.mark.parametrize("to", ["dense", "gguf", "onnx"])
def test_formats_that_do_not_round_inputs_are_refused(lopsided, compress, tmp_path, to):
    compress(lopsided, tmp_path / "out", STAGE)
    request = Request(Checkpoint.open(str(tmp_path / "out")), tmp_path / "other")
    assert f"its linears round their inputs, which {to} doesn't say" in (refusal(request, to) or "")


def test_integers_with_zero_points_or_groups_are_not_taken_for_these(lopsided, compress, tmp_path):
    compress(lopsided, tmp_path / "out", STAGE)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert rounds_inputs(config)
    decoder(config)
    for side, changed in [
        *(("weights", one) for one in ({"symmetric": False}, {"strategy": "group"}, {"num_bits": 4})),
        *(("input_activations", one) for one in ({"symmetric": False}, {"strategy": "group"}, {"num_bits": 4})),
        ("input_activations", {"strategy": "tensor"}),
    ]:
        other = json.loads(json.dumps(config))
        other["config_groups"]["group_0"][side] |= changed
        with pytest.raises(ValueError, match="quantized as compressed-tensors"):
            decoder(other)
