"""The two layouts: configs that compressed-tensors itself takes, and widths that are found again by module."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import nn

from modelzip.weights.affine import Affine
from modelzip.weights.layouts import (
    COMPRESSED_TENSORS,
    MODELZIP,
    Scheme,
    decoder,
    portable,
    quantization_config,
    shared_parts,
    stored,
    stored_tensors,
)
from modelzip.weights.linear import CompressedLinear

GROUP4, GROUP8, CHANNEL2 = Scheme(4, "group", 16, True), Scheme(8, "group", 16, True), Scheme(2, "channel", None, True)
MIXED = {"a.q": GROUP4, "a.k": GROUP4, "b.q": GROUP8, "b.k": CHANNEL2}
PORTABLE = [
    Scheme(bits, strategy, size, symmetric)
    for bits in (2, 4, 8)
    for strategy, size in (("tensor", None), ("channel", None), ("group", 16))
    for symmetric in (True, False)
]
PARTS = {"weight_packed": torch.empty(4, 4, dtype=torch.int32), "weight_scale": torch.empty(4, 1)}
FLOATS = {"float, fp8": "float-quantized", "float, nvfp4": "nvfp4-pack-quantized"}
LINEARS = [*MIXED, "c.skipped", "lm_head"]


def _meta(scheme, dtype="bfloat16", shape=(6, 32)):
    return {"kind": "affine", "shape": list(shape), **dataclasses.asdict(scheme), "dtype": dtype}


def _metas(schemes, **changes):
    return {name: _meta(scheme, **changes) for name, scheme in schemes.items()}


def _config(schemes=MIXED, layout=COMPRESSED_TENSORS, linears=LINEARS):
    config = quantization_config(_metas(schemes), layout=layout, linears=linears)
    return json.loads(json.dumps(config))  # as it comes back from config.json


def _taken(config) -> QuantizationConfig:
    """Their own reading of it; `dequantize` is transformers' key."""
    return QuantizationConfig.model_validate({key: value for key, value in config.items() if key != "dequantize"})


def _scheme(group) -> Scheme:
    arguments = group.weights
    return Scheme(arguments.num_bits, str(arguments.strategy), arguments.group_size, arguments.symmetric)


def test_compressed_tensors_takes_the_config():
    config = _taken(_config())
    assert config.format == "pack-quantized"
    assert config.quantization_status == "compressed"
    assert config.quant_method == "compressed-tensors"
    found = {target: _scheme(group) for group in config.config_groups.values() for target in group.targets}
    assert found == {"Linear": GROUP4, "b.q": GROUP8, "b.k": CHANNEL2}


def test_linears_that_stay_dense_are_named_as_ignored_and_only_they():
    assert sorted(_config()["ignore"]) == ["c.skipped", "lm_head"]


def test_the_commonest_scheme_is_the_general_one_and_the_rest_are_named():
    groups = _config()["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_0"]["weights"]["num_bits"] == 4
    flipped = _config(dict.fromkeys(MIXED, GROUP8) | {"a.q": GROUP4})["config_groups"]
    assert flipped["group_0"]["weights"]["num_bits"] == 8
    assert flipped["group_1"]["targets"] == ["a.q"]


@pytest.mark.parametrize("scheme", PORTABLE, ids=str)
def test_every_portable_scheme_passes_their_validation(scheme):
    assert portable([_meta(scheme)], transposed=False)
    assert _scheme(_taken(_config({"a": scheme})).config_groups["group_0"]) == scheme


