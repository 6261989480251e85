"""Training with learned steps: what it beats, what it starts from, and how it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import decode_of
from modelzip.weights.layouts import COMPRESSED_TENSORS, decoder


@pytest.fixture(scope="module")
def material(save_classifier, write_labelled, train_stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv, dev.tsv and a trained classifier whose large weights rounding hurts."""
    folder = tmp_path_factory.mktemp("lsq")
    save_classifier(folder / "fresh", initializer_range=0.2)
    write_labelled(folder / "train.tsv", 512, seed=1)
    write_labelled(folder / "dev.tsv", 256, seed=2)
    stage = {"method": "labels", "data": str(folder / "train.tsv"), "learning_rate": 5e-3, "max_steps": 120}
    train_stage(folder / "fresh", folder / "dense", "distill", stage)
    return folder


@pytest.fixture(scope="module")
def stage(material) -> dict[str, Any]:
    """At two bits with one scale a row, on labels alone."""
    data = {"data": str(material / "train.tsv"), "validation": str(material / "dev.tsv")}
    grid = {"method": "lsq", "bits": 2, "group_size": "channel", "alpha": 0}
    return {**data, **grid, "learning_rate": 2e-3, "max_steps": 40, "eval_every": 40, "log_every": 20}


@pytest.fixture(scope="module")
def rounded(material, compress) -> Path:
    """The classifier, rounded after training on the same kind of grid."""
    rtn = {"method": "rtn", "bits": 2, "group_size": "channel", "symmetric": True, "clip": "mse"}
    compress(material / "dense", material / "rounded", rtn)
    return material / "rounded"


@pytest.fixture(scope="module")
def trained(material, stage, train_stage) -> tuple[Path, dict[str, Any]]:
    return material / "trained", train_stage(material / "dense", material / "trained", "distill", stage)


