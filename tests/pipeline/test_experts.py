"""Mixtures whose experts transformers keeps in one tensor: taken apart, compressed by the tokens sent to each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import modelzip.weights  # noqa: F401  # teaches the layout to transformers
from modelzip.checkpoints.errors import ModelzipError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.checkpoints.unfused import unfused
from modelzip.exporters.formats import export, refusal
from modelzip.exporters.request import Request
from modelzip.pipeline.run import plan_recipe
from modelzip.weights.experts import UNFUSED, Experts
from modelzip.weights.linear import CompressedLinear

FUSED = ("mixtral", "qwen2-moe", "qwen3-moe")
SHAPES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
OTHERS = {
    # each expert's matrices transposed, gate and up interleaved, biases; 3-D on disk
    "GptOss": {**SHAPES, **ATTENTION, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {**SHAPES, **ATTENTION, "num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1},
    "Phimoe": {**SHAPES, **ATTENTION, "num_local_experts": 4},
}
METHODS = [
    *({"method": name} for name in ("rtn", "hqq", "awq", "gptq", "spqr", "obq")),
    {"method": "gobo", "group_size": "tensor"},
    {"method": "autoround", "iterations": 4},
    *({"method": name} for name in ("pq", "ipq", "gptvq", "aqlm")),
    {"method": "gptq", "grid": "nf"},
    {"method": "rtn", "grid": "nvfp4"},
    {"method": "gptq", "target_bits": 5.0},
]


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", [*FUSED, *OTHERS])
def test_experts_one_by_one_are_the_same_function_in_as_many_bytes(models, saved, tmp_path, name):
    folder = tmp_path / "model"
    if name in OTHERS:
        config = getattr(transformers, f"{name}Config")(**OTHERS[name])
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        made.save_pretrained(folder)
    else:
        folder = saved(name)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = Checkpoint.open(str(folder))
    view = unfused(before)
    apart = load_whole(view, dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(apart.model.layers[1].mlp.experts, Experts)
    assert not any(".experts." in name and one.ndim == 3 for name, one in apart.named_parameters())
    assert view.nbytes == before.nbytes
    found, wanted = logits(apart, models.tokens()), logits(plain, models.tokens())
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()  # measured: 2e-7


def test_a_model_without_such_experts_is_left_as_it_is(saved):
    for name in ("llama", "switch", "bert"):
        before = Checkpoint.open(str(saved(name)))
        assert unfused(before) is before


@pytest.mark.parametrize("name", FUSED)
def test_tokens_are_counted_by_expert_as_the_router_sends_them(saved, compress, models, tmp_path, name):
    stage = {"method": "gptq", "propagate": "original"}
    compress(saved(name), tmp_path / "out", stage, calibration={"samples": 6, "seq_len": 12})
    records = json.loads((tmp_path / "out" / "modelzip.json").read_text())["stages"][0]["records"]
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        first = [records[f"{path}.{expert}.gate_up_proj"]["tokens"] for expert in range(4)]
        last = [records[f"{path}.{expert}.down_proj"]["tokens"] for expert in range(4)]
        assert first == last
        assert sum(first) == 2 * 6 * 12  # each token has two experts
        assert len(set(first)) > 1


@pytest.mark.parametrize("stage", METHODS, ids=lambda stage: "-".join(map(str, stage.values())))
def test_every_method_compresses_them_and_transformers_opens_the_result(models, speaking, compress, tmp_path, stage):
    report = compress(speaking("mixtral"), tmp_path / "out", stage).report
    names = {name for name in models.FAMILIES["mixtral"].compressed_linears() if ".experts." in name}
    rows = {row["name"]: row for row in report["modules"]}
    assert (
        "the experts of 2 mixtures are taken apart, each for the tokens that are sent to it" in report["plan"]["notes"]
    )
    assert names <= rows.keys()
    assert {rows[name]["method"] for name in names} == {stage["method"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(isinstance(model.get_submodule(name), CompressedLinear) for name in names)
    before = transformers.AutoModelForCausalLM.from_pretrained(speaking("mixtral"))
    tokens = models.tokens() % model.config.vocab_size
    found, wanted = logits(model, tokens), logits(before, tokens)
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 1


def starved(source: Path, folder: Path) -> Path:
    """A copy of the pico Mixtral that sends a token to one expert alone, in the second layer never to the last."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if "layers.1" in name and name.endswith("gate.weight"))
    tensors[name][1] = -tensors[name][0]
    tensors[name][3] = 0  # one of the first two scores more
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_starved_expert_is_rounded_and_listed(saved, compress, tensors_of, tmp_path):
    model = starved(saved("mixtral"), tmp_path / "starved")
    report = compress(model, tmp_path / "out", {"method": "gptq"}).report
    compress(model, tmp_path / "rounded", {"method": "rtn"})
    rows = {row["name"]: row for row in report["modules"]}
    alone = [f"model.layers.1.mlp.experts.3.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    assert [name for name, row in rows.items() if row["method"] == "rtn"] == alone
    assert report["fallbacks"] == [f"{name}: rounded to nearest: no calibration token reached it" for name in alone]
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "rounded")
    for name in alone:
        assert torch.equal(found[f"{name}.weight_packed"], wanted[f"{name}.weight_packed"])


def test_experts_that_are_all_left_out_stay_as_transformers_has_them(saved, compress, tensors_of, tmp_path):
    report = compress(saved("qwen3-moe"), tmp_path / "out", {"method": "rtn", "ignore": ["*.experts.*"]}).report
    before, after = tensors_of(saved("qwen3-moe")), tensors_of(tmp_path / "out")
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)
    assert any(note.startswith("left alone (fused experts)") for note in report["plan"]["notes"])


