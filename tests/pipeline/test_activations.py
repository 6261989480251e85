"""Rounded activations beside rounded weights: stored, measured and opened alike."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from pydantic import ValidationError

from modelzip.checkpoints.errors import ModelzipError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import decode_of, load_whole
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.compressors.quantize.settings import Gptq, Rtn
from modelzip.exporters.formats import export, refusal
from modelzip.exporters.request import Request
from modelzip.pipeline.measure import streamed_model
from modelzip.pipeline.run import plan_recipe

CPU = torch.device("cpu")
INT8 = {"method": "rtn", "bits": 8, "group_size": "channel", "activations": "int8"}
FP8 = {"method": "rtn", "grid": "fp8-e4m3", "group_size": "channel", "activations": "fp8"}
INT4 = {"method": "gptq", "bits": 4, "group_size": 16, "activations": "int8"}
STATIC = {"activation_scales": "static"}

COMBINATIONS = {
    "int8": (INT8, "int-quantized"),
    "int8-static": (INT8 | STATIC, "int-quantized"),
    "fp8": (FP8, "float-quantized"),
    "fp8-static": (FP8 | STATIC, "float-quantized"),
    "int4-int8": (INT4, "pack-quantized"),
    "int4-fp8-static": (INT4 | STATIC | {"activations": "fp8"}, "pack-quantized"),
    "smooth-static": ({"method": "smoothquant", "group_size": "channel", **STATIC}, "int-quantized"),
    "smooth-fp8": ({"method": "smoothquant", "group_size": "channel", "activations": "fp8"}, "float-quantized"),
    "asymmetric": (INT4 | STATIC | {"method": "rtn", "symmetric": False}, None),
    "nf": (INT4 | {"method": "rtn", "grid": "nf"}, None),
    "awq": (INT4 | {"method": "awq"}, "pack-quantized"),
}


def _config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def _opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("case", COMBINATIONS)
def test_what_is_measured_is_what_transformers_computes(speaking, compress, tmp_path, case):
    """Measured: 0 for the streamed model and the whole one; 0.020 to 0.104 if inputs aren't rounded."""
    settings, layout = COMBINATIONS[case]
    report = compress(speaking("llama"), tmp_path / "out", {"quantize": settings}).report
    assert report["verification"] is not None
    assert _config(tmp_path / "out").get("format") == layout
    checkpoint = Checkpoint.open(str(tmp_path / "out"))
    assert report["size"]["bytes_after"] == checkpoint.nbytes
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        wanted = _opened(tmp_path / "out")(ids).logits
        found = next(streamed_model(checkpoint, torch.float32, CPU).outputs([{"input_ids": ids}])).logits
        whole = load_whole(checkpoint, dtype=torch.float32, device=CPU)(ids).logits
        bare = StreamedModel(checkpoint, dtype=torch.float32, device=CPU, decode=decode_of(checkpoint))
        exact = next(bare.outputs([{"input_ids": ids}])).logits
    off = [float((one - wanted).norm() / wanted.norm()) for one in (found, whole, exact)]
    assert max(off[:2]) < 1e-5
    assert off[2] > 0.01


@pytest.mark.parametrize("settings", [INT8, FP8], ids=["int8", "fp8"])
@torch.no_grad()
def test_static_scales_are_those_of_what_flows_in(
    speaking, compress, text_file, windows, tensors_of, tmp_path, settings
):
    """Against hooks on plain transformers: on the original model where nothing before is rounded yet, and for the last
    linear on the result, with everything before it rounded."""
    calibration = {"source": str(text_file), "samples": 8, "seq_len": 16}
    compress(speaking("llama"), tmp_path / "out", {"quantize": settings | STATIC}, calibration=calibration)
    tensors = tensors_of(tmp_path / "out")
    half = {"int8": 127.5, "fp8": 448}[settings["activations"]]
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    for folder, name in ((speaking("llama"), first), (tmp_path / "out", last)):
        model, seen = _opened(folder), []
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model(windows)
        assert float(tensors[f"{name}.input_scale"]) == pytest.approx(float(seen[0].abs().max()) / half, rel=1e-4)
    scales = {leaf: tensors[f"model.layers.0.self_attn.{leaf}_proj.input_scale"] for leaf in ("q", "k", "v")}
    assert scales["q"] == scales["k"] == scales["v"]


@pytest.mark.parametrize("settings", [INT8 | STATIC, INT4], ids=["int8", "int4"])
def test_encoders_too(speaking, compress, tmp_path, settings):
    report = compress(speaking("bert"), tmp_path / "out", {"quantize": settings}).report
    assert report["verification"] is not None
    (form,) = {module["form"] for module in report["modules"]}
    assert "inputs of 8 bit" in form


