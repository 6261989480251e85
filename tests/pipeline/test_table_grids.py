"""Weights on tables of values, from a recipe to a model that plain `from_pretrained` opens."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import modelzip.weights  # noqa: F401  # teaches the layout to transformers
from modelzip.checkpoints.errors import ModelzipError
from modelzip.compressors.quantize.settings import Rtn
from modelzip.pipeline.run import plan_recipe
from modelzip.weights.codebook import Codebook
from modelzip.weights.low_rank import LowRank

GRIDS = [
    {"grid": "nf", "group_size": 16},
    {"grid": "af", "bits": 3, "group_size": 16},
    {"grid": "fp4", "group_size": "channel"},
    {"grid": "kmeans", "bits": 3, "group_size": "channel"},
    {"grid": "kmeans", "bits": 2, "group_size": "tensor"},
]


@pytest.mark.parametrize("settings", GRIDS, ids=str)
@pytest.mark.parametrize(("model", "method"), [("llama", "rtn"), ("llama", "gptq"), ("bert", "gptq")])
def test_the_output_opens_as_the_very_weights_and_has_the_size_that_was_planned(
    speaking, compress, recipe_of, tmp_path, model, method, settings, weights_in
):
    stage = {"method": method, **settings}
    (plan,) = plan_recipe(recipe_of(speaking(model), stage), output=tmp_path / "out")
    report = compress(speaking(model), tmp_path / "out", stage).report
    assert report["size"]["bytes_after"] == plan.bytes_after
    assert not report["fallbacks"]
    weights = weights_in(tmp_path / "out")
    assert weights
    assert all(isinstance(weight, Codebook) for weight in weights.values())
    opened = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in weights.items():
        module = opened.get_submodule(name.removeprefix("model."))
        assert torch.equal(module.weight_value.dense(), weight.dense())
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        bias = 0 if module.bias is None else module.bias
        assert torch.allclose(module(x), x @ weight.dense().T + bias, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "modelzip"


def test_hqq_is_written_with_an_offset_a_group(speaking, compress, recipe_of, tmp_path, weights_in):
    stage = {"method": "hqq", "bits": 3, "group_size": 16}
    (plan,) = plan_recipe(recipe_of(speaking("llama"), stage), output=tmp_path / "out")
    report = compress(speaking("llama"), tmp_path / "out", stage).report
    assert report["size"]["bytes_after"] == plan.bytes_after
    weight = next(iter(weights_in(tmp_path / "out").values()))
    assert isinstance(weight, Codebook)
    assert weight.offset is not None
    shares = {module["form"] for module in report["modules"]}
    along = "evenly, group 16 along the rows with offsets", "evenly, one scale a column with offsets"
    assert shares == {f"3 bit, {words}" for words in along}  # key and value projections have 16 rows


def test_hqq_of_an_embedding_has_groups_of_one_tokens_numbers(speaking, compress, tmp_path, weights_in):
    compress(speaking("llama"), tmp_path / "out", {"method": "hqq", "group_size": 16, "embeddings": True})
    (table,) = (weight for name, weight in weights_in(tmp_path / "out").items() if "embed_tokens" in name)
    assert (table.group_rows, table.group_size) == (1, 16)


def test_gptq_loses_less_than_rounding_on_the_same_tables(speaking, compress, tmp_path):
    errors = []
    for method in ("rtn", "gptq"):
        stage = {"method": method, "grid": "nf", "bits": 3, "group_size": 16}
        report = compress(speaking("llama"), tmp_path / method, stage, evaluate={"enabled": True}).report
        errors.append(report["evaluation"]["kl"])
    assert errors[1] < 0.9 * errors[0]


def test_tables_of_embeddings_and_factors_take_them_too(speaking, compress, tmp_path, weights_in):
    compress(speaking("llama"), tmp_path / "out", {"method": "rtn", "grid": "nf", "group_size": 16, "embeddings": True})
    assert any("embed_tokens" in name for name in weights_in(tmp_path / "out"))
    factored = {"factorize": {"method": "svd", "ratio": 0.5}}
    tensor = {"method": "rtn", "grid": "kmeans", "group_size": "tensor"}
    compress(speaking("llama"), tmp_path / "thin", factored, tensor)
    thin = next(iter(weights_in(tmp_path / "thin").values()))
    assert isinstance(thin, LowRank)
    assert isinstance(thin.left, Codebook)


def test_what_is_pruned_is_refused_before_any_work(speaking, recipe_of, tmp_path):
    stages = {"prune": {"method": "magnitude", "sparsity": 0.5}}, {"method": "rtn", "grid": "nf", "group_size": 16}
    with pytest.raises(ModelzipError, match="it is pruned, and with the grid nf it would not stay sparse: take rtn"):
        plan_recipe(recipe_of(speaking("llama"), *stages), output=tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"grid": "nf", "symmetric": False}, "asymmetric is of the grid int; nf has no zero points"),
        ({"grid": "nf", "group_size": "tensor"}, "has one scale a group or a row: choose a number, or channel"),
        ({"grid": "fp4", "bits": 3}, "the grid fp4 has 4 bits, not 3"),
        ({"grid": "kmeans", "group_size": 16}, "has a table a row (group_size channel) or a matrix (tensor)"),
        (
            {"grid": "kmeans", "group_size": "channel", "clip": "none"},
            "the grid kmeans has no range to clip: leave clip out",
        ),
        ({"grid": "nf4"}, "nf"),
    ],
)
def test_settings_that_do_not_go_together_are_named(speaking, recipe_of, settings, told):
    with pytest.raises(ModelzipError) as refused:
        recipe_of(speaking("llama"), {"method": "rtn", **settings})
    assert told in str(refused.value)


def test_k_means_has_a_table_a_row_unless_told():
    assert Rtn(grid="kmeans").group_size == "channel"
    assert Rtn(grid="kmeans").label == "rtn-kmeans-4bit"
    assert Rtn(grid="nf").group_size == 128


def test_a_table_does_not_fit_into_compressed_tensors(speaking, recipe_of, tmp_path):
    stage = {"method": "rtn", "grid": "nf", "group_size": 16, "layout": "compressed-tensors"}
    with pytest.raises(ModelzipError, match="leave out --layout, or choose modelzip"):
        plan_recipe(recipe_of(speaking("llama"), stage), output=tmp_path / "out")
