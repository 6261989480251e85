"""Training what serves several modules: it is learned once, for all of them, and stored once again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint

TRAINED = {"max_steps": 80, "learning_rate": 3e-3, "log_every": 4, "train_batch_size": 16}
SVD = {"factorize": {"method": "svd", "ratio": 0.6}}


def shared(**more: Any) -> dict[str, Any]:
    return {"factorize": {"method": "share", **more}}


def headers(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in Checkpoint.open(str(folder)).tensors.items()}


@pytest.fixture(scope="module")
def place(save_classifier, write_labelled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_classifier(folder / "model", layers=3)
    write_labelled(folder / "train.tsv", 128)
    return folder


@pytest.mark.parametrize("before", [(shared(),), (shared(scope="feed-forward"), SVD)], ids=["whole", "factors"])
def test_shared_layers_are_healed_and_stay_one(before, place, compress, tmp_path):
    heal = {"distill": {"method": "labels", "data": str(place / "train.tsv"), **TRAINED}}
    compress(place / "model", tmp_path / "before", *before)
    report = compress(place / "model", tmp_path / "healed", *before, heal).report
    curve = report["stages"][-1]["details"]["curve"]
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert headers(tmp_path / "healed") == headers(tmp_path / "before")
    old, new = (
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        for name in ("before", "healed")
    )
    path = "intermediate.dense"
    first, *others = (layer.get_submodule(path) for layer in new.bert.encoder.layer)
    values = torch.randn(2, first.in_features)
    assert all(torch.equal(first(values), other(values)) for other in others)
    was = old.bert.encoder.layer[0].get_submodule(path)
    assert not torch.allclose(was(values), first(values), atol=1e-3)


def test_factors_of_a_tied_table_are_trained_for_both_of_its_uses(speaking, compress, text_file, tmp_path):
    narrow = {"factorize": {"method": "embedding", "rank": 8}}
    heal = {"distill": {"method": "logits", "task": "language-modelling", "data": str(text_file), **TRAINED}}
    compress(speaking("llama-tied"), tmp_path / "before", narrow)
    report = compress(speaking("llama-tied"), tmp_path / "healed", narrow, heal).report
    curve = report["stages"][-1]["details"]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert headers(tmp_path / "healed") == headers(tmp_path / "before")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    table, head = model.model.embed_tokens.weight_value, model.lm_head.weight_value
    assert torch.equal(table.dense(torch.float32), head.dense(torch.float32))


def test_a_killed_training_of_shared_layers_ends_in_the_same_bytes(place, train_stage, compress, killed_at, tmp_path):
    compress(place / "model", tmp_path / "before", shared())
    stage = {"method": "labels", "data": str(place / "train.tsv"), **TRAINED, "max_steps": 12, "save_every": 4}
    train_stage(tmp_path / "before", tmp_path / "whole", "distill", stage)
    with killed_at("train", 6) as progress:
        train_stage(tmp_path / "before", tmp_path / "killed", "distill", stage, progress=progress)
    train_stage(tmp_path / "before", tmp_path / "killed", "distill", stage, resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_a_method_that_would_take_them_apart_is_refused(place, compress, tmp_path):
    sparse = {"prune": {"method": "movement", "sparsity": 0.5, "data": str(place / "train.tsv"), **TRAINED}}
    with pytest.raises(ProblemsError, match=r"layer\.0.*serves .*layer\.2.* too.*share the layers then"):
        compress(place / "model", tmp_path / "out", shared(), sparse)
