"""A compressed checkpoint made dense: what plain transformers opens computes what the compressed model computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modelzip.checkpoints.errors import CheckpointError, OutputError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.exporters import folder as folders
from modelzip.exporters.formats import export
from modelzip.exporters.request import Request
from modelzip.recipes.export_formats import FORMATS
from modelzip.recipes.schema import Export
from modelzip.weights import Dense, Kronecker, LowRank, Sparse, TensorTrain
from modelzip.weights.layouts import MODELZIP, quantization_config, shared_parts

OWN, PORTABLE = {"bits": 3}, {"bits": 4}


def export_dense(
    checkpoint: Checkpoint, output: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    return export(Request(checkpoint, output, dtype=dtype, overwrite=overwrite), "dense").path


def opened(models: Any, family: str, folder: Path) -> Any:
    return getattr(transformers, models.FAMILIES[family].model_class).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classifier", "t5"])
@pytest.mark.parametrize("settings", [OWN, PORTABLE, {"bits": 4, "symmetric": False}], ids=str)
def test_the_dense_model_computes_what_the_compressed_one_does(
    name: str, settings: dict[str, Any], compressed: Callable[..., Path], models: Any, tmp_path: Path
) -> None:
    small = compressed(name, **settings)
    folder = export_dense(Checkpoint.open(str(small)), tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Small\n"
    pairs = zip(models.outputs(opened(models, name, folder)), models.outputs(opened(models, name, small)), strict=True)
    for found, wanted in pairs:
        assert (found - wanted).norm() / wanted.norm() < 5e-6  # measured: at most 6e-7


def test_the_tensors_are_those_of_the_original_by_name_shape_and_type(
    compressed: Callable[..., Path], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = export_dense(Checkpoint.open(str(compressed("gpt2", **OWN))), tmp_path / "dense")
    found, wanted = Checkpoint.open(str(folder)).tensors, Checkpoint.open(str(saved("gpt2"))).tensors
    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
        name: (one.shape, one.dtype) for name, one in wanted.items()
    }


def test_it_opens_where_modelzip_is_not_imported(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = export_dense(Checkpoint.open(str(compressed("llama", **OWN))), tmp_path / "dense")
    program = (
        "import sys; from transformers import AutoModelForCausalLM; "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}); "
        "assert not any(name.startswith('modelzip') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("number", [torch.bfloat16, torch.float16])
def test_a_type_changes_every_floating_tensor_and_the_config(
    tensors_of: Any, number: torch.dtype, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    small = Checkpoint.open(str(compressed("llama", **PORTABLE)))
    wanted = tensors_of(export_dense(small, tmp_path / "dense"))
    folder = export_dense(small, tmp_path / "cast", dtype=number)
    found = tensors_of(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].to(number)) for name in wanted)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == str(number).removeprefix("torch.")
    assert "torch_dtype" not in config


def test_a_dense_model_is_refused_unless_the_type_changes_something(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    original = Checkpoint.open(str(saved("llama")))
    with pytest.raises(CheckpointError, match="is dense already: there is nothing to do but"):
        export_dense(original, tmp_path / "dense")
    with pytest.raises(CheckpointError, match="its tensors are float32: there is nothing to do"):
        export_dense(original, tmp_path / "dense", dtype=torch.float32)
    assert not (tmp_path / "dense").exists()
    folder = export_dense(original, tmp_path / "dense", dtype=torch.bfloat16)
    assert {one.dtype for one in Checkpoint.open(str(folder)).tensors.values()} == {"BF16"}


def test_a_number_beyond_float16_is_an_error_and_not_infinity(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(saved("llama") / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    with pytest.raises(OutputError, match=r"model\.norm\.weight has numbers beyond the range of float16"):
        export_dense(Checkpoint.open(str(source)), tmp_path / "dense", dtype=torch.float16)
    assert not (tmp_path / "dense").exists()


def test_a_killed_export_goes_on_and_ends_with_the_same_bytes(
    compressed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PART_BYTES", 10_000)
    small = Checkpoint.open(str(compressed("llama", **OWN)))
    whole = export_dense(small, tmp_path / "whole")
    written: list[str] = []
    original = CheckpointWriter.write_part

    def dying(self: CheckpointWriter, part: str, *arguments: Any, **options: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part)
        original(self, part, *arguments, **options)

    monkeypatch.setattr(CheckpointWriter, "write_part", dying)
    with pytest.raises(KeyboardInterrupt):
        export_dense(small, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    again: list[str] = []
    monkeypatch.setattr(
        CheckpointWriter,
        "write_part",
        lambda self, part, *arguments, **options: (again.append(part), original(self, part, *arguments, **options)),
    )
    resumed = export_dense(small, tmp_path / "killed")
    assert len(again) > 1
    assert not set(written) & set(again)
    files = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in resumed.iterdir()) == files
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in files)


def test_a_finished_export_is_replaced_only_if_told(compressed: Callable[..., Path], tmp_path: Path) -> None:
    small = Checkpoint.open(str(compressed("llama", **OWN)))
    folder = export_dense(small, tmp_path / "dense")
    with pytest.raises(OutputError, match="--overwrite"):
        export_dense(small, folder)
    assert export_dense(small, folder, overwrite=True) == folder


def written_by_hand(
    folder: Path, original: Path, weights: dict[str, Any], shared: dict[str, str], prefix: str = ""
) -> Checkpoint:
    """A checkpoint in modelzip's own layout: these weights instead of the modules' own, `prefix` off all names."""
    whole = load_file(original / "model.safetensors")
    tensors = {name: one for name, one in whole.items() if name.removesuffix(".weight") not in weights}
    tensors |= {
        f"{module}.{suffix}": one for module, weight in weights.items() for suffix, one in weight.tensors().items()
    }
    tensors = {name.removeprefix(prefix): one.clone() for name, one in tensors.items() if name not in shared}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    metas = {name: weight.meta() for name, weight in weights.items()}
    config["quantization_config"] = quantization_config(metas, layout=MODELZIP, linears=[], shared=shared)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Checkpoint.open(str(folder))


@pytest.fixture(scope="session")
def all_kinds() -> dict[str, Any]:
    """One weight [32, 32] of each kind."""
    draw = torch.Generator().manual_seed(1)
    matrix = torch.randn(32, 32, generator=draw)
    kept = torch.rand(32, 32, generator=draw) < 0.5
    return {
        "sparse": Sparse.of_dense(matrix, kept, dtype=torch.float32),
        "low rank": LowRank(Dense(matrix[:, :5].contiguous()), Dense(matrix[:5].contiguous())),
        "kronecker": Kronecker(matrix[:16].reshape(2, 16, 16), torch.randn(2, 2, 2, generator=draw)),
        "tensor train": TensorTrain((matrix[:8].reshape(1, 8, 8, 4), matrix[:2].reshape(4, 4, 4, 1))),
    }


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_every_kind_of_weight_becomes_the_matrix_that_it_stands_for(
    tensors_of: Any, prefix: str, all_kinds: dict[str, Any], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    leaves = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    modules = [f"bert.encoder.layer.0.{leaf}" for leaf in leaves]
    weights = dict(zip(modules, all_kinds.values(), strict=True))
    small = written_by_hand(tmp_path / "small", saved("bert-classifier"), weights, {}, prefix)
    found = tensors_of(export_dense(small, tmp_path / "dense"))
    wanted = load_file(saved("bert-classifier") / "model.safetensors")
    assert found.keys() == {name.removeprefix(prefix) for name in wanted}
    for name, tensor in wanted.items():
        weight = weights.get(name.removesuffix(".weight"))
        assert torch.equal(found[name.removeprefix(prefix)], tensor if weight is None else weight.dense())


def test_what_modules_share_is_written_out_for_each(
    tensors_of: Any, all_kinds: dict[str, Any], saved: Callable[[str], Path], models: Any, tmp_path: Path
) -> None:
    first, second = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.query")
    weight = all_kinds["low rank"]
    shared = shared_parts(second, first, weight.meta())
    shared |= {f"{second}.bias": f"{first}.bias"}
    shared |= {
        f"bert.encoder.layer.1.output.dense.{leaf}": f"bert.encoder.layer.0.output.dense.{leaf}"
        for leaf in ("weight", "bias")
    }
    original = saved("bert-classifier")
    small = written_by_hand(tmp_path / "small", original, {first: weight, second: weight}, shared)
    folder = export_dense(small, tmp_path / "dense")
    found, wanted = tensors_of(folder), load_file(original / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert torch.equal(found[f"{second}.weight"], weight.dense())
    assert torch.equal(found[f"{second}.bias"], wanted[f"{first}.bias"])
    assert torch.equal(
        found["bert.encoder.layer.1.output.dense.weight"], wanted["bert.encoder.layer.0.output.dense.weight"]
    )
    pairs = zip(
        models.outputs(opened(models, "bert-classifier", folder)),
        models.outputs(opened(models, "bert-classifier", small.folder)),
        strict=True,
    )
    for one, other in pairs:
        assert (one - other).norm() / other.norm() < 5e-6  # measured: 2e-7


def test_a_factorized_embedding_becomes_a_table(tensors_of: Any, saved: Callable[[str], Path], tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    table = LowRank(Dense(torch.randn(96, 6, generator=draw)), Dense(torch.randn(6, 32, generator=draw)))
    name = "bert.embeddings.word_embeddings"
    small = written_by_hand(tmp_path / "small", saved("bert-classifier"), {name: table}, {})
    assert torch.equal(tensors_of(export_dense(small, tmp_path / "dense"))[f"{name}.weight"], table.dense())


def test_a_matrix_that_lost_rows_fits_no_plain_checkpoint(saved: Callable[[str], Path], tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.output.dense"
    small = written_by_hand(tmp_path / "small", saved("bert-classifier"), {name: Dense(torch.ones(32, 7))}, {})
    with pytest.raises(CheckpointError, match=r"output\.dense is \[32, 7\].*no plain checkpoint can hold it"):
        export_dense(small, tmp_path / "dense")


def test_the_formats_are_those_of_a_recipe_and_another_is_an_error_that_names_them(tmp_path: Path, saved: Any) -> None:
    assert set(FORMATS) == set(get_args(Export.model_fields["format"].annotation))
    with pytest.raises(RecipeError, match="no format guff: take dense"):
        export(Request(Checkpoint.open(str(saved("llama"))), tmp_path / "out"), "guff")
