"""Models with weights of every kind open with plain transformers: nothing missing, stored once, computing the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.weights.dense import Dense
from modelzip.weights.embedding import CompressedEmbedding
from modelzip.weights.layouts import MODELZIP, decoder, quantization_config, shared_parts
from modelzip.weights.linear import CompressedLinear
from modelzip.weights.low_rank import LowRank
from modelzip.weights.value import CompressedWeight

KINDS = (
    *("dense", "kronecker", "low rank", "low rank, affine", "sparse", "sparse 2:4", "sparse codes 2:4"),
    "tensor train",
)


@dataclass
class Saved:
    """A checkpoint written by hand: a model's own tensors with some modules' weights exchanged for others."""

    folder: Path
    model: nn.Module
    weights: Mapping[str, CompressedWeight]
    shared: Mapping[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def write(self) -> Saved:
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, weight in self.weights.items():
            state.pop(f"{name}.weight")
            state.update({f"{name}.{suffix}": tensor for suffix, tensor in weight.tensors().items()})
        for name in {**self.shared, **self.model.all_tied_weights_keys}:  # type: ignore[dict-item]
            state.pop(name, None)
        self.tensors.update(state)
        save_file(state, self.folder / "model.safetensors", metadata={"format": "pt"})
        metas = {name: weight.meta() for name, weight in self.weights.items()}
        written: dict[str, Any] = quantization_config(metas, layout=MODELZIP, linears=[], shared=self.shared)
        config = {
            **self.model.config.to_dict(),
            "architectures": [type(self.model).__name__],
            "dtype": "float32",
            "quantization_config": written,
        }
        (self.folder / "config.json").write_text(json.dumps(config))
        return self

    def open(self, caplog) -> nn.Module:
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            model, info = type(self.model).from_pretrained(self.folder, output_loading_info=True)  # type: ignore[attr-defined]
        finally:
            logger.removeHandler(caplog.handler)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        return model

    def streamed(self, models) -> Tensor:
        decode = decoder(Checkpoint.open(str(self.folder)).quantization or {})
        streamed = StreamedModel(
            Checkpoint.open(str(self.folder)),
            dtype=torch.float32,
            device=torch.device("cpu"),
            decode=lambda name, parts: decode(name, parts).dense(torch.float32),
        )
        with torch.no_grad():
            output = next(iter(streamed.outputs([{"input_ids": models.tokens()}])))
        return output[0]


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def _dense(model: nn.Module, weights: Mapping[str, CompressedWeight]) -> nn.Module:
    """The model with these weights put into its own modules, which must be of the same shapes."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight.dense())
    return model


def _saves_the_same(model: nn.Module, saved: Saved, folder: Path) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]
    again = load_file(folder / "model.safetensors")
    assert again.keys() == saved.tensors.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.tensors.items())
    first, second = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (saved.folder, folder))
    assert first == second


@pytest.mark.parametrize("architecture", ["bert-classifier", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_every_kind_opens_streams_and_saves(
    architecture, kind, models, weights_of_all_kinds, caplog, tmp_path
):
    source = models.FAMILIES[architecture]
    names = [name for name in source.expected_linears() if "k" not in name.rpartition(".")[2]]
    model = source.build()
    weights = {
        name: weights_of_all_kinds(torch.float32, tuple(model.get_submodule(name).weight.shape), seed)[kind]
        for seed, name in enumerate(names)
    }
    saved = Saved(tmp_path, model, weights).write()
    found = saved.open(caplog)
    assert all(isinstance(found.get_submodule(name), nn.Linear) == (kind == "dense") for name in names)
    truth = next(models.outputs(_dense(source.build(), weights)))
    assert _error(next(models.outputs(found)), truth) < 1e-5  # measured: 7.0e-7
    assert _error(saved.streamed(models), truth) < 1e-5  # measured: 0
    (tmp_path / "again").mkdir()
    _saves_the_same(found, saved, tmp_path / "again")


def _headless(model: nn.Module, layer: int, keep: list[int]) -> dict[str, CompressedWeight]:
    """Query, key, value and output of one BERT layer with only these heads (of 8 columns each), as dense weights."""
    rows = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in keep])
    block = f"encoder.layer.{layer}.attention"
    weights: dict[str, CompressedWeight] = {}
    for name in ("query", "key", "value"):
        linear = model.get_submodule(f"{block}.self.{name}")
        weights[f"{block}.self.{name}"] = Dense(linear.weight.data[rows].clone())
        linear.bias = nn.Parameter(linear.bias.data[rows].clone())
    output = model.get_submodule(f"{block}.output.dense")
    weights[f"{block}.output.dense"] = Dense(output.weight.data[:, rows].clone())
    return weights


