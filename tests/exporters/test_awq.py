"""awq: the words are those of the published layout, and transformers with GPTQModel computes what modelzip does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.exporters import awq
from modelzip.exporters.formats import FORMATS, export
from modelzip.exporters.plain import answer_by_transformers
from modelzip.exporters.request import Request, Written
from modelzip.pipeline.exported import check_export

TOKENS = {"input_ids": torch.arange(3, 43).reshape(1, 40)}
HALF = torch.float16
SYMMETRIC, ASYMMETRIC = {"bits": 4}, {"bits": 4, "symmetric": False}
GRIDS: list[dict[str, Any]] = [
    SYMMETRIC,
    ASYMMETRIC,
    {**ASYMMETRIC, "group_size": 32},
    {**ASYMMETRIC, "group_size": "channel"},
    {**SYMMETRIC, "group_size": "tensor"},
    {**ASYMMETRIC, "rules": [{"match": "*.down_proj", "group_size": 64}]},
]
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where the format has each of eight neighbours in a word, by the lowest of its four bits."""


def exported(source: Path, output: Path, **asked: Any) -> Written:
    return export(Request(Checkpoint.open(str(source)), output, **asked), "awq")


def eights(words: Tensor) -> Tensor:
    """int32 [rows, words] to codes [rows, 8 * words]."""
    return ((words.unsqueeze(-1) >> torch.tensor(SHIFTS)) & 15).reshape(len(words), -1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_words_stand_for_the_very_weights_of_the_model(
    tensors_of: Any, config_of: Any, affine_of: Any, grid: dict[str, Any], wide: Any, compressed: Any, tmp_path: Path
) -> None:
    small = compressed("llama", wide("llama"), **grid)
    written = exported(small, tmp_path / "out")
    assert written.rounded == ()
    tensors, config = tensors_of(written.path), config_of(written.path)
    assert {key: config[key] for key in ("bits", "zero_point", "version")} == {
        "bits": 4,
        "zero_point": True,
        "version": "gemm",
    }
    weights = affine_of(small)
    assert len(weights) == 14
    for name, weight in weights.items():
        codes, zeros = (eights(tensors[f"{name}.{suffix}"]) for suffix in ("qweight", "qzeros"))
        scales = tensors[f"{name}.scales"]
        assert scales.dtype == HALF
        size = weight.shape[1] if config["group_size"] == -1 else config["group_size"]
        assert codes.shape == weight.shape[::-1]
        assert zeros.shape == scales.shape == (weight.shape[1] // size, weight.shape[0])
        zeros, scales = (one.repeat_interleave(size, dim=0) for one in (zeros, scales))
        assert torch.equal(((codes - zeros).to(HALF) * scales).T, weight.dense(HALF))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptqmodel_unpacks_the_very_weights_of_the_model(
    affine_of: Any, grid: dict[str, Any], wide: Any, compressed: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    small = compressed("llama", wide("llama"), **grid)
    folder = exported(small, tmp_path / "out").path
    plain = transformers.AwqConfig(backend="torch_awq")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=plain)
    for name, weight in affine_of(small).items():
        layer = model.get_submodule(name)
        found = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
        assert torch.equal(found.T, weight.dense(HALF))


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("llama-tied", SYMMETRIC),
        ("llama-tied", ASYMMETRIC),
        ("qwen2", ASYMMETRIC),
        ("opt", SYMMETRIC),
        ("bert-classifier", ASYMMETRIC),
        ("bart", SYMMETRIC),
        ("mixtral", ASYMMETRIC),
    ],
    ids=str,
)
def test_transformers_computes_what_the_model_computes(
    name: str, grid: dict[str, Any], models: Any, compressed: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    small = compressed(name, models.saved(name, tmp_path / "source", dtype=HALF), **grid)
    found = awq.answer(exported(small, tmp_path / "out").path, TOKENS)
    wanted = answer_by_transformers(small, TOKENS)
    assert (found - wanted).abs().max() / wanted.abs().max() < 5e-3  # measured: at most 2.1e-3, products are fp16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_of_an_export_is_gptqmodels_answer(
    dtype: torch.dtype, models: Any, compressed: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    small = compressed("llama", models.saved("llama", tmp_path / "source", dtype=dtype), **ASYMMETRIC)
    proof = check_export(Checkpoint.open(str(small)), "awq", exported(small, tmp_path / "out"))
    difference = proof["max_logit_difference"] / proof["largest_logit"]
    assert difference < FORMATS["awq"].precision  # measured: 2.3e-3 of fp32, 1.1e-2 of bf16


def test_linears_left_dense_open_dense(config_of: Any, models: Any, compressed: Any, tmp_path: Path) -> None:
    source = models.saved("llama", tmp_path / "source", dtype=HALF)
    small = compressed("llama", source, **SYMMETRIC, rules=[{"match": "model.layers.1.*", "skip": True}])
    folder = exported(small, tmp_path / "out").path
    listed = config_of(folder)["modules_to_not_convert"]
    assert len(listed) == 7 + 1
    assert all(name == "lm_head" or name.startswith("model.layers.1.") for name in listed)
    pytest.importorskip("gptqmodel")
    found, wanted = awq.answer(folder, TOKENS), answer_by_transformers(small, TOKENS)
    assert (found - wanted).abs().max() / wanted.abs().max() < 5e-3  # measured: 2.3e-3


def test_side_files_config_and_other_tensors_are_the_models_own(
    tensors_of: Any, compressed: Any, tmp_path: Path
) -> None:
    small = compressed("llama-tied", **SYMMETRIC)
    folder = exported(small, tmp_path / "out").path
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Small\n"
    assert (folder / "generation_config.json").read_bytes() == (small / "generation_config.json").read_bytes()
    before, after = tensors_of(small), tensors_of(folder)
    kept = {name for name in before if ".weight_" not in name}
    assert kept == {name for name in after if name.rpartition(".")[2] not in ("qweight", "qzeros", "scales")}
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("llama", {"bits": 8}, r"layers\.0\.self_attn\.q_proj has 8 bits, and awq takes 4"),
        ("llama", {"bits": 4, "group_size": 8}, "has 8 columns to a scale, and awq takes 16, 32, 64 or 128, or all"),
        ("gpt2", {"bits": 4}, r"attn\.c_attn is a Conv1D, and awq holds plain linears"),
        ("t5", {"bits": 4}, r"SelfAttention\.q can't be packed: transformers gives it random weights"),
    ],
    ids=str,
)
def test_what_awq_cannot_hold_is_refused_before_anything_is_written(
    name: str, settings: dict[str, Any], told: str, compressed: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=told):
        exported(compressed(name, **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
