"""onnx: onnxruntime computes with the packed integers what the compressed model does, token by token if it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.compressors.quantize.grid import fit_grid
from modelzip.compressors.quantize.rtn import rtn
from modelzip.evaluation.outputs import main_output
from modelzip.exporters import onnx
from modelzip.exporters.formats import export
from modelzip.exporters.request import Request, Written
from modelzip.exporters.source import Source
from modelzip.pipeline import run
from modelzip.pipeline.run import run_recipe
from modelzip.recipes.load import parse_recipe

library = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Exported = Callable[..., Written]
PRECISION = 1e-5
"""Of logits, as a part of the largest, where all is fp32. Measured: at most 2e-6."""


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """exported(folder, "int4") -> what the export of that model gave, made once a session."""
    made: dict[tuple[Path, str], Written] = {}

    def of(source: Path, scheme: str = "auto") -> Written:
        if (source, scheme) not in made:
            request = Request(Checkpoint.open(str(source)), tmp_path_factory.mktemp("onnx") / "out", scheme=scheme)
            made[source, scheme] = export(request, "onnx")
        return made[source, scheme]

    return of


def graph_of(folder: Path) -> Any:
    (file,) = (folder / "onnx").glob("*.onnx")
    return library.load(file).graph


def packed_nodes(folder: Path) -> list[Any]:
    return [node for node in graph_of(folder).node if node.op_type == "MatMulNBits"]


def opened(source: Path) -> Any:
    return load_whole(Checkpoint.open(str(source)), dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def expected(source: Path, **inputs: Tensor) -> Tensor:
    return main_output(opened(source)(**inputs))


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, as a part of the largest number."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def ids_of(rows: int = 1, tokens: int = 11) -> Tensor:
    return torch.randint(4, 90, (rows, tokens), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"bits": 4}),
        ("llama-tied", {"bits": 4, "symmetric": False, "embeddings": True}),
        ("gemma2", {"bits": 8, "embeddings": True, "symmetric": False}),
        ("gpt2", {"bits": 3, "symmetric": False}),
        pytest.param("opt", {"bits": 8, "group_size": "tensor"}, marks=pytest.mark.slow),
        ("bert-mlm", {"bits": 4, "group_size": "channel", "embeddings": True, "symmetric": False}),
        ("bert-classifier", {"bits": 6, "group_size": "channel"}),
        pytest.param("distilbert", {"bits": 4, "group_size": 32}, marks=pytest.mark.slow),
        ("minilm", {"bits": 4, "group_size": "channel", "symmetric": False}),
    ],
    ids=str,
)
def test_onnxruntime_computes_what_the_compressed_model_does_and_no_matrix_is_left_dense(
    name: str, settings: dict[str, Any], compressed: Callable[..., Path], models: Any, exported: Exported
) -> None:
    small = compressed(name, **settings)
    written = exported(small)
    assert written.rounded == ()
    source = Source.of(Checkpoint.open(str(small)))
    held = [one for one in source.matrices() if source.stored(one) is not None]
    tables = [one for one in held if isinstance(source.model.get_submodule(one), torch.nn.Embedding)]
    left_out = {"pooler.dense"} & set(held)  # of a BertModel, whose last hidden states don't need it
    assert len(packed_nodes(written.path)) == len(held) - len(tables) - len(left_out) > 0
    for ids in (ids_of(), ids_of(tokens=1)):
        found, wanted = onnx.answer(written.path, {"input_ids": ids}), expected(small, input_ids=ids)
        assert difference(found, wanted) < PRECISION


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_bytes_are_those_of_onnxruntimes_own_packing(bits: int, symmetric: bool) -> None:
    """Blocks that span their grid are rounded to it by onnxruntime, too."""
    from onnxruntime.capi import _pybind_state as native

    from modelzip.exporters.onnx_packing import Layout
    from modelzip.weights.affine import Affine

    rows, blocks, block, half = 5, 3, 32, 1 << (bits - 1)
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half, (rows, blocks, block), generator=draw)
    codes[..., 3], codes[..., 8] = -half, half - 1
    scale = 2.0 ** torch.randint(-6, 3, (rows, blocks), generator=draw)
    zero_point = None if symmetric else torch.randint(1 - half, half - 1, (rows, blocks), generator=draw).to(torch.int8)
    weight = Affine.from_codes(codes.reshape(rows, -1), scale, zero_point, bits=bits)
    layout = Layout.of(weight.meta())
    assert layout is not None
    found = layout.pack(weight)
    wanted = {name: torch.zeros(shape, dtype=found[name].dtype).numpy() for name, shape in layout.shapes.items()}
    zeros = wanted.get("zeros", torch.zeros(rows, -(-blocks * bits // 8), dtype=torch.uint8).numpy())
    pack = native.quantize_matmul_4bits if bits == 4 else native.quantize_matmul_8bits
    dense = weight.dense().T.contiguous().numpy()
    pack(
        wanted["codes"], dense, wanted["scales"].reshape(-1), zeros.reshape(-1), block, rows, dense.shape[0], symmetric
    )
    assert found.keys() == wanted.keys()
    if bits == 4 and not symmetric:  # the half byte after an odd number of blocks is nobody's
        found["zeros"][:, -1] &= 15
        zeros[:, -1] &= 15
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.from_numpy(wanted[name])), name


def test_a_batch_with_padding_gives_each_text_what_it_gives_alone(
    compressed: Callable[..., Path], exported: Exported
) -> None:
    """For an encoder, padded on the right, and a decoder, padded on the left."""
    for family, side in (("bert-classifier", "right"), ("llama", "left")):
        small = compressed(family, bits=4)
        written, ids = exported(small), ids_of(rows=3)
        mask = torch.ones_like(ids)
        hidden = slice(7, None) if side == "right" else slice(None, 4)
        mask[1, hidden] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if family == "llama":
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        found, wanted = onnx.answer(written.path, inputs), expected(small, **inputs)
        alone = expected(small, input_ids=ids[1:2, mask[1].bool()])
        if family == "llama":
            assert difference(found[1:2, mask[1].bool()], alone) < PRECISION
            found, wanted = found[mask.bool()], wanted[mask.bool()]
        else:
            assert difference(found[1:2], alone) < PRECISION
        assert difference(found, wanted) < PRECISION


def written_by_onnxruntime(folder: Path, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """The most likely tokens, one after the other, with the cache handed on."""
    (file,) = (folder / "onnx").glob("*.onnx")
    session = onnxruntime.InferenceSession(str(file))
    names = [one.name for one in session.get_outputs()]
    known = {one.name for one in session.get_inputs()}
    cache = {
        one.name: torch.zeros(len(ids), one.shape[1], 0, one.shape[3]).numpy()
        for one in session.get_inputs()
        if one.name.startswith("past_key_values.")
    }
    new, chosen = ids, []
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        given = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        feed = {name: tensor.numpy() for name, tensor in given.items() if name in known}
        outputs = dict(zip(names, session.run(None, {**feed, **cache}), strict=True))
        new = torch.from_numpy(outputs["logits"])[:, -1:].argmax(-1)
        chosen.append(new)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
    return torch.cat(chosen, dim=1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama-tied", {"bits": 4, "symmetric": False, "embeddings": True}),
        ("mistral", {"bits": 8}),
        pytest.param("gpt2", {"bits": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_with_its_cache_onnxruntime_writes_the_tokens_that_transformers_writes(
    name: str,
    settings: dict[str, Any],
    compressed: Callable[..., Path],
    models: Any,
    exported: Exported,
    tmp_path: Path,
) -> None:
    """Two texts, one padded on the left. Mistral looks back no further than 6 tokens; GPT-2, tied, repeats itself."""
    changed, source = {"mistral": {"sliding_window": 6}, "gpt2": {"tie_word_embeddings": False}}, None
    if name in changed:
        source = tmp_path / name
        model = models.FAMILIES[name].build(**changed[name])
        for norm in [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]:
            torch.nn.init.zeros_(norm.bias)  # which would outweigh what the tokens say
        model.save_pretrained(source)
    small = compressed(name, source, **settings)
    ids = ids_of(rows=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model = opened(small)
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.eos_token_id = None
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    found = written_by_onnxruntime(exported(small).path, ids, mask, 12)
    assert torch.equal(found, wanted[:, ids.shape[1] :])
    assert found.unique().numel() > 2  # of a model that repeats itself, this would tell little


def test_inputs_and_outputs_are_named_as_optimum_names_them(
    compressed: Callable[..., Path], exported: Exported
) -> None:
    """transformers.js finds the cache and its sizes by these names."""
    graph = graph_of(exported(compressed("llama", bits=4)).path)
    sizes = {
        one.name: [axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in graph.input
    }
    grows = ["batch_size", 2, "past_sequence_length", 8]
    assert sizes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{layer}.{part}": grows for layer in range(2) for part in ("key", "value")},
    }
    caches = [f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert [one.name for one in graph.output] == ["logits", *caches]
    graph = graph_of(exported(compressed("bert-classifier", bits=4)).path)
    assert [one.name for one in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]


@pytest.mark.slow
def test_a_table_that_is_taken_as_a_matrix_stays_right(exported: Exported, tmp_path: Path) -> None:
    """DeBERTa never looks rows up in its relative positions, but multiplies the whole table."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = DebertaV2Config(num_attention_heads=4, initializer_range=0.2, **sizes, **relative)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path)
    ids = ids_of(rows=2)
    found = onnx.answer(exported(tmp_path, "fp32").path, {"input_ids": ids})
    assert difference(found, expected(tmp_path, input_ids=ids)) < PRECISION


