"""Keys and values rounded as they are cached: from a recipe to what transformers computes with."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from modelzip.checkpoints.cached import without_rounded_cache
from modelzip.checkpoints.errors import ModelzipError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.compressors.quantize.cache_scales import RATIOS
from modelzip.evaluation.cache_report import CACHE
from modelzip.exporters import formats
from modelzip.exporters.formats import export, refusal
from modelzip.exporters.request import Request
from modelzip.pipeline.exported import check_export
from modelzip.pipeline.inspection import inspect_models
from modelzip.pipeline.measure import streamed_model
from modelzip.pipeline.run import plan_recipe

CPU = torch.device("cpu")
INT8 = {"method": "rtn", "bits": 8, "group_size": "channel"}
CODES = ("fp8", "int8", "int4")


def stage(codes, **more):
    return {**INT8, "kv_cache": codes, **more}


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


@pytest.fixture(scope="module")
def made(speaking, compress, text_file, tmp_path_factory):
    """made("llama", "fp8", method=...) -> the report and the folder of that model, rounded; made once."""
    done = {}

    def of(family, codes, **more):
        key = (family, codes, *sorted(more.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("made") / "out"
            data = {"source": str(text_file)}
            report = compress(speaking(family), folder, stage(codes, **more), calibration=data).report
            done[key] = report, folder
        return done[key]

    return of


@torch.no_grad()
def streamed_logits(checkpoint, ids):
    return next(streamed_model(checkpoint, torch.float32, CPU).outputs([{"input_ids": ids}])).logits


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama", "compressed-tensors"), ("phi3", "compressed-tensors"), ("gpt2", "modelzip"), ("mixtral", "modelzip")],
)
def test_transformers_computes_what_was_measured_and_not_what_it_is_without_rounding(made, name, layout, codes, models):
    """Measured: 0, and 0.0025 to 0.33 from the model that caches keys and values as they are."""
    _, folder = made(name, codes)
    assert config_of(folder)["quant_method"] == layout
    checkpoint, ids = Checkpoint.open(str(folder)), models.tokens(length=24) % 64
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = opened(ids).logits
        whole = load_whole(checkpoint, dtype=torch.float32, device=CPU)(input_ids=ids).logits
    torch.testing.assert_close(streamed_logits(checkpoint, ids), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4)
    without = streamed_logits(without_rounded_cache(checkpoint), ids)
    assert float((without - wanted).norm() / wanted.norm()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_token_by_token_through_the_cache_gives_what_it_gives_at_once(made, name, models):
    """What lies in the cache is rounded once, and what is read from it are multiples of the scales."""
    _, folder = made(name, "int4")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, cache = models.tokens(length=10) % 64, transformers.DynamicCache()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        steps = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    modules = [module for path, module in model.named_modules() if path.endswith((".self_attn", ".attn"))]
    for module, layer in zip(modules, cache.layers, strict=True):
        for leaf, held in (("k_scale", layer.keys), ("v_scale", layer.values)):
            codes = held / getattr(module, leaf)
            torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
            assert -8 <= float(codes.min()) <= float(codes.max()) <= 7.001


@torch.no_grad()
def cached_by_transformers(model, windows):
    """[(keys, values)] of each layer, [windows, heads, tokens, dim]."""
    cache = transformers.DynamicCache()
    model(windows, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("codes", CODES)
def test_scales_are_those_of_what_the_compressed_model_caches_on_the_calibration_text(
    made, speaking, windows, weights_in, tensors_of, codes
):
    """Against transformers' own cache, in the original with the compressed weights made dense."""
    _, folder = made("llama", codes, method="gptq", bits=4, group_size=16)
    model = transformers.LlamaForCausalLM.from_pretrained(speaking("llama")).eval()
    before = cached_by_transformers(model, windows)
    for name, weight in weights_in(folder).items():
        model.get_submodule(name).weight.data.copy_(weight.dense())
    stored = tensors_of(folder)
    for number, pair in enumerate(cached_by_transformers(model, windows)):
        for leaf, held, original in zip(("k_scale", "v_scale"), pair, before[number], strict=True):
            scale = stored[f"model.layers.{number}.self_attn.{leaf}"]
            if codes == "fp8":
                torch.testing.assert_close(scale, held.abs().max()[None] / 448, rtol=1e-5, atol=0)
                assert not torch.allclose(scale, original.abs().max()[None] / 448, rtol=1e-5, atol=0)
                continue
            highest = {"int8": 127, "int4": 7}[codes]
            assert scale.shape == (2, 1, 1)
            ratio = scale.flatten() * highest / held.abs().amax((0, 2, 3))
            nearest = torch.tensor(RATIOS)[(ratio[:, None] - torch.tensor(RATIOS)).abs().argmin(1)]
            torch.testing.assert_close(ratio, nearest, rtol=1e-4, atol=0)
            assert bool(
                (error(held, scale, highest) <= 1.001 * error(held, scale / ratio[:, None, None], highest)).all()
            )


