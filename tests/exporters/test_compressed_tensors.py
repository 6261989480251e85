"""compressed-tensors: what transformers opens computes with the weights, and where asked the activations, of 8 bits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.exporters.formats import export, refusal
from modelzip.exporters.plain import answer_by_transformers
from modelzip.exporters.request import Request, Written
from modelzip.exporters.source import Source
from modelzip.pipeline.exported import check_export
from modelzip.weights import Affine
from modelzip.weights.layouts import MODELZIP, quantization_config

FORMAT = "compressed-tensors"
TOKENS = {"input_ids": torch.arange(3, 43).reshape(1, 40)}


def exported(source: Path, output: Path, scheme: str = "auto", **asked: Any) -> Written:
    return export(Request(Checkpoint.open(str(source)), output, scheme, **asked), FORMAT)


def rows_int8(weight: Tensor) -> Tensor:
    """Rounded by row to 8 bits as the format's definition has it: the range of codes is 255 steps wide."""
    scale = weight.abs().amax(-1, keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127) * scale


def rows_fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / 448
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def simulated(source: Path, folder: Path, rounded: Callable[[Tensor], Tensor], *, model_class: str) -> Tensor:
    """The output of the dense model with the weights of a folder, and the inputs of its blocks' linears rounded."""
    checkpoint = Checkpoint.open(str(folder))
    stored = checkpoint.read(checkpoint.tensors)
    model = getattr(transformers, model_class).from_pretrained(source).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (".layers." in name or ".layer." in name):
            module.weight.copy_(stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"])
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]), *inputs[1:]))
    return model(**TOKENS).logits


@pytest.mark.parametrize(("scheme", "rounded"), [("W8A8", rows_int8), ("FP8", rows_fp8)])
@pytest.mark.parametrize("name", ["llama", "bert-classifier"])
def test_transformers_computes_with_the_weights_and_rounds_activations_by_token(
    scheme: str, rounded: Any, name: str, saved: Any, models: Any, tmp_path: Path
) -> None:
    written = exported(saved(name), tmp_path / "out", scheme)
    found = answer_by_transformers(written.path, TOKENS)
    wanted = simulated(saved(name), written.path, rounded, model_class=models.FAMILIES[name].model_class)
    assert (found - wanted).norm() / wanted.norm() < 1e-6  # measured: at most 7.3e-8; with exact activations 1e-2


@pytest.mark.parametrize(("scheme", "worst"), [("W8A8", 0.5 / 127.5), ("FP8", 2**-4)])
def test_every_weight_is_the_nearest_of_its_row(scheme: str, worst: float, saved: Any, tmp_path: Path) -> None:
    """int8: within half a step of the row's largest; fp8: within a sixteenth of itself, above the smallest."""
    written = Checkpoint.open(str(exported(saved("llama"), tmp_path / "out", scheme).path))
    original = Checkpoint.open(str(saved("llama")))
    names = [name for name, info in written.tensors.items() if info.dtype in ("I8", "F8_E4M3")]
    assert len(names) == 14
    for name in names:
        weight = original.read([name])[name]
        tensors = written.read([name, f"{name}_scale"])
        error = (tensors[name].float() * tensors[f"{name}_scale"] - weight).abs()
        largest = weight.abs().amax(1, keepdim=True)
        room = worst * largest if scheme == "W8A8" else worst * weight.abs() + largest / 448 * 2**-10
        assert (error <= room * (1 + 1e-5)).all()


def test_int8_by_row_keeps_its_codes_and_scales(compressed: Callable[..., Path], tmp_path: Path) -> None:
    small = compressed("llama", bits=8, group_size="channel")
    written = exported(small, tmp_path / "out", "W8A8")
    assert not any("anew" in line for line in written.rounded)
    source = Source.of(Checkpoint.open(str(small)))
    found = Checkpoint.open(str(written.path))
    module = "model.layers.1.mlp.down_proj"
    tensors = found.read([f"{module}.weight", f"{module}.weight_scale"])
    weight = source.weight(module)
    assert isinstance(weight, Affine)
    assert torch.equal(tensors[f"{module}.weight"], weight.codes())
    assert torch.equal(tensors[f"{module}.weight_scale"], weight.scale)