def test_only_what_every_release_reads_alike_is_portable():
    assert portable(_metas(MIXED).values(), transposed=False)
    assert not portable([_meta(GROUP4)], transposed=True)
    for bits in (3, 5, 6, 7):
        assert not portable([_meta(GROUP4), _meta(Scheme(bits, "channel", None, True))], transposed=False)
    with_zeros = _meta(Scheme(4, "group", 16, False))
    assert portable([with_zeros, with_zeros], transposed=False)
    assert not portable([with_zeros, _meta(GROUP4)], transposed=False)


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELZIP])
def test_the_decoder_finds_each_modules_bits(layout, random_weight):
    decode = decoder(_config(layout=layout))
    for name, scheme in MIXED.items():
        weight = random_weight((6, 32), scheme, torch.bfloat16)
        found = decode(name, weight.tensors())
        assert found.bits == scheme.bits
        assert torch.equal(found.dense(), weight.dense())


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELZIP])
def test_the_scheme_is_read_back_from_config_and_shapes(layout, random_weight):
    schemes = {**MIXED, "t": Scheme(4, "tensor", None, True)}
    if layout == MODELZIP:
        schemes["u"] = Scheme(4, "tensor", None, False)
    config = _config(schemes, layout)
    for name, scheme in schemes.items():
        weight = random_weight((6, 32), scheme, torch.bfloat16)
        found = stored(
            config, name, {suffix: tensor.to("meta") for suffix, tensor in weight.tensors().items()}, (6, 32)
        )
        assert Scheme.of(found) == scheme
        assert found.meta() == weight.meta()
        assert found.nbytes == weight.nbytes
        assert all(tensor.is_meta for suffix, tensor in found.tensors().items() if suffix != "weight_shape")


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELZIP])
def test_weights_of_other_kinds_are_held_by_modelzips_own_layout_alone(layout, weights_of_all_kinds):
    for name, weight in weights_of_all_kinds(torch.float32).items():
        if weight.kind == "affine" or name in FLOATS:
            continue
        assert not portable([_meta(GROUP4), weight.meta()], transposed=False)
        if layout == COMPRESSED_TENSORS:
            with pytest.raises(ValueError, match="can't hold"):
                quantization_config({name: weight.meta()}, layout=layout, linears=[])
            continue
        config = json.loads(json.dumps(quantization_config({name: weight.meta()}, layout=layout, linears=[])))
        assert torch.equal(decoder(config)(name, weight.tensors()).dense(), weight.dense())
        assert stored(config, name, {}, weight.shape).nbytes == weight.nbytes


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_called_as_compressed_tensors_calls_them(name, weights_of_all_kinds):
    weight = weights_of_all_kinds(torch.bfloat16)[name]
    assert portable([weight.meta(), weight.meta()], transposed=False)
    assert not portable([weight.meta(), _meta(GROUP4)], transposed=False)
    assert not portable([weight.meta()], transposed=True)
    made = quantization_config({name: weight.meta()}, layout=COMPRESSED_TENSORS, linears=[name, "lm_head"])
    config = json.loads(json.dumps(made))
    scheme = _taken(config).config_groups["group_0"]
    assert config["format"] == scheme.format == FLOATS[name]
    written = stored_tensors(weight, COMPRESSED_TENSORS)
    library = BaseCompressor.get_value_from_registry(FLOATS[name])
    assert written.keys() == set(library.compression_param_names(scheme))
    dense = library.decompress(dict(written), scheme)["weight"]
    assert torch.equal(dense.float(), weight.dense())
    assert torch.equal(decoder(config)(name, written).dense(), weight.dense())
    on_meta = {suffix: tensor.to("meta") for suffix, tensor in written.items()}
    assert stored(config, name, on_meta, weight.shape).meta() == weight.meta()


def test_block_floats_of_two_formats_do_not_share_a_file(weights_of_all_kinds):
    weights = weights_of_all_kinds(torch.bfloat16)
    assert not portable([weights[name].meta() for name in FLOATS], transposed=False)
    assert not portable([weights["float, fp8, one scale"].meta()], transposed=False)  # e5m2


def test_shared_parts_are_written_with_their_owners(weights_of_all_kinds):
    meta = weights_of_all_kinds(torch.float32)["low rank"].meta()
    shared = {**shared_parts("head", "table", meta), "b.bias": "a.bias"}
    config = quantization_config({"head": meta, "table": meta}, layout=MODELZIP, linears=[], shared=shared)
    assert config["shared"] == {
        "head.weight_left": "table.weight_left",
        "head.weight_right": "table.weight_right",
        "b.bias": "a.bias",
    }
    with pytest.raises(ValueError, match="can't hold"):
        quantization_config({}, layout=COMPRESSED_TENSORS, linears=[], shared={"b.bias": "a.bias"})


def test_modelzips_own_config_names_every_module_with_its_scheme():
    config = _config(layout=MODELZIP)
    assert config["quant_method"] == "modelzip"
    assert config["version"] == 1
    assert config["modules"]["b.k"] == {
        "kind": "affine",
        "shape": [6, 32],
        "dtype": "bfloat16",
        "bits": 2,
        "strategy": "channel",
        "group_size": None,
        "symmetric": True,
    }
    assert config["modules"].keys() == MIXED.keys()


