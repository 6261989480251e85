"""bnb-nf4: the very tensors that transformers makes by bitsandbytes of the same dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.exporters.formats import export
from modelzip.exporters.plain import answer_by_transformers
from modelzip.exporters.request import Request, Written
from modelzip.pipeline.exported import check_export

pytest.importorskip("bitsandbytes")

TOKENS = {"input_ids": torch.arange(3, 43).reshape(1, 40)}
VALUES = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""The 16 values of NF4, from the paper (Dettmers et al. 2023, appendix E)."""


def exported(source: Path, output: Path, **asked: Any) -> Written:
    return export(Request(Checkpoint.open(str(source)), output, **asked), "bnb-nf4")


def as_dense(source: Path, output: Path) -> Path:
    return export(Request(Checkpoint.open(str(source)), output), "dense").path


def tensors_of(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(str(folder))
    return checkpoint.read(checkpoint.tensors)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def by_transformers(dense: Path, folder: Path, models: Any, *, name: str, skip: list[str]) -> dict[str, Tensor]:
    """The tensors of the model that transformers rounds as it opens it, and then saves."""
    kind = getattr(transformers, models.FAMILIES[name].model_class)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    kind.from_pretrained(dense, dtype="auto", quantization_config=config).save_pretrained(folder)
    return tensors_of(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert-classifier", "t5"])
def test_a_dense_model_becomes_the_tensors_that_transformers_makes(
    name: str, dtype: torch.dtype, wide: Any, models: Any, tmp_path: Path
) -> None:
    written = exported(wide(name, dtype), tmp_path / "out")
    skip = config_of(written.path)["quantization_config"]["llm_int8_skip_modules"]
    wanted = by_transformers(wide(name, dtype), tmp_path / "wanted", models, name=name, skip=skip)
    found = tensors_of(written.path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
    count = sum(tensor.endswith(".absmax") for tensor in found)
    assert count == len(models.FAMILIES[name].expected_linears()) - (4 if name == "t5" else 0)  # its wo stay dense
    assert written.rounded == (f"{count} matrices were rounded to 4-bit NormalFloat, 64 weights to a scale",)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 3}, {"bits": 4, "symmetric": False}, {"verb": "factorize", "method": "embedding", "rank": 8}],
    ids=str,
)
def test_a_compressed_model_becomes_what_transformers_makes_of_its_dense_form(
    settings: dict[str, Any], wide: Any, compressed: Any, models: Any, tmp_path: Path
) -> None:
    small = compressed("llama", wide("llama"), **settings)
    found = tensors_of(exported(small, tmp_path / "out").path)
    dense = as_dense(small, tmp_path / "dense")
    wanted = by_transformers(dense, tmp_path / "wanted", models, name="llama", skip=["lm_head"])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)


def test_a_weight_is_a_value_of_the_paper_times_the_largest_of_its_64(wide: Any, tmp_path: Path) -> None:
    source = tensors_of(wide("llama", torch.float32))
    tensors = tensors_of(exported(wide("llama", torch.float32), tmp_path / "out").path)
    name = "model.layers.1.mlp.up_proj.weight"
    bytes_, blocks = tensors[name].flatten(), source[name].reshape(-1, 64)
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).reshape(-1, 64).long()
    largest = blocks.abs().amax(1)
    assert torch.equal(tensors[f"{name}.absmax"], largest)
    values = torch.tensor(VALUES)
    assert torch.equal(codes, (blocks.div(largest[:, None]).unsqueeze(-1) - values).abs().argmin(-1))


def test_transformers_computes_with_the_rounded_weights(wide: Any, models: Any, tmp_path: Path) -> None:
    source = wide("llama", torch.float32)
    folder = exported(source, tmp_path / "out").path
    found = answer_by_transformers(folder, TOKENS)
    model = transformers.LlamaForCausalLM.from_pretrained(source).eval()
    tensors, values = tensors_of(folder), torch.tensor(VALUES)
    for name, parameter in model.named_parameters():
        if f"{name}.absmax" in tensors:
            codes = torch.stack([tensors[name].flatten() >> 4, tensors[name].flatten() & 15], dim=1).reshape(-1, 64)
            weight = values[codes.long()] * tensors[f"{name}.absmax"][:, None]
            parameter.data = weight.reshape(parameter.shape)
    with torch.no_grad():
        wanted = model(**TOKENS).logits
    difference = (found - wanted).abs().max() / wanted.abs().max()
    assert difference < 0.06  # measured: 0.026; bitsandbytes computes in bf16 on CPUs that know it


def test_the_proof_of_an_export_is_its_answer_in_a_fresh_process(wide: Any, compressed: Any, tmp_path: Path) -> None:
    small = compressed("llama", wide("llama"), bits=4)
    proof = check_export(Checkpoint.open(str(small)), "bnb-nf4", exported(small, tmp_path / "out"))
    assert (
        0 < proof["max_logit_difference"] < 0.8 * proof["largest_logit"]
    )  # measured: 0.56, random weights bear little


def test_side_files_and_types_are_as_asked(wide: Any, compressed: Any, tmp_path: Path) -> None:
    small = compressed("llama-tied", wide("llama-tied", torch.float32), bits=4)
    folder = exported(small, tmp_path / "out", dtype=torch.bfloat16).path
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Small\n"
    assert (folder / "generation_config.json").read_bytes() == (small / "generation_config.json").read_bytes()
    config = config_of(folder)
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    tensors = tensors_of(folder)
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_sizes_that_its_kernel_does_not_take_are_refused(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"q_proj is \[32, 32\], and bitsandbytes takes multiples of 32 outputs"):
        exported(saved("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
