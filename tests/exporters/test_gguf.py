"""GGUF: what llama.cpp opens is the model, grids lie in the file bit for bit, and texts become the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, quants
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError, OutputError
from modelzip.checkpoints.index import Checkpoint
from modelzip.exporters import gguf
from modelzip.exporters.formats import export, refusal
from modelzip.exporters.request import Request, Written
from modelzip.exporters.source import Source
from modelzip.pipeline import run
from modelzip.pipeline.run import run_recipe
from modelzip.recipes.load import parse_recipe
from modelzip.weights.layouts import MODELZIP, quantization_config

WIDE = {"hidden_size": 64, "intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "llama-tied": WIDE,
    "mistral": {**WIDE, "head_dim": 32},
    "qwen2": WIDE,
    "qwen3": {**WIDE, "head_dim": 32},
    "gpt2": {"n_embd": 64},
    "bert": WIDE,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
TEXTS = ("Hello world", "  two  spaces\n\n\ttab", "1234567 and 3.14", "naïve café 東京 🎉", "don't WE'LL I'm")


INNER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class Silent:
    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass


@pytest.fixture(scope="module")
def pico(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """pico("llama", hidden_size=64) -> a folder with that model; with bits=4, ... also quantized by rtn."""
    made: dict[str, Path] = {}

    def of(family: str, quantize: dict[str, Any] | None = None, **changes: Any) -> Path:
        key = f"{family} {quantize} {changes}"
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp("gguf") / "pico"
        if quantize is None:
            models.FAMILIES[family].build(**{**FAMILIES[family], **changes}).save_pretrained(folder)
        else:
            stage = {"quantize": {"method": "rtn", **quantize}}
            recipe = {"model": str(of(family, **changes)), "stages": [stage], "evaluate": {"enabled": False}}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run, "reopen", lambda *arguments, **options: (None, []))
                run_recipe(parse_recipe(recipe, "test"), output=folder, progress=Silent())
        made[key] = folder
        return folder

    return of


def exported(source: Path, output: Path, scheme: str = "auto", **asked: Any) -> Written:
    return export(Request(Checkpoint.open(str(source)), output, scheme, **asked), "gguf")


def opened(folder: Path) -> GGUFReader:
    (file,) = folder.glob("*.gguf")
    return GGUFReader(file)


def tensors_of(folder: Path) -> dict[str, Any]:
    return {one.name: one for one in opened(folder).tensors}


def values(tensor: Any) -> Tensor:
    return torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())


def interleaved(weight: Tensor, head: int) -> Tensor:
    """Rows of q or k as llama.cpp's llama has them: of each head 0, d/2, 1, d/2 + 1, ..."""
    half = head // 2
    order = [start + i + step for start in range(0, len(weight), head) for i in range(half) for step in (0, half)]
    return weight[order]


def difference(source: Path, written: Written) -> float:
    """Of the consumer's output from modelzip's, as a part of the largest number; in this process."""
    from modelzip.pipeline.measure import probe

    inputs, expect = probe(Checkpoint.open(str(source)), seed=0, device=torch.device("cpu"))
    wanted = expect()
    return float((gguf.answer(written.path, inputs) - wanted).abs().max() / wanted.abs().max())