def test_a_tied_table_is_stored_once_packed_or_dense(
    compressed: Callable[..., Path], saved: Callable[[str], Path], exported: Exported
) -> None:
    small = compressed("llama-tied", bits=4, symmetric=False, embeddings=True)
    names = [one.name for one in graph_of(exported(small).path).initializer]
    assert [name for name in names if "embed" in name or "head" in name] == [
        f"model.embed_tokens.weight_{part}" for part in ("codes", "scales", "zeros")
    ]
    names = [one.name for one in graph_of(exported(saved("llama-tied"), "fp32").path).initializer]
    assert [name for name in names if "embed" in name or "head" in name] == ["model.embed_tokens.weight"]


def test_fp32_stores_all_dense_and_computes_the_same(
    compressed: Callable[..., Path], saved: Callable[[str], Path], exported: Exported
) -> None:
    for source in (compressed("bert-classifier", bits=4), saved("llama-tied")):
        written = exported(source, "fp32")
        assert written.rounded == ()
        assert (written.path / "onnx" / "model.onnx").is_file()
        assert packed_nodes(written.path) == []
        ids = ids_of()
        assert difference(onnx.answer(written.path, {"input_ids": ids}), expected(source, input_ids=ids)) < PRECISION


@pytest.mark.parametrize(("scheme", "file"), [("int4", "model_q4.onnx"), ("int8", "model_quantized.onnx")])
def test_a_dense_model_is_rounded_as_modelzip_rounds_in_the_blocks_alone(
    scheme: str, file: str, saved: Callable[[str], Path], exported: Exported
) -> None:
    source = saved("bert-classifier")
    written = exported(source, scheme)
    assert written.rounded[0].startswith(f"12 matrices were rounded anew to {scheme}")
    assert [path.name for path in (written.path / "onnx").iterdir()] == [file]
    model = opened(source)
    for linear in model.bert.encoder.modules():
        if isinstance(linear, torch.nn.Linear):
            dense = torch.nn.functional.pad(linear.weight, (0, -linear.in_features % 32)) if scheme == "int4" else None
            options: dict[str, Any] = {"clip": "mse", "dtype": torch.float32}
            if dense is None:
                dense = linear.weight
                grid = fit_grid(dense, bits=8, group_size=dense.shape[1], symmetric=True, **options)
            else:
                grid = fit_grid(dense, bits=4, group_size=32, symmetric=False, **options)
            linear.weight.data = rtn(dense, grid).dense()[:, : linear.in_features]
    ids = ids_of()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    assert difference(onnx.answer(written.path, {"input_ids": ids}), wanted) < PRECISION
    assert difference(wanted, expected(source, input_ids=ids)) > 10 * PRECISION