@pytest.mark.parametrize("factorized", [False, True])
def test_pruned_heads_open_as_smaller_linears_and_compute_as_masked_ones(factorized, models, caplog, tmp_path):
    truth_model, model = (models.FAMILIES["bert"].build() for _ in range(2))
    with torch.no_grad():  # masked: heads 1 and 3 of layer 0 give nothing to the output
        output = truth_model.get_submodule("encoder.layer.0.attention.output.dense").weight
        output[:, 8:16] = 0
        output[:, 24:] = 0
    weights = _headless(model, 0, [0, 2])
    if factorized:  # exactly, at full rank
        for name, weight in weights.items():
            left, values, right = torch.linalg.svd(weight.dense(), full_matrices=False)
            weights[name] = LowRank(Dense((left * values).contiguous()), Dense(right.contiguous()))
    saved = Saved(tmp_path, model, weights).write()
    found = saved.open(caplog)
    query = found.get_submodule("encoder.layer.0.attention.self.query")
    assert isinstance(query, CompressedLinear if factorized else nn.Linear)
    assert (tuple(query.weight.shape), tuple(query.bias.shape)) == ((16, 32), (16,))
    truth = next(models.outputs(truth_model))
    assert _error(next(models.outputs(found)), truth) < 1e-5  # measured: 2.4e-7
    assert _error(saved.streamed(models), truth) < 1e-5  # measured: 2.4e-7
    (tmp_path / "again").mkdir()
    _saves_the_same(found, saved, tmp_path / "again")


TIED = {
    "llama-tied": ("model.embed_tokens", "lm_head"),
    "bert-mlm": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "gemma3": ("model.embed_tokens", "lm_head"),
}


@pytest.mark.parametrize("kind", ["low rank", "low rank, affine", "affine, zero points"])
@pytest.mark.parametrize("architecture", TIED)
def test_a_compressed_embedding_is_stored_once_for_a_tied_head(
    architecture, kind, models, weights_of_all_kinds, caplog, tmp_path
):
    table, head = TIED[architecture]
    source = models.FAMILIES[architecture]
    weight = weights_of_all_kinds(torch.float32, (96, 32))[kind]
    model = source.build()
    shared = shared_parts(head, table, weight.meta())
    saved = Saved(tmp_path, model, {table: weight, head: weight}, shared).write()
    found = saved.open(caplog)
    embedding, linear = found.get_submodule(table), found.get_submodule(head)
    assert isinstance(embedding, CompressedEmbedding)
    assert isinstance(linear, CompressedLinear)
    assert all(getattr(linear, suffix) is getattr(embedding, suffix) for suffix in weight.tensors())
    truth = next(models.outputs(_dense(source.build(), {table: weight})))
    assert _error(next(models.outputs(found)), truth) < 1e-5  # measured: 1.6e-7
    assert _error(saved.streamed(models), truth) < 1e-5  # measured: 0
    (tmp_path / "again").mkdir()
    _saves_the_same(found, saved, tmp_path / "again")


def _layer_names(model: nn.Module, prefix: str) -> list[str]:
    return [name for name in model.state_dict() if name.startswith(f"{prefix}.")]