def as_single(folder: Path) -> Path:
    """The same file with every block made fp32 by the gguf library, so that llama.cpp rounds no activations."""
    reader, other = opened(folder), folder.with_name(f"{folder.name}-single")
    other.mkdir()
    writer = GGUFWriter(other / "single.gguf", str(reader.fields["general.architecture"].contents()))
    for name, one in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, one.contents(), one.types[0], one.types[-1] if len(one.types) > 1 else None)
    for one in reader.tensors:
        writer.add_tensor(one.name, values(one).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return other


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_the_model_does(name: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    source = pico(name)
    written = exported(source, tmp_path / "out")
    assert written.rounded == ()
    # measured: 1.4e-6; llama.cpp takes GELU from a table of fp16, and BERT's by its tanh form: gpt2 2.2e-4, bert 3.1e-4
    assert difference(source, written) < (1e-3 if name in ("gpt2", "bert") else 1e-5)


@pytest.mark.parametrize(
    "rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}], ids=lambda rope: rope["rope_type"]
)
def test_scaled_rotary_embeddings_and_biases_are_kept(
    rope: dict[str, Any], pico: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    source = pico("llama", rope_parameters=rope, attention_bias=True, mlp_bias=True)
    assert difference(source, exported(source, tmp_path / "out")) < 1e-5  # measured: 1.0e-6


@pytest.mark.parametrize(
    ("name", "settings", "type"),
    [
        ("llama-tied", {"bits": 4, "group_size": 32}, "Q4_0"),
        ("llama", {"bits": 4, "group_size": 64, "symmetric": False}, "Q4_1"),
        ("mistral", {"bits": 3, "group_size": 64}, "Q4_0"),
        ("qwen2", {"bits": 5, "group_size": 32}, "Q5_0"),
        ("qwen3", {"bits": 5, "group_size": 32, "symmetric": False}, "Q5_1"),
        ("gpt2", {"bits": 8, "group_size": "channel"}, "Q8_0"),
        ("gpt2", {"bits": 4, "group_size": 64, "symmetric": False, "embeddings": True}, "Q4_1"),
        ("bert", {"bits": 6, "group_size": 32, "symmetric": False}, "Q8_0"),
    ],
    ids=str,
)
def test_llama_cpp_computes_what_the_compressed_model_does(
    name: str, settings: dict[str, Any], type: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    source = pico(name, settings)
    written = exported(source, tmp_path / "out")
    assert written.rounded == ()
    assert written.path.joinpath(f"pico-{type}.gguf").is_file()
    # measured: 1.6e-3 from scales in fp16, with minima in fp16 9.8e-3
    assert difference(source, Written(as_single(written.path))) < (3e-3 if settings.get("symmetric", True) else 0.02)
    assert difference(source, written) < 0.1  # measured: 0.051; llama.cpp rounds activations to 8 bits, 32 to a scale


def test_every_weight_of_a_block_lies_under_its_name_with_rows_of_q_and_k_interleaved(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    source = pico("llama", {"bits": 4, "group_size": 32}, num_attention_heads=2, num_key_value_heads=1)
    found = tensors_of(exported(source, tmp_path / "out").path)
    model = Source.of(Checkpoint.open(str(source)))
    for place, name in {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_up": "mlp.up_proj"}.items():
        tensor, wanted = found[f"blk.1.{place}.weight"], model.dense(f"model.layers.1.{name}")
        assert tensor.tensor_type == Type.Q4_0
        wanted = interleaved(wanted, 32) if place != "ffn_up" else wanted
        assert (values(tensor) - wanted).norm() / wanted.norm() < 3e-4  # measured: 1.6e-4, scales in fp16
    assert found["output_norm.weight"].tensor_type == Type.F32
    assert torch.equal(values(found["output.weight"]), model.dense("lm_head"))


def test_a_tied_head_is_stored_once(pico: Callable[..., Path], tmp_path: Path) -> None:
    found = tensors_of(exported(pico("llama-tied"), tmp_path / "out").path)
    assert "output.weight" not in found
    assert len(found) == 2 + 2 * 9


def test_what_layers_share_is_written_for_each(pico: Callable[..., Path], tmp_path: Path) -> None:
    original, folder = pico("llama"), tmp_path / "shared"
    owner, name = (f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1))
    tensors = load_file(original / "model.safetensors")
    del tensors[name]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config({}, layout=MODELZIP, linears=[], shared={name: owner})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = tensors_of(exported(folder, tmp_path / "out").path)
    for block in (0, 1):
        assert torch.equal(values(found[f"blk.{block}.ffn_up.weight"]), tensors[owner])


def test_a_grid_that_no_block_holds_is_rounded_anew_and_said(pico: Callable[..., Path], tmp_path: Path) -> None:
    source = pico("llama", {"bits": 4, "group_size": 16})
    written = exported(source, tmp_path / "out")
    assert len(written.rounded) == 1
    assert written.rounded[0].startswith("14 matrices were rounded anew to Q4_0, which changes them by up to ")
    eight = exported(pico("llama", {"bits": 8, "group_size": 32, "symmetric": False}), tmp_path / "eight")
    assert "rounded anew to Q8_0, which changes them by up to 0." in eight.rounded[0]


@pytest.mark.parametrize(
    ("scheme", "inner", "outer"),
    [
        *(("F32", "F32", "F32"), ("F16", "F16", "F16"), ("BF16", "BF16", "BF16")),
        *(("Q8_0", "Q8_0", "Q8_0"), ("Q4_0", "Q4_0", "Q8_0"), ("Q4_1", "Q4_1", "Q8_0"), ("Q4_K", "Q5_0", "Q8_0")),
    ],
)
def test_a_scheme_is_the_type_of_the_blocks(
    scheme: str, inner: str, outer: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    written = exported(pico("llama"), tmp_path / "out", scheme)
    assert (written.path / f"pico-{scheme}.gguf").is_file()
    found = tensors_of(written.path)
    assert {found[f"blk.{block}.{name}.weight"].tensor_type.name for block in (0, 1) for name in INNER} == {inner}
    assert {found[name].tensor_type.name for name in ("token_embd.weight", "output.weight")} == {outer}
    assert {one.tensor_type.name for name, one in found.items() if "norm" in name} == {"F32"}
    assert bool(written.rounded) == scheme.startswith("Q")


def test_llama_cpp_runs_super_blocks(pico: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    source = pico("llama", hidden_size=256, intermediate_size=512)
    written = exported(source, tmp_path / "out", "Q4_K")
    found = tensors_of(written.path)
    assert found["blk.0.attn_q.weight"].tensor_type == Type.Q4_K
    single = as_single(written.path)
    inputs = {"input_ids": torch.arange(4, 36).reshape(1, 32)}
    one, other = gguf.answer(written.path, inputs), gguf.answer(single, inputs)
    assert (
        one - other
    ).norm() / other.norm() < 0.2  # measured: 0.08; activations are rounded to 8 bits, 256 to a scale


def test_side_files_stand_beside_the_file_and_the_config_names_no_layout(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    source = pico("llama", {"bits": 4, "group_size": 32})
    folder = exported(source, tmp_path / "out").path
    side = {path.name for path in source.iterdir() if "safetensors" not in path.name}
    assert {"report.md", "generation_config.json"} < side
    assert {path.name for path in folder.iterdir()} == side | {"pico-Q4_0.gguf"}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_a_number_beyond_fp16_is_an_error_and_not_infinity(models: Any, tmp_path: Path) -> None:
    model = models.FAMILIES["llama"].build(**WIDE)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(OutputError, match=r"up_proj\.weight has numbers beyond the range of F16: choose --scheme BF16"):
        exported(tmp_path / "large", tmp_path / "out", "F16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, 'config.json has hidden_act: "gelu", and llama.cpp computes with silu'),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "dynamic"}}, "rotary embeddings are of type dynamic"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rotary embeddings are of type llama3, and here default, linear"),
        ("qwen3", {"attention_bias": True}, "config.json has attention_bias: true"),
        ("gpt2", {"activation_function": "relu"}, 'config.json has activation_function: "relu"'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: true"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, changes: dict[str, Any], words: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refused:
        exported(pico(name, **changes), tmp_path / "out")
    assert words in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("opt", "its model type is opt, and of those that llama.cpp runs, this knows llama, mistral, qwen2"),
        ("bert-classifier", "it is a BertForSequenceClassification, and llama.cpp gives the output of a BertModel"),
    ],
)
def test_other_models_are_refused(name: str, words: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    assert words in (refusal(Request(Checkpoint.open(str(saved(name))), tmp_path / "out"), "gguf") or "")


def test_a_sliding_window_ends_the_context(pico: Callable[..., Path], tmp_path: Path) -> None:
    folder = exported(pico("mistral", sliding_window=16), tmp_path / "out").path
    assert opened(folder).fields["llama.context_length"].contents() == 16


def test_a_model_without_a_tokenizer_is_written_without(pico: Callable[..., Path], tmp_path: Path) -> None:
    fields = opened(exported(pico("llama"), tmp_path / "out").path).fields
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert fields["llama.vocab_size"].contents() == 96
