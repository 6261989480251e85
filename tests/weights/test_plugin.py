"""`quant_method: modelzip` opens with plain transformers once modelzip.weights is imported: packed, and to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from modelzip.weights.layouts import MODELZIP, Scheme, quantization_config
from modelzip.weights.linear import CompressedLinear
from modelzip.weights.plugin import ModelzipConfig, ModelzipQuantizer

KINDS = [
    Scheme(3, "group", 16, True),
    Scheme(3, "group", 16, False),
    Scheme(5, "channel", None, False),
    Scheme(3, "channel", None, True),
    Scheme(4, "tensor", None, False),
    Scheme(7, "tensor", None, True),
]
CASES = {
    "llama": ("llama", torch.float32, torch.float32),
    "llama-bf16-scales": ("llama", torch.float32, torch.bfloat16),
    "llama-bf16": ("llama", torch.bfloat16, torch.bfloat16),
    "gpt2": ("gpt2", torch.float32, torch.float32),
    "bert-classifier": ("bert-classifier", torch.float32, torch.float32),
    "t5": ("t5", torch.float32, torch.float32),
    "mixtral": ("mixtral", torch.float32, torch.float32),
}
"""Family, dtype of the model, dtype of the scales."""

FRESH = """
import sys
import torch
from safetensors.torch import save_file
if sys.argv[1] == "import":
    import modelzip.weights