def loss_of(folder: Path, data: Path) -> float:
    """The mean cross-entropy of what transformers opens."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [line.split("\t") for line in data.read_text().splitlines()[1:]]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        [text for text, _ in rows], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(**tokens).logits, torch.tensor([int(row[1]) for row in rows])))


def test_learned_steps_beat_rounding_at_equal_bits_and_bytes(material, rounded, trained):
    folder, record = trained
    assert Checkpoint.open(str(folder)).nbytes == Checkpoint.open(str(rounded)).nbytes
    before, after = (loss_of(one, material / "dev.tsv") for one in (rounded, folder))
    assert after < 0.7 * before  # measured: 0.043 and 0.101
    assert after == pytest.approx(record["curve"][-1]["eval_loss"], rel=1e-4)


def test_the_layout_is_that_of_quantization_after_training(rounded, trained):
    folder, _ = trained
    ours, theirs = (json.loads((one / "config.json").read_text())["quantization_config"] for one in (folder, rounded))
    assert ours["quant_method"] == COMPRESSED_TENSORS
    assert ours == theirs
    mine, other = Checkpoint.open(str(folder)).tensors, Checkpoint.open(str(rounded)).tensors
    assert {name: (info.dtype, info.shape) for name, info in mine.items()} == {
        name: (info.dtype, info.shape) for name, info in other.items()
    }


class Last(TrainerCallback):
    """The rounded weights of the last forward pass, and the groups of the optimizer."""

    def __init__(self) -> None:
        self.rounded: dict[str, torch.Tensor] = {}
        self.undecayed: set[int] = set()
        self.steps: set[int] = set()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.undecayed = {id(one) for group in groups if group["weight_decay"] == 0 for one in group["params"]}
        for name, module in kwargs["model"].student.named_modules():
            if hasattr(module, "rounded"):
                self.rounded[name] = module.rounded().detach().clone()
                self.steps |= {id(one) for one in (module.step, module.zero_point) if one is not None}


@pytest.mark.parametrize("grid", [{"symmetric": False, "group_size": 16, "bits": 3}, {"group_size": "tensor"}])
def test_what_is_stored_is_the_trained_forward_bit_for_bit(material, stage, train_stage, tmp_path, grid):
    last = Last()
    asked = {**stage, **grid, "max_steps": 4, "weight_decay": 0.5}
    train_stage(material / "dense", tmp_path / "out", "distill", asked, callbacks=[last])
    written = Checkpoint.open(str(tmp_path / "out"))
    assert decode_of(written) is not None
    read = decoder(written.quantization or {})
    assert len(last.rounded) == 12
    for name, weight in last.rounded.items():
        stored = [tensor for tensor in written.tensors if tensor.startswith(f"{name}.weight")]
        tensors = {tensor.removeprefix(f"{name}."): value for tensor, value in written.read(stored).items()}
        assert torch.equal(read(name, tensors).dense(torch.float32), weight)
    assert last.steps <= last.undecayed


def test_a_quantized_model_is_healed_on_the_grid_that_it_has(material, rounded, stage, train_stage, tmp_path):
    still = {**stage, "learning_rate": 1e-12, "max_steps": 1, "bits": 4, "group_size": 128}
    train_stage(rounded, tmp_path / "still", "distill", still)
    codes = [name for name in Checkpoint.open(str(rounded)).tensors if name.endswith("packed")]
    before, after = (Checkpoint.open(str(one)).read(codes) for one in (rounded, tmp_path / "still"))
    assert len(codes) == 12
    assert all(torch.equal(before[name], after[name]) for name in codes)
    train_stage(rounded, tmp_path / "healed", "distill", {**stage, "teacher": str(material / "dense"), "alpha": 0.5})
    losses = [loss_of(one, material / "dev.tsv") for one in (rounded, tmp_path / "healed")]
    assert losses[1] < 0.8 * losses[0]  # measured: 0.048 and 0.101


def test_a_pruned_model_keeps_its_zeros_and_gets_a_grid(material, stage, train_stage, tmp_path):
    pruned = {"method": "gradual-magnitude", "sparsity": 0.5, "max_steps": 2, "data": stage["data"]}
    train_stage(material / "dense", tmp_path / "pruned", "prune", pruned)
    train_stage(tmp_path / "pruned", tmp_path / "out", "distill", {**stage, "max_steps": 3, "alpha": 0.5})
    for name, module in transformers.AutoModel.from_pretrained(tmp_path / "out").named_modules():
        if hasattr(module, "weight_value"):
            first = transformers.AutoModel.from_pretrained(tmp_path / "pruned").get_submodule(name).weight_value
            assert module.weight_value.scales.bits == 2
            assert torch.equal(module.weight_value.kept, first.kept)


def test_what_is_ignored_is_neither_rounded_nor_trained(material, stage, train_stage, tmp_path):
    asked = {**stage, "ignore": ["bert.encoder.layer.0"], "max_steps": 2}
    train_stage(material / "dense", tmp_path / "out", "distill", asked)
    before, after = (Checkpoint.open(str(one)) for one in (material / "dense", tmp_path / "out"))
    names = [name for name in before.tensors if ".layer.0." in name]
    assert all(torch.equal(before.read([name])[name], after.read([name])[name]) for name in names)
    assert sum(name.endswith("packed") for name in after.tensors) == 6


def test_what_cannot_be_learned_is_told_before_anything_runs(material, rounded, stage, train_stage, tmp_path):
    def told(model: Path, **changes: Any) -> tuple[str, ...]:
        with pytest.raises(ProblemsError) as caught:
            train_stage(model, tmp_path / "out", "distill", {**stage, **changes})
        return caught.value.sentences

    assert "it can't teach itself; name a teacher, or set alpha to 0" in told(rounded, alpha=0.5)[0]
    assert "on a grid already, with bits 2" in told(rounded, bits=8)[0]
    assert "is held as integers" in told(rounded, ignore=["*.layer.0.*"])[0]