def test_a_run_that_was_killed_ends_in_the_same_bytes(speaking, compress, killed_at, tensors_of, tmp_path):
    """The batches that run on through what was written meet rounded inputs there, as before."""
    stage = {"quantize": INT4 | STATIC}
    compress(speaking("llama"), tmp_path / "whole", stage)
    with killed_at("quantize", 1) as progress:
        compress(speaking("llama"), tmp_path / "killed", stage, progress=progress)
    compress(speaking("llama"), tmp_path / "killed", stage, resume=True)
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"activation_scales": "static"}, "activation_scales does nothing without activations"),
        ({"activations": "int8", "embeddings": True}, "embeddings have no activations"),
        ({"activations": "int8", "target_bits": 5}, "bits are chosen for exact activations"),
        ({"activations": "int4"}, "'none', 'int8' or 'fp8'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, told):
    for method in (Rtn, Gptq):
        with pytest.raises(ValidationError, match=told):
            method(**settings)


@pytest.mark.parametrize(
    ("model", "settings", "told"),
    [
        ("llama", INT8 | {"rules": [{"match": "*.down_proj", "activations": "none"}]}, "activations"),
        ("llama", INT4 | {"method": "rtn", "grid": "nf", "layout": "compressed-tensors"}, "holds no codebook weights"),
        ("llama", FP8 | {"activations": "int8", "layout": "compressed-tensors"}, "or fp8 for either"),
    ],
)
def test_what_can_not_be_is_told_before_any_work(speaking, recipe_of, tmp_path, model, settings, told):
    with pytest.raises(ModelzipError) as refused:
        plan_recipe(recipe_of(speaking(model), {"quantize": settings}), output=tmp_path / "out")
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"prune": {"method": "magnitude", "sparsity": 0.5}}, "its inputs can't be rounded"),
        ({"factorize": {"method": "svd", "ratio": 0.5}}, "its factors can't become int8"),
    ],
)
def test_what_was_pruned_or_factorized_is_refused(speaking, compress, recipe_of, tmp_path, stage, told):
    compress(speaking("llama"), tmp_path / "before", stage)
    with pytest.raises(ModelzipError, match=told):
        plan_recipe(recipe_of(tmp_path / "before", {"quantize": INT8}), output=tmp_path / "out")


def test_matrices_of_several_layers_take_scales_by_token_alone(speaking, compress, recipe_of, tmp_path):
    share = {"factorize": {"method": "share", "groups": 1, "scope": "feed-forward"}}
    compress(speaking("llama"), tmp_path / "shared", share)
    assert compress(tmp_path / "shared", tmp_path / "out", {"quantize": INT8}).report["verification"] is not None
    (plan,) = plan_recipe(recipe_of(tmp_path / "shared", {"quantize": INT8 | STATIC}), output=tmp_path / "other")
    assert any("left alone (it serves several layers" in note for note in plan.notes)


def test_formats_without_rounded_inputs_are_refused(speaking, compress, tmp_path):
    compress(speaking("llama"), tmp_path / "out", {"quantize": INT4})
    request = Request(Checkpoint.open(str(tmp_path / "out")), tmp_path / "other")
    assert "its linears round their inputs, which gguf doesn't say" in (refusal(request, "gguf") or "")


@pytest.mark.parametrize("settings", [INT8, FP8, INT4 | {"method": "rtn"}], ids=["int8", "fp8", "int4"])
def test_what_is_in_modelzips_layout_can_be_exported(speaking, compress, tmp_path, settings):
    compress(speaking("llama"), tmp_path / "own", {"quantize": settings | STATIC | {"layout": "modelzip"}})
    assert _config(tmp_path / "own")["quant_method"] == "modelzip"
    export(Request(Checkpoint.open(str(tmp_path / "own")), tmp_path / "other"), "compressed-tensors")
    assert _config(tmp_path / "other")["quant_method"] == "compressed-tensors"
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        one, other = (_opened(tmp_path / name)(ids).logits for name in ("own", "other"))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "first",
    [
        {"method": "smoothquant", "group_size": "channel"},
        {"method": "rtn", "grid": "fp8-e4m3", "group_size": "channel", "activations": "fp8"},
        {"method": "rtn", "activations": "int8", "activation_scales": "static"},
    ],
    ids=str,
)
def test_a_later_stage_carries_them_into_its_own_layout(speaking, compress, weights_in, tmp_path, first):
    compress(speaking("llama"), tmp_path / "one", {**first, "ignore": ["*.mlp.*"]})
    before = weights_in(tmp_path / "one")
    compress(tmp_path / "one", tmp_path / "two", {"method": "rtn", "bits": 3, "ignore": ["*.self_attn.*"]})
    after = weights_in(tmp_path / "two")
    assert len(after) > len(before) > 0
    assert all(torch.equal(after[name].dense(), weight.dense()) for name, weight in before.items())
    assert all(after[name].inputs.number == weight.inputs.number for name, weight in before.items())