import transformers
inputs = torch.load(sys.argv[2])
for folder in sys.argv[3:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = config.architectures[0].partition("For")[2]
    auto = {"LMHeadModel": "CausalLM", "": "CausalLM", "ConditionalGeneration": "Seq2SeqLM"}.get(kind, kind)
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(folder, dtype="auto").eval()
    out = {f"state.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        out[f"class.{name}.{type(module).__name__}"] = torch.zeros(1)
    with torch.no_grad():
        out["logits"] = model(**inputs[config.is_encoder_decoder]).logits
    save_file(out, f"{folder}/found.safetensors")
"""

TOKENS = torch.tensor([list(range(4, 16)), list(range(40, 52))])
INPUTS = {False: {"input_ids": TOKENS}, True: {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}}
"""By whether the model has an encoder and a decoder."""


def _fresh(imports: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    inputs = folders[0] / "inputs.pt"
    torch.save(INPUTS, inputs)
    return subprocess.run(
        [sys.executable, "-c", FRESH, imports, *map(str, (inputs, *folders))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"},
    )


class Written:
    """A model that was compressed and saved by hand, and what a fresh process found in it."""

    def __init__(self, folder: Path, family: str, dtype: torch.dtype, scale_dtype: torch.dtype, tools):
        self.models, exchange, self._make_dense = tools
        self.folder, self.family, self.dtype = folder, family, dtype
        names = self.models.FAMILIES[family].expected_linears()
        names = [name for name in names if "k_proj" not in name]  # some linears stay dense
        self.schemes = {name: KINDS[index % len(KINDS)] for index, name in enumerate(names)}
        model = self.models.FAMILIES[family].build()
        model.save_pretrained(folder / "dense")
        model = self._open(folder / "dense")
        self.weights = exchange(model, self.schemes, scale_dtype)
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = quantization_config(
            {name: weight.meta() for name, weight in self.weights.items()}, layout=MODELZIP, linears=[]
        )
        (folder / "config.json").write_text(json.dumps(config))
        self.memory = model

    def _open(self, folder: Path) -> nn.Module:
        return getattr(transformers, self.models.FAMILIES[self.family].model_class).from_pretrained(
            folder, dtype=self.dtype
        )

    def dense_logits(self) -> torch.Tensor:
        return _logits(self._make_dense(self._open(self.folder / "dense"), self.weights))

    def found(self, prefix: str) -> dict[str, torch.Tensor]:
        tensors = load_file(self.folder / "found.safetensors")
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    logits = model.eval()(**INPUTS[model.config.is_encoder_decoder]).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.fixture(scope="module")
def written(models, exchange, make_dense, tmp_path_factory) -> dict[str, Written]:
    """Every case saved, and all opened in one fresh process."""
    folder = tmp_path_factory.mktemp("plugin")
    cases = {name: Written(folder / name, *case, (models, exchange, make_dense)) for name, case in CASES.items()}
    run = _fresh("import", *(case.folder for case in cases.values()))
    assert run.returncode == 0, run.stderr
    assert "MISSING" not in run.stderr
    assert "UNEXPECTED" not in run.stderr
    return cases


@pytest.fixture(params=CASES)
def case(request, written) -> Written:
    return written[request.param]


def test_a_fresh_process_finds_every_tensor_as_it_was_written_to_the_bit(case):
    stored, found = load_file(case.folder / "model.safetensors"), case.found("state.")
    stored = {name: tensor for name, tensor in stored.items() if ".block_sparse_moe." not in name}  # renamed on loading
    assert stored.keys() <= found.keys()
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_compressed_modules_stay_compressed(case):
    classes = case.found("class.")
    found = case.found("state.")
    for name, weight in case.weights.items():
        assert f"{name}.CompressedLinear" in classes
        own = {key: tensor for key, tensor in found.items() if key.startswith(f"{name}.weight")}
        assert own.keys() == {f"{name}.{suffix}" for suffix in weight.tensors()}
        assert sum(tensor.nbytes for tensor in own.values()) == weight.nbytes
    assert sum(key.endswith(".CompressedLinear") for key in classes) == len(case.weights)


def test_it_computes_what_the_dequantized_model_computes(case):
    found, truth = case.found("logits")[""], case.dense_logits()
    error = float((found.double() - truth.double()).norm() / truth.double().norm())
    assert error < (1e-5 if case.dtype == torch.float32 else 3e-2)  # measured: 4.4e-7 and 7.5e-3


def test_it_can_be_saved_and_opened_again(case, tmp_path):
    first = type(case.memory)
    model = first.from_pretrained(case.folder, dtype="auto")
    model.save_pretrained(tmp_path)
    stored, again = load_file(case.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((case.folder / "config.json").read_text())["quantization_config"]
    reopened = first.from_pretrained(tmp_path, dtype="auto")
    assert isinstance(reopened.get_submodule(next(iter(case.weights))), CompressedLinear)
    assert torch.equal(_logits(reopened), _logits(model))


def test_another_dtype_for_the_model_leaves_the_scales_alone(written):
    case = written["llama"]
    model = transformers.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for name, weight in case.weights.items():
        module = model.get_submodule(name)
        assert module.weight_scale.dtype == torch.float32
        assert torch.equal(module.weight_value.dense(), weight.dense())
    truth = case.dense_logits()
    assert float((_logits(model).float() - truth).norm() / truth.norm()) < 5e-2  # measured: 1.0e-2


def test_without_the_import_it_does_not_open_in_silence(written):
    """transformers 5 has no way to refuse a quant_method that it doesn't know: it says so, and what is missing."""
    run = _fresh("no", written["llama"].folder)
    said = run.stdout + run.stderr
    assert "Unknown quantization type, got modelzip" in said
    assert "q_proj.weight" in said
    assert "MISSING" in said


def test_a_newer_layout_version_is_refused():
    with pytest.raises(ValueError, match="layout version 2 of modelzip"):
        ModelzipConfig(modules={}, version=2)


def test_it_refuses_to_quantize_on_the_fly():
    with pytest.raises(ValueError, match="pre-quantized"):
        ModelzipQuantizer(ModelzipConfig(modules={}), pre_quantized=False)


def test_a_checkpoint_that_lacks_a_packed_tensor_is_reported(written, tmp_path):
    case = written["llama"]
    tensors = load_file(case.folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((case.folder / "config.json").read_bytes())
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.0.self_attn.q_proj.weight_scale"}