def test_an_expert_that_is_left_out_stays_as_it_was_among_the_others(saved, compress, models, tensors_of, tmp_path):
    left = "model.layers.0.mlp.experts.2.down_proj"
    compress(saved("mixtral"), tmp_path / "out", {"method": "rtn", "ignore": [left]})
    before, after = tensors_of(saved("mixtral")), tensors_of(tmp_path / "out")
    (name,) = (name for name in before if "layers.0." in name and name.endswith("experts.2.w2.weight"))
    assert torch.equal(after[f"{left}.weight"], before[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.get_submodule(left).weight, before[name])
    assert logits(model, models.tokens()).isfinite().all()


@pytest.mark.parametrize("name", FUSED)
def test_later_stages_take_the_experts_as_they_are_left(saved, compress, models, tmp_path, name):
    stages = [
        {"quantize": {"method": "rtn", "group_size": 16, "ignore": ["*.down_proj"]}},
        {"quantize": {"method": "rtn", "group_size": 16, "bits": 8, "ignore": ["re:.*((gate|up)_|self_attn).*"]}},
    ]
    report = compress(saved(name), tmp_path / "out", *stages).report
    assert len(report["stages"]) == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    forms = {name: one.weight_meta["bits"] for name, one in model.named_modules() if isinstance(one, CompressedLinear)}
    assert forms["model.layers.1.mlp.experts.3.gate_up_proj"] == 4
    assert forms["model.layers.1.mlp.experts.3.down_proj"] == 8


def test_the_model_without_its_head_and_what_it_saves_hold_the_same_experts(saved, compress, models, tmp_path):
    compress(saved("qwen3-moe"), tmp_path / "out", {"method": "rtn"})
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        wanted = base(input_ids=models.tokens()).last_hidden_state
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(whole.model(input_ids=models.tokens()).last_hidden_state, wanted)
    whole.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, models.tokens()), logits(whole, models.tokens()))


def test_experts_become_products_of_factors(saved, compress, models, tmp_path):
    compress(saved("mixtral"), tmp_path / "out", {"factorize": {"method": "svd", "ratio": 0.8}})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].mlp.experts[1].down_proj.weight_meta["kind"] == "low_rank"
    assert logits(model, models.tokens()).isfinite().all()


def test_a_killed_run_goes_on(saved, compress, killed_at, tensors_of, tmp_path):
    stage = {"method": "gptq"}
    compress(saved("mixtral"), tmp_path / "whole", stage)
    with killed_at("quantize", 1, times=1) as progress:
        compress(saved("mixtral"), tmp_path / "out", stage, progress=progress)
    compress(saved("mixtral"), tmp_path / "out", stage, resume=True)
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", FUSED)
def test_exported_dense_they_are_stored_as_the_original_stores_them(saved, compress, models, tmp_path, name):
    compress(saved(name), tmp_path / "out", {"method": "rtn", "ignore": ["*.0.mlp.experts.1.down_proj"]})
    export(Request(Checkpoint.open(str(tmp_path / "out")), tmp_path / "dense"), "dense")
    found, wanted = Checkpoint.open(str(tmp_path / "dense")), Checkpoint.open(str(saved(name)))
    assert {key: (one.dtype, one.shape) for key, one in found.tensors.items()} == {
        key: (one.dtype, one.shape) for key, one in wanted.tensors.items()
    }
    opened = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / one) for one in ("dense", "out")]
    dense, small = (logits(model, models.tokens()) for model in opened)
    assert (dense - small).norm() <= 1e-5 * small.norm()  # measured: 1e-6 at most


def test_formats_that_name_no_experts_one_by_one_are_refused(saved, compress, tmp_path):
    compress(saved("mixtral"), tmp_path / "out", {"method": "rtn"})
    request = Request(Checkpoint.open(str(tmp_path / "out")), tmp_path / "other")
    for format in ("compressed-tensors", "gptq", "gguf"):
        told = refusal(request, format)
        assert told == (
            f"{tmp_path / 'out'}: its experts are compressed one by one, which {format} doesn't say; what can hold it "
            "is dense."
        )


def test_layers_that_go_take_their_experts_along(saved, compress, models, tmp_path):
    compress(saved("mixtral"), tmp_path / "small", {"method": "rtn"})
    compress(tmp_path / "small", tmp_path / "out", {"prune": {"method": "layers", "drop": [0]}})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"][UNFUSED] == ["model.layers.0.mlp.experts"]
    small, left = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / one) for one in ("small", "out"))
    small.model.layers = small.model.layers[1:]
    small.model.layers[0].self_attn.layer_idx = 0
    assert torch.equal(logits(left, models.tokens()), logits(small, models.tokens()))


def test_they_are_not_trained(saved, compress, recipe_of, tmp_path):
    compress(saved("mixtral"), tmp_path / "small", {"factorize": {"method": "svd", "ratio": 0.8}})
    stage = {"distill": {"method": "labels", "data": "text.txt", "task": "language-modelling"}}
    with pytest.raises(ModelzipError, match=r"holds its experts one by one: train it first, and compress it then\."):
        plan_recipe(recipe_of(tmp_path / "small", stage), output=tmp_path / "out")


@pytest.mark.parametrize("stage", [{"activations": "int8"}, {"activations": "fp8"}, {"method": "smoothquant"}], ids=str)
def test_what_an_expert_is_sent_is_rounded_token_by_token(saved, compress, models, tmp_path, stage):
    size = {"group_size": "channel"} if "method" in stage else {}
    compress(saved("mixtral"), tmp_path / "out", {"method": "rtn", **size, **stage})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = models.tokens(count=4)
    alone = torch.cat([logits(model, row[None]) for row in tokens])
    assert (alone - logits(model, tokens)).norm() <= 1e-4 * alone.norm()  # with one scale for all: 0.07 to 0.11
