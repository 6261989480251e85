"""Floats and few levels, from a recipe to a model that `from_pretrained` opens, without modelzip where it can."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

import modelzip.weights  # noqa: F401  # teaches the layout to transformers
from modelzip.checkpoints.errors import ModelzipError
from modelzip.compressors.quantize.settings import Gptq, Rtn
from modelzip.pipeline.run import plan_recipe
from modelzip.recipes.match import settings_for
from modelzip.weights.affine import Affine
from modelzip.weights.codebook import Codebook
from modelzip.weights.float import Float

PORTABLE = {
    "fp8-e4m3": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "ternary": "pack-quantized",
}
OWN = [
    ({"grid": "fp8-e4m3", "group_size": 16}, Float),
    ({"grid": "fp8-e5m2", "group_size": "tensor"}, Float),
    ({"grid": "nvfp4", "layout": "modelzip"}, Float),
    ({"grid": "mxfp4", "group_size": 32, "layout": "modelzip"}, Float),
    ({"grid": "binary", "group_size": 16}, Codebook),
]
MX = {"method": "rtn", "grid": "mxfp4", "group_size": 32}


@pytest.mark.parametrize("grid", PORTABLE)
@pytest.mark.parametrize(("model", "method"), [("llama", "rtn"), ("bert", "gptq")])
def test_engines_open_the_output_without_modelzip(
    speaking, compress, recipe_of, tmp_path, model, method, grid, weights_in
):
    stage = {"method": method, "grid": grid, "group_size": Rtn(grid=grid).group_size if grid != "ternary" else 16}
    (plan,) = plan_recipe(recipe_of(speaking(model), stage), output=tmp_path / "out")
    report = compress(speaking(model), tmp_path / "out", stage).report
    assert report["size"]["bytes_after"] == plan.bytes_after
    assert not report["fallbacks"]
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", PORTABLE[grid])
    weights = weights_in(tmp_path / "out")
    bits = sum(8 * weight.nbytes for weight in weights.values()) / sum(
        weight.shape[0] * weight.shape[1] for weight in weights.values()
    )
    assert report["size"]["bits_per_weight"] == pytest.approx(bits)
    assert all(isinstance(weight, Affine if grid == "ternary" else Float) for weight in weights.values())
    name, weight = next(iter(weights.items()))
    program = (
        "import sys, torch, transformers; "
        f"model = transformers.AutoModel.from_pretrained({str(tmp_path / 'out')!r}); "
        "model(torch.arange(3, 9)[None]); "
        "assert not any(name.startswith('modelzip') for name in sys.modules); "
        f"torch.save(model.get_submodule({name.removeprefix('model.')!r}).weight.detach(), {str(tmp_path / 'w.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "w.pt").float(), weight.dense())


@pytest.mark.parametrize(("settings", "kind"), OWN, ids=str)
def test_the_rest_opens_through_the_plug_in_as_the_very_weights(
    speaking, compress, recipe_of, tmp_path, settings, kind, weights_in
):
    stage = {"method": "gptq", **settings}
    (plan,) = plan_recipe(recipe_of(speaking("llama"), stage), output=tmp_path / "out")
    report = compress(speaking("llama"), tmp_path / "out", stage).report
    assert report["size"]["bytes_after"] == plan.bytes_after
    weights = weights_in(tmp_path / "out")
    assert weights
    assert all(isinstance(weight, kind) for weight in weights.values())
    for dtype in (torch.float32, torch.float16):
        opened = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).to(dtype)
        for name, weight in weights.items():
            module = opened.get_submodule(name.removeprefix("model."))
            if dtype == torch.float32 or weight.dtype == torch.bfloat16:  # plain scales are cast with the model
                assert torch.equal(module.weight_value.dense(), weight.dense())
            x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
            found, wanted = module(x.to(dtype)).float(), x @ weight.dense().T
            assert float((found - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_a_later_stage_carries_floats_into_its_own_layout_and_back(speaking, compress, tmp_path, weights_in):
    kept = {"method": "rtn", "grid": "fp8-e4m3", "group_size": "channel", "ignore": ["*.mlp.*"]}
    compress(speaking("llama"), tmp_path / "one", kept)
    before = weights_in(tmp_path / "one")
    compress(tmp_path / "one", tmp_path / "two", {"prune": {"method": "magnitude", "ignore": ["*.self_attn.*"]}})
    after = weights_in(tmp_path / "two")
    assert len(after) > len(before) > 0
    opened = transformers.AutoModel.from_pretrained(tmp_path / "two", dtype=torch.float32)
    for name, weight in before.items():
        assert torch.equal(opened.get_submodule(name.removeprefix("model.")).weight_value.dense(), weight.dense())


def test_embeddings_and_factors_take_floats_too(speaking, compress, tmp_path, weights_in):
    compress(speaking("llama"), tmp_path / "out", {**MX, "embeddings": True})
    assert any("embed_tokens" in name for name in weights_in(tmp_path / "out"))
    factored = {"factorize": {"method": "svd", "ratio": 0.5}}
    compress(
        speaking("llama"), tmp_path / "thin", factored, {"method": "rtn", "grid": "fp8-e4m3", "group_size": "channel"}
    )
    thin = next(iter(weights_in(tmp_path / "thin").values()))
    assert isinstance(thin.left, Float)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"grid": "int", "bits": 1}, "1 bit is of the grid binary; int has 2 to 8"),
        ({"grid": "binary", "bits": 4}, "the grid binary has 1 bit, not 4"),
        ({"grid": "ternary", "bits": 4}, "the grid ternary has 2 bits, not 4"),
        ({"grid": "ternary", "clip": "none"}, "the grid ternary has no range to clip: leave clip out"),
        ({"grid": "binary", "group_size": "tensor"}, "has one scale a group or a row: choose a number, or channel"),
        ({"grid": "mxfp4", "group_size": 64}, "the grid mxfp4 has blocks of 32 columns: leave group_size out"),
        ({"grid": "nvfp4", "symmetric": False}, "asymmetric is of the grid int; nvfp4 has no zero points"),
        ({"grid": "fp8-e4m3", "bits": 4}, "the grid fp8-e4m3 has 8 bits, not 4"),
    ],
)
def test_settings_that_do_not_go_together_are_named(speaking, recipe_of, settings, told):
    with pytest.raises(ModelzipError) as refused:
        recipe_of(speaking("llama"), {"method": "rtn", **settings})
    assert told in str(refused.value)


def test_a_grid_settles_bits_and_groups():
    made = {grid: Rtn(grid=grid) for grid in ("binary", "ternary", "fp8-e4m3", "fp8-e5m2", "mxfp4", "nvfp4")}
    assert [one.bits for one in made.values()] == [1, 2, 8, 8, 4, 4]
    assert [one.group_size for one in made.values()] == [128, 128, "channel", "channel", 32, 16]
    assert [Gptq(grid="nvfp4").label, Rtn(grid="nf").label] == ["gptq-nvfp4", "rtn-nf-4bit"]


def test_a_rule_may_name_another_grid(speaking, recipe_of):
    stage = {**MX, "rules": [{"match": "*.q_proj", "grid": "fp8-e4m3"}]}
    (one,) = recipe_of(speaking("llama"), stage).stages
    found = settings_for(one, "model.layers.0.self_attn.q_proj")
    assert (found.grid, found.bits) == ("fp8-e4m3", 8)
    mixed = {"method": "rtn", "bits": 3, "rules": [{"match": "*.q_proj", "grid": "nf"}]}
    (one,) = recipe_of(speaking("llama"), mixed).stages
    assert settings_for(one, "model.layers.0.self_attn.q_proj").bits == 3


def test_columns_that_are_no_whole_blocks_are_left_alone_with_the_reason(speaking, recipe_of, tmp_path):
    stages = {"factorize": {"method": "svd", "rank": 12}}, MX
    with pytest.raises(ModelzipError, match="12 columns aren't whole blocks of 32"):
        plan_recipe(recipe_of(speaking("llama"), *stages), output=tmp_path / "out")


@pytest.mark.parametrize("grid", ["mxfp4", "nvfp4", "fp8-e4m3"])
def test_a_model_whose_config_names_no_type_opens_in_that_of_its_weights(saved, compress, tmp_path, grid):
    folder = shutil.copytree(saved("bert"), tmp_path / "untyped")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    size = {"mxfp4": 32, "nvfp4": 16, "fp8-e4m3": "channel"}[grid]
    stage = {"method": "rtn", "grid": grid, "group_size": size, "ignore": ["*.output.dense"]}
    compress(folder, tmp_path / "out", stage)
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float32