@pytest.mark.parametrize(
    ("architecture", "stack"), [("bert-classifier", "bert.encoder.layer"), ("llama", "model.layers")]
)
@pytest.mark.parametrize("kind", [None, "low rank", "sparse codes"])
def test_layers_that_are_one_are_stored_once_and_are_the_same_tensors(
    architecture, stack, kind, models, weights_of_all_kinds, caplog, tmp_path
):
    source = models.FAMILIES[architecture]
    model, truth_model = source.build(), source.build()
    leaves = [name.removeprefix(f"{stack}.0.") for name in source.expected_linears(layers=1)] if kind else []
    weights: dict[str, CompressedWeight] = {}
    shared = {}
    for seed, leaf in enumerate(leaves):
        shape = tuple(model.get_submodule(f"{stack}.0.{leaf}").weight.shape)
        weight = weights_of_all_kinds(torch.float32, shape, seed)[str(kind)]
        weights |= {f"{stack}.{layer}.{leaf}": weight for layer in range(2)}
        shared |= shared_parts(f"{stack}.1.{leaf}", f"{stack}.0.{leaf}", weight.meta())
    compressed = {f"{name}.weight" for name in weights}
    for name in _layer_names(model, f"{stack}.1"):
        if name not in compressed:
            shared[name] = name.replace(f"{stack}.1.", f"{stack}.0.")
    saved = Saved(tmp_path, model, weights, shared).write()
    assert not any(name.startswith(f"{stack}.1.") for name in saved.tensors)
    found = saved.open(caplog)
    for target, owner in shared.items():
        (to, _, leaf), (of, _, of_leaf) = target.rpartition("."), owner.rpartition(".")
        assert getattr(found.get_submodule(to), leaf) is getattr(found.get_submodule(of), of_leaf), target
    with torch.no_grad():
        state = truth_model.state_dict()
        for name in _layer_names(truth_model, f"{stack}.1"):
            state[name].copy_(state[name.replace(f"{stack}.1.", f"{stack}.0.")])
    truth = next(models.outputs(_dense(truth_model, weights)))
    assert _error(next(models.outputs(found)), truth) < 1e-5  # measured: 4.0e-7
    assert _error(saved.streamed(models), truth) < 1e-5  # measured: 0
    (tmp_path / "again").mkdir()
    _saves_the_same(found, saved, tmp_path / "again")


def test_one_factor_may_be_shared_and_the_other_not(models, caplog, tmp_path):
    source = models.FAMILIES["bert"]
    model = source.build()
    generator = torch.Generator().manual_seed(0)
    names = [f"encoder.layer.{layer}.attention.self.query" for layer in range(2)]
    left = torch.randn(32, 4, generator=generator)
    weights = {name: LowRank(Dense(left), Dense(torch.randn(4, 32, generator=generator))) for name in names}
    saved = Saved(tmp_path, model, weights, {f"{names[1]}.weight_left": f"{names[0]}.weight_left"}).write()
    found = saved.open(caplog)
    first, second = (found.get_submodule(name) for name in names)
    assert second.weight_left is first.weight_left
    assert not torch.equal(second.weight_right, first.weight_right)
    truth = next(models.outputs(_dense(source.build(), weights)))
    assert _error(next(models.outputs(found)), truth) < 1e-5  # measured: 2.2e-7
    assert _error(saved.streamed(models), truth) < 1e-5  # measured: 0
    (tmp_path / "again").mkdir()
    _saves_the_same(found, saved, tmp_path / "again")


def test_a_classifiers_encoder_opens_on_its_own(models, weights_of_all_kinds, tmp_path):
    model = models.FAMILIES["bert-classifier"].build()
    names = models.FAMILIES["bert-classifier"].expected_linears()
    weights = {
        name: weights_of_all_kinds(torch.float32, tuple(model.get_submodule(name).weight.shape))["low rank"]
        for name in names
    }
    Saved(tmp_path, model, weights).write()
    base, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    module = base.get_submodule(names[0].removeprefix("bert."))
    assert torch.equal(module.weight_value.dense(), weights[names[0]].dense())