def test_fp8_by_row_keeps_its_codes_and_scales(compressed: Callable[..., Path], tmp_path: Path) -> None:
    small = compressed("llama", grid="fp8-e4m3", group_size="channel")
    written = exported(small, tmp_path / "out", "FP8")
    assert not any("anew" in line for line in written.rounded)
    before, after = Checkpoint.open(str(small)), Checkpoint.open(str(written.path))
    module = "model.layers.1.mlp.down_proj"
    for name in (f"{module}.weight", f"{module}.weight_scale"):
        one, other = before.read([name])[name], after.read([name])[name]
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(("grid", "group"), [("nvfp4", 16), ("mxfp4", 32), ("fp8-e4m3", "channel")])
def test_floats_in_modelzips_own_layout_open_without_it(
    grid: str, group: Any, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    small = compressed("llama", grid=grid, group_size=group, layout=MODELZIP)
    written = exported(small, tmp_path / "out")
    assert written.rounded == ()
    found, wanted = answer_by_transformers(written.path, TOKENS), answer_by_transformers(small, TOKENS)
    assert float((found - wanted).abs().max()) < 1e-6  # measured: 0
    config = json.loads((written.path / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == FORMAT


def test_packed_integers_in_modelzips_own_layout_open_without_it(
    compressed: Callable[..., Path], models: Any, tmp_path: Path
) -> None:
    """A checkpoint whose config alone is modelzip's, as after a stage that left nothing else of its own."""
    small = compressed("llama", bits=4)
    folder = tmp_path / "own"
    shutil.copytree(small, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = Source.of(Checkpoint.open(str(small)))
    metas = {name: weight.meta() for name in source.matrices() if (weight := source.stored(name)) is not None}
    config["quantization_config"] = quantization_config(metas, layout=MODELZIP, linears=[])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    written = exported(folder, tmp_path / "out")
    assert written.rounded == ()
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(written.path)!r}); "
        "assert not any(name.startswith('modelzip') for name in sys.modules); "
        "print(int(model(torch.arange(3, 43)[None]).logits.argmax(-1).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True)
    wanted = answer_by_transformers(small, TOKENS)
    assert int(done.stdout) == int(wanted.argmax(-1).sum())
    told = check_export(Checkpoint.open(str(folder)), FORMAT, written)
    assert told["max_logit_difference"] < 1e-5  # measured: 4.8e-7


def vllm_scheme(group: dict[str, Any], layout: str) -> str | None:
    """Which of vLLM's linear schemes takes a group of a compressed-tensors config, by its published conditions."""
    weights, inputs = group["weights"], group["input_activations"]
    if weights["dynamic"]:
        return None
    if inputs is None:
        packed = layout == "pack-quantized" and weights["strategy"] in ("channel", "group") and weights["type"] == "int"
        known = weights["num_bits"] in ((4, 8) if weights["symmetric"] else (4,))
        return "WNA16" if packed and known else None
    by_row = weights["strategy"] in ("tensor", "channel") and weights["symmetric"]
    if not by_row or (weights["num_bits"], inputs["num_bits"]) != (8, 8):
        return None
    if weights["type"] == inputs["type"] == "float" and layout == "float-quantized":
        return "W8A8Fp8" if inputs["dynamic"] else None
    dynamic = inputs["dynamic"] and inputs["strategy"] == "token" and layout == "int-quantized"
    return "W8A8Int8" if dynamic and weights["type"] == "int" else None


@pytest.mark.parametrize(
    ("settings", "scheme", "wanted"),
    [
        ({"bits": 4}, "auto", "WNA16"),
        ({"bits": 4, "symmetric": False}, "auto", "WNA16"),
        ({"bits": 8, "group_size": "channel"}, "auto", "WNA16"),
        ({"bits": 4}, "W8A8", "W8A8Int8"),
        ({"bits": 4}, "FP8", "W8A8Fp8"),
    ],
)
def test_the_config_is_one_that_vllm_takes(
    settings: dict[str, Any], scheme: str, wanted: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    small = compressed("llama", **settings)
    folder = small if scheme == "auto" else exported(small, tmp_path / "out", scheme).path
    config = Checkpoint.open(str(folder)).quantization
    assert config is not None
    groups = config["config_groups"].values()
    assert {vllm_scheme(group, config["format"]) for group in groups} == {wanted}
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]


def test_fixed_scales_of_inputs_that_a_scheme_leaves_out_are_told(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    fixed = {"bits": 8, "group_size": "channel", "activations": "int8", "activation_scales": "static"}
    source = compressed("llama", **fixed)
    kept = exported(compressed("llama", **fixed, layout="modelzip"), tmp_path / "kept")
    assert any(name.endswith("input_scale") for name in Checkpoint.open(str(kept.path)).tensors)
    written = exported(source, tmp_path / "out", "W8A8")
    assert "fixed scales of the inputs of 14 matrices are left out, which --scheme auto keeps" in written.rounded
    assert not any(name.endswith("input_scale") for name in Checkpoint.open(str(written.path)).tensors)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "llama",
            {"bits": 3},
            r"q_proj \(3 bits, group\) isn't what compressed-tensors holds.*what can hold it is",
        ),
        ("gpt2", {"bits": 4}, r"c_attn is stored \[in, out\] \(a Conv1D\)"),
        ("llama", {"bits": 4, "embeddings": True}, "embed_tokens is compressed and no linear"),
    ],
)
def test_what_it_can_not_hold_is_named_with_the_formats_that_can(
    name: str, settings: dict[str, Any], words: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        exported(compressed(name, **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_needs_a_scheme_and_a_packed_one_has_nothing_to_do(
    saved: Any, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    request = Request(Checkpoint.open(str(saved("llama"))), tmp_path / "out")
    assert "--scheme W8A8 or FP8" in str(refusal(request, FORMAT))
    with pytest.raises(CheckpointError, match="is compressed-tensors already"):
        exported(compressed("llama", bits=4), tmp_path / "out")


def test_ties_stay_tied_and_side_files_come_along(saved: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved("llama-tied"), source)
    (source / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    written = exported(source, tmp_path / "out", "W8A8")
    assert "lm_head.weight" not in Checkpoint.open(str(written.path)).tensors
    assert (written.path / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"
    model = transformers.AutoModelForCausalLM.from_pretrained(written.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