def test_integers_that_fit_a_scheme_are_kept_and_wider_ones_rounded(
    compressed: Callable[..., Path], exported: Exported
) -> None:
    narrow, wide = compressed("bert-classifier", bits=4), compressed("bert-classifier", bits=8)
    kept = exported(narrow, "int8")
    assert kept.rounded == ()
    ids = ids_of()
    assert difference(onnx.answer(kept.path, {"input_ids": ids}), expected(narrow, input_ids=ids)) < PRECISION
    assert len(exported(wide, "int4").rounded) == 1


def processed(model: Path, folder: Path, *stages: dict[str, Any], **more: Any) -> Path:
    recipe = {"model": str(model), "stages": list(stages), "evaluate": {"enabled": False}, **more}

    class Silent:
        def step(self, stage: str, done: int, total: int, note: str = "") -> None:
            pass

        def say(self, line: str) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "reopen", lambda *arguments, **options: (None, []))
        run_recipe(parse_recipe(recipe, "test"), output=folder, progress=Silent())
    return folder


def test_a_model_that_lost_heads_and_fits_no_plain_checkpoint_runs(
    saved: Callable[[str], Path], exported: Exported, tmp_path: Path
) -> None:
    """On top, it is quantized to 8 bits."""
    stages = (
        {"prune": {"method": "heads", "share": 0.5}},
        {"quantize": {"method": "rtn", "bits": 8, "group_size": 16}},
    )
    data = {"samples": 2, "seq_len": 8}
    small = processed(saved("bert-classifier"), tmp_path / "small", *stages, calibration=data)
    assert json.loads((small / "config.json").read_text())["quantization_config"]["attributes"]
    assert Source.of(Checkpoint.open(str(small))).shape("bert.encoder.layer.0.attention.self.query") != (32, 32)
    ids = ids_of()
    written = exported(small)
    assert len(packed_nodes(written.path)) == 12
    assert difference(onnx.answer(written.path, {"input_ids": ids}), expected(small, input_ids=ids)) < PRECISION