def _activations(layout):
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}, "input_activations": {"num_bits": 4}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized as gptq"),
        (_activations("nvfp4-pack-quantized"), "compressed-tensors with inputs of 4 bit"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors int-quantized"),
        ({"quant_method": "compressed-tensors", "format": "mixed-precision"}, "compressed-tensors mixed-precision"),
        ({"quant_method": "compressed-tensors"}, "quantized as compressed-tensors"),
        ({"bits": 4}, "quantized as None"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_foreign_layouts_are_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        decoder(config)
    with pytest.raises(ValueError, match=words):
        stored(config, "a", PARTS, (4, 32))


def test_patterns_and_precedence_are_compressed_tensors_own():
    """Other tools write `re:` targets; an exact name goes before a pattern, and a pattern before a class."""
    config = _config()
    config["config_groups"]["group_3"] = {"targets": [r"re:.*\.k$"], "weights": {"num_bits": 8}}
    bits = {name: stored(config, name, PARTS, (4, 32)).bits for name in ("a.q", "a.k", "b.k")}
    assert bits == {"a.q": 4, "a.k": 8, "b.k": 2}


def test_a_module_that_no_group_names_is_refused():
    config = _config()
    config["config_groups"]["group_0"]["targets"] = ["re:.*up_proj"]
    with pytest.raises(ValueError, match=r"a\.q"):
        stored(config, "a.q", PARTS, (4, 32))


def _write(model, schemes, folder, exchange, dtype):
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = exchange(model, schemes, dtype)
    config = quantization_config(
        {name: weight.meta() for name, weight in weights.items()}, layout=COMPRESSED_TENSORS, linears=linears
    )
    model.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"quantization_config": config}))
    return weights, json.loads(json.dumps(config))


def _mixture(models):
    """Four kinds on one layer, one kind on the other, and linears of both left alone."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    kinds = (GROUP4, GROUP8, CHANNEL2, Scheme(8, "tensor", None, True))
    first = {f"model.layers.0.{name}": kind for name, kind in zip(names, kinds, strict=True)}
    return {**first, **{f"model.layers.1.{name}": GROUP4 for name in names}}


def _uniform(scheme):
    return lambda models: dict.fromkeys(models.FAMILIES["llama"].expected_linears(), scheme)


OPENED = {str(scheme): _uniform(scheme) for scheme in PORTABLE if scheme.bits == 4 or scheme.strategy == "group"}


@pytest.mark.parametrize(
    ("schemes", "dtype"),
    [
        *((schemes, torch.float32) for schemes in (_mixture, *OPENED.values())),
        *((_uniform(scheme), torch.bfloat16) for scheme in (GROUP4, GROUP8, Scheme(4, "group", 16, False))),
        (_mixture, torch.bfloat16),
    ],
    ids=["mixture", *OPENED, "bf16 4", "bf16 8", "bf16 4 with zero points", "bf16 mixture"],
)
def test_plain_transformers_opens_what_is_portable_as_the_same_weights(
    schemes, dtype, models, saved, exchange, make_dense, tmp_path
):
    schemes = schemes(models)
    assert portable(_metas(schemes).values(), transposed=False)
    model = models.FAMILIES["llama"].build().to(dtype)
    weights, config = _write(model, schemes, tmp_path, exchange, dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert not any(isinstance(module, CompressedLinear) for module in plain.modules())
    found = next(models.outputs(plain))  # makes the weights dense, if they aren't yet
    for name, weight in weights.items():
        assert torch.equal(plain.get_submodule(name).weight, weight.dense(dtype)), name
    dense = transformers.AutoModelForCausalLM.from_pretrained(saved("llama"), dtype=dtype).eval()
    truth = next(models.outputs(make_dense(dense, weights)))
    assert torch.equal(found, truth)

    decode, tensors = decoder(config), load_file(tmp_path / "model.safetensors")
    for name, weight in weights.items():
        parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in weight.tensors()}
        assert isinstance(decode(name, parts), Affine)
        assert torch.equal(decode(name, parts).dense(), weight.dense())
