"""Training what prune and factorize left: zeros stay zero, factors are trained, and the layout is the one that came."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import modelzip.weights
from modelzip.weights.dense import Dense
from modelzip.weights.layouts import MODELZIP, quantization_config
from modelzip.weights.low_rank import LowRank
from modelzip.weights.sparse import Sparse

assert modelzip.weights  # teaches transformers the layout
LAYER = "encoder.layer.{}.{}.dense"


TABLE = "embeddings.word_embeddings"


def narrow(weight: torch.Tensor) -> LowRank:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return LowRank(Dense((u[:, :4] * s[:4]).contiguous()), Dense(v[:4].contiguous()))


@pytest.fixture
def compressed(speaking, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A pico encoder with a sparse and a low-rank linear and table, and which entries of the sparse one were kept."""
    folder = tmp_path / "compressed"
    model = transformers.BertModel.from_pretrained(speaking("bert"))
    transformers.AutoTokenizer.from_pretrained(speaking("bert")).save_pretrained(folder)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    sparse, low = LAYER.format(0, "intermediate"), LAYER.format(1, "output")
    kept = tensors[f"{sparse}.weight"].abs() > 0.15
    values = {
        sparse: Sparse.of_dense(tensors[f"{sparse}.weight"], kept, dtype=torch.bfloat16),
        low: narrow(tensors[f"{low}.weight"]),
        TABLE: narrow(tensors[f"{TABLE}.weight"]),
    }
    for name, value in values.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in value.tensors().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    metas = {name: value.meta() for name, value in values.items()}
    config["quantization_config"] = quantization_config(metas, layout=MODELZIP, linears=[])
    (folder / "config.json").write_text(json.dumps(config))
    return folder, {sparse: kept}


def test_zeros_stay_zero_factors_are_trained_and_the_layout_is_kept(compressed, train_stage, tmp_path):
    folder, kept = compressed
    rows = "\n".join(f"{'ab'[place % 2] * 4}\t{place % 2}" for place in range(32))
    (tmp_path / "data.tsv").write_text(f"text\tlabel\n{rows}\n")
    stage = {"method": "labels", "data": str(tmp_path / "data.tsv"), "max_steps": 8, "learning_rate": 0.01}
    stage |= {"log_every": 1}
    output = tmp_path / "out"
    record = train_stage(folder, output, "distill", stage)
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    assert after.keys() == {f"bert.{name}" for name in before} | {"classifier.weight", "classifier.bias"}
    for name, tensor in before.items():
        assert after[f"bert.{name}"].dtype == tensor.dtype
        is_changed = tensor.is_floating_point() and not torch.equal(after[f"bert.{name}"], tensor)
        is_still = "embeddings" in name and not name.startswith(TABLE)
        assert is_changed or "positions" in name or "bias" in name or is_still, name
    opened = transformers.BertForSequenceClassification.from_pretrained(output)
    ((name, places),) = kept.items()
    weight = opened.bert.get_submodule(name).weight_value.dense(torch.float32)
    assert torch.equal(weight != 0, places)