def error(held, scale, highest):
    """Squared, of each head."""
    return ((held - (held / scale).round().clamp(-highest - 1, highest) * scale) ** 2).sum((0, 2, 3))


@pytest.mark.parametrize(("codes", "bits", "heads"), [("fp8", 8, 1), ("int8", 8, 2), ("int4", 4, 2)])
def test_the_report_and_the_plan_say_what_a_token_takes(made, speaking, recipe_of, tmp_path, codes, bits, heads):
    report, folder = made("llama", codes)
    numbers = 2 * 2 * 2 * 8  # layers, keys and values, heads, numbers of each
    found = report["stages"][0]["details"][CACHE]
    assert (found["codes"], found["bits"], found["bits_before"]) == (codes, bits, 32)
    assert (found["bytes_per_token"], found["bytes_per_token_before"]) == (numbers * bits // 8, numbers * 4)
    assert found["tokens"] == 8 * 16
    assert 0 < found["error_of_keys"] < 0.2
    line = f"{numbers * bits // 8} bytes a token instead of {numbers * 4}"
    assert f"cache {line}" in " ".join(report["plan"]["notes"])
    assert line in (folder / "report.md").read_text(encoding="utf-8")
    (plan,) = plan_recipe(recipe_of(speaking("llama"), stage(codes)), output=tmp_path / "out")
    assert plan.needs_data
    assert plan.bytes_after == Checkpoint.open(str(folder)).nbytes == report["size"]["bytes_after"]
    scales = 2 * 2 * heads * 4
    (plain,) = plan_recipe(recipe_of(speaking("llama"), INT8), output=tmp_path / "out")
    assert plan.bytes_after - plain.bytes_after == scales
    original = transformers.LlamaForCausalLM.from_pretrained(speaking("llama"))
    parameters = sum(parameter.numel() for parameter in original.parameters())
    assert report["size"]["parameters"] == parameters
    (inspected,) = inspect_models([Checkpoint.open(str(folder))], batch_size=1, seq_len=4, device=None)
    assert (inspected["parameters"], inspected["bytes"]) == (parameters, report["size"]["bytes_after"])


def test_words_and_scales_are_those_that_engines_read(made, tensors_of):
    _, folder = made("llama", "fp8")
    words = config_of(folder)["kv_cache_scheme"]
    assert words == {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    scales = {name: tensor for name, tensor in tensors_of(folder).items() if name.endswith(("k_scale", "v_scale"))}
    layers = [f"model.layers.{number}.self_attn.{leaf}_scale" for number in range(2) for leaf in "kv"]
    assert sorted(scales) == sorted(layers)
    assert all(scale.shape == (1,) and scale.dtype == torch.float32 for scale in scales.values())


@pytest.mark.parametrize("more", [{"method": "smoothquant"}, {"grid": "fp8-e4m3"}, {"method": "awq", "bits": 4}])
def test_other_methods_and_grids_too(speaking, compress, tmp_path, more):
    options = {"method": "rtn", "kv_cache": "int8", **more}
    report = compress(speaking("llama"), tmp_path / "out", {"quantize": options}).report
    assert report["verification"] is not None
    assert config_of(tmp_path / "out")["quant_method"] == "compressed-tensors"
    assert report["stages"][0]["details"][CACHE]["codes"] == "int8"


def test_where_weights_are_made_dense_at_load_it_is_modelzips_layout(speaking, compress, recipe_of, tmp_path):
    options = stage("fp8", symmetric=False)
    report = compress(speaking("llama"), tmp_path / "out", options).report
    assert config_of(tmp_path / "out")["quant_method"] == "modelzip"
    assert "made dense at load" in " ".join(report["plan"]["notes"])
    asked = recipe_of(speaking("llama"), {**options, "layout": "compressed-tensors"})
    with pytest.raises(ModelzipError, match="made dense at load; leave out --layout"):
        plan_recipe(asked, output=tmp_path / "other")


@pytest.mark.parametrize("step", [("cache", 0), ("cache", 1), ("quantize", 1)])
def test_a_run_that_was_killed_ends_in_the_same_bytes(
    speaking, made, compress, killed_at, tensors_of, text_file, tmp_path, step
):
    options, data = stage("int4", method="gptq", bits=4, group_size=16), {"source": str(text_file)}
    with killed_at(*step) as progress:
        compress(speaking("llama"), tmp_path / "out", options, calibration=data, progress=progress)
    compress(speaking("llama"), tmp_path / "out", options, calibration=data, resume=True)
    one = tensors_of(made("llama", "int4", method="gptq", bits=4, group_size=16)[1])
    other = tensors_of(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bits", [8, 3])
def test_a_later_stage_keeps_it_in_either_layout(speaking, compress, tensors_of, text_file, models, tmp_path, bits):
    first = {**stage("int8"), "ignore": ["*.mlp.*"]}
    later = {"quantize": {**INT8, "bits": bits, "ignore": ["*.self_attn.*"]}}
    data = {"source": str(text_file)}
    compress(speaking("llama"), tmp_path / "first", first, calibration=data)
    compress(tmp_path / "first", tmp_path / "later", later, calibration=data)
    compress(speaking("llama"), tmp_path / "both", {"quantize": first}, later, calibration=data)
    assert config_of(tmp_path / "later")["quant_method"] == ("compressed-tensors" if bits == 8 else "modelzip")
    one, two, both = (tensors_of(tmp_path / name) for name in ("first", "later", "both"))
    scales = [name for name in one if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 4
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], both[name]) for name in scales)
    ids, checkpoint = models.tokens() % 64, Checkpoint.open(str(tmp_path / "later"))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "later", dtype=torch.float32)
    with torch.no_grad():
        wanted = opened(ids).logits
    torch.testing.assert_close(streamed_logits(checkpoint, ids), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(streamed_logits(without_rounded_cache(checkpoint), ids), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "first", "later", "told"),
    [
        ("bert", None, stage("fp8"), "kv_cache: BertModel keeps no cache of keys and values: leave kv_cache out"),
        ("bart", None, stage("int8"), "keeps two caches"),
        ("llama", {}, stage("fp8", ignore=["*.self_attn.*"]), "is rounded to int8 already: leave kv_cache out"),
        (
            "llama",
            {},
            {**INT8, "ignore": ["*.self_attn.*"], "rotate": "heads"},
            "give kv_cache to the last stage alone",
        ),
        ("llama", {}, {"method": "awq", "ignore": ["*.self_attn.*"]}, "give kv_cache to the last stage alone"),
        ("llama", {}, {"prune": {"method": "layers", "count": 1}}, "give kv_cache to the last stage alone"),
        ("llama", {}, {"distill": {"method": "logits", "data": "x.txt"}}, "give kv_cache to the last stage alone"),
        ("llama", None, {**INT8, "rules": [{"match": "*.mlp.*", "kv_cache": "fp8"}]}, "kv_cache"),
        ("llama", None, {**INT8, "kv_cache": "int2"}, "kv_cache"),
    ],
)
def test_what_can_not_be_is_told_before_any_work(speaking, recipe_of, tmp_path, model, first, later, told):
    stages = [later] if first is None else [{**stage("int8"), "ignore": ["*.mlp.*"]}, later]
    with pytest.raises(ModelzipError) as refused:
        plan_recipe(recipe_of(speaking(model), *stages), output=tmp_path / "out")
    assert told in str(refused.value)