def test_factors_stay_two_products_packed_ones_too(
    saved: Callable[[str], Path], exported: Exported, tmp_path: Path
) -> None:
    plain = processed(saved("llama-tied"), tmp_path / "plain", {"factorize": {"method": "svd", "ratio": 0.7}})
    packed = processed(plain, tmp_path / "packed", {"quantize": {"method": "rtn", "bits": 8, "group_size": "channel"}})
    ids = ids_of()
    for source, count in ((plain, 0), (packed, 28)):
        written = exported(source)
        assert len(packed_nodes(written.path)) == count
        wanted = expected(source, input_ids=ids)
        assert difference(onnx.answer(written.path, {"input_ids": ids}), wanted) < PRECISION
    stored = [one for one in graph_of(exported(plain).path).initializer if "q_proj.weight" in one.name]
    assert [one.name.rpartition("_")[2] for one in stored] == ["left", "right"] * 2  # of two layers


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t5", "T5ForConditionalGeneration has an encoder and a decoder, and ONNX is written for models of one stack"),
        ("mixtral", r"model\.layers\.0\.mlp\.gate is of a mixture of experts"),
    ],
)
def test_what_can_not_be_written_is_refused(
    name: str, words: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        export(Request(Checkpoint.open(str(saved(name))), tmp_path / "out"), "onnx")
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_state_instead_of_a_cache_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)).save_pretrained(tmp_path)
    found = onnx.misfit(Source.of(Checkpoint.open(str(tmp_path))), "auto")
    assert found is not None
    assert "ONNX is written for models whose cache is keys and values" in found


def test_groups_that_onnxruntime_has_no_kernel_for_are_refused_unless_they_may_be_rounded(
    compressed: Callable[..., Path], tmp_path: Path
) -> None:
    source = Source.of(Checkpoint.open(str(compressed("minilm", bits=4, group_size=24))))
    found = onnx.misfit(source, "auto")
    assert found is not None
    assert "encoder.layer.0.output.dense has 24 columns to a scale, and onnxruntime needs a mult" in found
    assert onnx.misfit(source, "int8") is None


def test_tokenizer_and_generation_config_survive_and_the_config_says_which_file_to_take(
    save_classifier: Callable[..., Path], compressed: Callable[..., Path], exported: Exported, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    source = save_classifier(tmp_path / "model")
    folder = exported(source, "int8").path
    text = "a warm and clever film"
    one, other = (AutoTokenizer.from_pretrained(place)(text) for place in (source, folder))
    assert one["input_ids"] == other["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["transformers.js_config"] == {"dtype": "q8"}
    folder = exported(compressed("llama", bits=4)).path
    assert (folder / "generation_config.json").is_file()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_weights_beyond_one_file_lie_beside_it_under_the_names_that_transformers_js_asks_for(
    compressed: Callable[..., Path], exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = compressed("bert-classifier", bits=4)
    whole = exported(small).path
    monkeypatch.setattr(onnx, "INLINE_BYTES", 24_000)
    folder = export(Request(Checkpoint.open(str(small)), tmp_path / "out"), "onnx").path
    names = sorted(path.name for path in (folder / "onnx").iterdir())
    assert names == ["model_q4.onnx", "model_q4.onnx_data", "model_q4.onnx_data_1"]
    hints = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert hints == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 2}}
    sizes = [(place / "onnx" / "model_q4.onnx").stat().st_size for place in (folder, whole)]
    assert sizes[0] < sizes[1] - 24_000
    inputs = {"input_ids": ids_of()}
    assert torch.equal(onnx.answer(folder, inputs), onnx.answer(whole, inputs))


def test_the_file_says_nothing_of_the_machine_that_wrote_it(
    compressed: Callable[..., Path], exported: Exported
) -> None:
    (file,) = (exported(compressed("llama", bits=4)).path / "onnx").iterdir()
    data = file.read_bytes()
    assert not any(word in data for word in (b".py", b"site-packages", str(Path.home()).encode()))