def test_formats_that_do_not_say_it_hold_the_model_without_and_tell(made, tensors_of, tmp_path):
    _, folder = made("llama", "int4")
    checkpoint = Checkpoint.open(str(folder))
    written = export(Request(checkpoint, tmp_path / "dense"), "dense")
    assert written.notes == ("keys and values are rounded no more, which dense doesn't say",)
    assert written.rounded == ()
    assert not [name for name in tensors_of(tmp_path / "dense") if name.endswith("k_scale")]
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    assert check_export(checkpoint, "dense", written)["max_logit_difference"] < 1e-4


def test_what_has_no_rounded_cache_is_held_as_it_is(speaking, compress, tmp_path):
    compress(speaking("llama"), tmp_path / "out", {"method": "rtn", "bits": 4})  # kv_cache_scheme: null
    checkpoint = Checkpoint.open(str(tmp_path / "out"))
    assert formats.held(checkpoint, "dense") is checkpoint


def test_compressed_tensors_keeps_it(made, speaking, compress, tensors_of, tmp_path):
    compress(speaking("llama"), tmp_path / "own", stage("int4", layout="modelzip"))
    checkpoint = Checkpoint.open(str(tmp_path / "own"))
    for scheme in ("auto", "W8A8"):
        written = export(Request(checkpoint, tmp_path / scheme, scheme), "compressed-tensors")
        assert written.notes == ()
        assert config_of(tmp_path / scheme)["kv_cache_scheme"] == config_of(tmp_path / "own")["kv_cache_scheme"]
        one, other = tensors_of(tmp_path / "own"), tensors_of(tmp_path / scheme)
        assert all(torch.equal(one[name], other[name]) for name in one if name.endswith(("k_scale", "v_scale")))
    found = check_export(
        checkpoint, "compressed-tensors", export(Request(checkpoint, tmp_path / "x"), "compressed-tensors")
    )
    assert found["max_logit_difference"] < 1e-4
    other = Request(Checkpoint.open(str(made("opt", "fp8")[1])), tmp_path / "opt")
    assert "has no num_key_value_heads" in (refusal(other, "compressed-tensors") or "")
