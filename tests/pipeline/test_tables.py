"""Embedding tables: factorized, rounded, both; and matrices that several modules use, compressed once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.compressors.quantize.grid import fit_grid
from modelzip.compressors.quantize.rtn import rtn
from modelzip.pipeline import layerwise
from modelzip.pipeline.run import plan_recipe, run_recipe
from modelzip.recipes.load import parse_recipe
from modelzip.weights.embedding import CompressedEmbedding
from modelzip.weights.linear import CompressedLinear

spec = importlib.util.spec_from_file_location("structural_help", Path(__file__).with_name("structural.py"))
help = importlib.util.module_from_spec(spec)
spec.loader.exec_module(help)

TABLES = {  # the embedding of tokens, and the head that is tied to it
    "llama": ("model.embed_tokens", None),
    "llama-tied": ("model.embed_tokens", "lm_head"),
    "gemma": ("model.embed_tokens", "lm_head"),
    "bert-classifier": ("bert.embeddings.word_embeddings", None),
    "roberta": ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    "gpt2": ("transformer.wte", "lm_head"),
    "bart": ("model.shared", "lm_head"),
}
POSITIONS = {
    "bert-classifier": ["bert.embeddings.position_embeddings"],
    "roberta": ["roberta.embeddings.position_embeddings"],
    "gpt2": ["transformer.wpe"],
}
INNER = {"bert-classifier": ["bert.pooler.dense"], "roberta": ["lm_head.dense"]}  # square linears in front of the head
QUANTIZE = {"quantize": {"method": "rtn", "bits": 8, "group_size": 16}}


def narrowed(table: Tensor, rank: int, counts: Tensor | None) -> Tensor:
    """The best table of this rank, errors of tokens weighted by one more than they were seen: by an SVD in fp64."""
    weights = torch.ones(len(table)) if counts is None else counts + 1
    root = weights.double().sqrt()[:, None]
    left, values, right = torch.linalg.svd(root * table.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank] @ right[:rank] / root).float()


@torch.no_grad()
def replaced(folder: Path, changes: dict[str, Tensor]) -> nn.Module:
    """The dense model with other weights."""
    model = help.opened(folder)
    for name, weight in changes.items():
        model.get_submodule(name).weight.copy_(weight)
    return model


def table_of(folder: Path, kin: str) -> Tensor:
    return help.opened(folder).get_submodule(TABLES[kin][0]).weight.detach()


@pytest.mark.parametrize(("kin", "weighting"), [*((kin, "frequency") for kin in TABLES), ("llama-tied", "even")])
@torch.no_grad()
def test_a_narrow_embedding_is_the_best_of_its_rank_also_in_a_tied_head(kin, weighting, models, saved, tmp_path):
    windows = models.tokens(count=8)
    settings = {"kind": "factorize", "method": "embedding", "rank": 8, "weighting": weighting}
    _, records = help.prune(saved(kin), tmp_path / "out", windows=windows, **settings)
    counts = torch.bincount(windows.flatten(), minlength=models.VOCABULARY) if weighting == "frequency" else None
    name, head = TABLES[kin]
    truth = replaced(saved(kin), {name: narrowed(table_of(saved(kin), kin), 8, counts)})
    model = help.opened(tmp_path / "out")
    assert help.distance(list(models.outputs(model)), list(models.outputs(truth))) < 1e-5  # measured: 1e-6
    assert isinstance(model.get_submodule(name), CompressedEmbedding)
    (record,) = records.values()
    assert record["rank"] == 8
    if head is not None:
        assert isinstance(model.get_submodule(head), CompressedLinear)
        assert head in record["shared_with"]
    elif kin == "llama":
        assert isinstance(model.lm_head, nn.Linear)


def test_frequent_tokens_lose_less_than_with_even_weights(models, saved, tmp_path):
    windows = torch.randint(4, 12, (8, 12), generator=torch.Generator().manual_seed(0))
    errors = {}
    table = table_of(saved("llama"), "llama")
    for weighting in ("frequency", "even"):
        settings = {"kind": "factorize", "method": "embedding", "rank": 8, "weighting": weighting}
        help.prune(saved("llama"), tmp_path / weighting, windows=windows, **settings)
        found = help.opened(tmp_path / weighting).model.embed_tokens(torch.arange(4, 12))
        errors[weighting] = float((found - table[4:12]).norm() / table[4:12].norm())
    assert errors["frequency"] < 0.7 * errors["even"]


def test_a_rank_is_found_for_energy_ratio_and_target_size(models, saved, tmp_path):
    folder = saved("llama")
    dense = Checkpoint.open(str(folder))
    for number, size in enumerate([{"ratio": 0.5}, {"target_size": "80KB"}]):
        plan, (record) = help.prune(
            folder, tmp_path / str(number), kind="factorize", method="embedding", weighting="even", **size
        )
        (one,) = record.values()
        assert plan.bytes_after == dense.nbytes - 4 * 96 * 32 + 4 * one["rank"] * (96 + 32)
        assert plan.bytes_after <= 80_000 or "ratio" in size
    table = table_of(folder, "llama")
    squares = torch.linalg.svdvals(table.double()) ** 2
    settings = {"method": "embedding", "weighting": "even", "energy": 0.6}
    plan = help.plan_of(dense, tmp_path / "energy", kind="factorize", **settings)
    rank = int((squares.cumsum(0) < 0.6 * squares.sum()).sum()) + 1
    records = help.run(plan, dense, tmp_path / "energy", kind="factorize", **settings)
    assert records["model.embed_tokens"]["rank"] == rank
    made = Checkpoint.open(str(tmp_path / "energy"))
    assert made.nbytes == dense.nbytes - 4 * 96 * 32 + 4 * rank * (96 + 32) < plan.bytes_after < dense.nbytes


def test_factors_that_cost_more_and_tables_that_are_factors_are_refused(saved, tmp_path):
    def problem(folder: Path, **settings: Any) -> str:
        with pytest.raises(ProblemsError) as caught:
            help.plan_of(Checkpoint.open(str(folder)), tmp_path, kind="factorize", method="embedding", **settings)
        return str(caught.value)

    assert "rank 24 would take 12,288 bytes, and it takes 12,288 dense" in problem(saved("llama"), rank=24)
    assert "can't be reached" in problem(saved("llama"), target_size="10KB")
    assert "MB already, and target_size is 100,000.00 MB: ask for less" in problem(saved("llama"), target_size="100GB")
    help.prune(saved("llama"), tmp_path / "once", kind="factorize", method="embedding", rank=4, weighting="even")
    assert "compressed already" in problem(tmp_path / "once", rank=2)


class Progress:
    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total

    def say(self, line: str) -> None:
        pass


@pytest.fixture
def compressed(here, tmp_path):
    """compressed(folder, *stages) -> the folder that was written and the report; all must be as planned."""

    def call(folder: Path, *stages: dict[str, Any], name: str = "out") -> tuple[Path, dict[str, Any]]:
        calibration = {"source": "self", "samples": 4, "seq_len": 12}
        data = {"model": str(folder), "calibration": calibration, "evaluate": {"enabled": False}}
        recipe = parse_recipe({**data, "stages": list(stages)}, "test")
        *_, plan = plan_recipe(recipe, output=tmp_path / name)
        result = here(lambda: run_recipe(recipe, output=tmp_path / name, progress=Progress()))
        made = Checkpoint.open(str(tmp_path / name))
        assert made.nbytes == plan.bytes_after
        assert made.tensors.keys() == plan.result.tensors.keys()
        assert made.config["quantization_config"] == json.loads(json.dumps(plan.result.config["quantization_config"]))
        return tmp_path / name, result.report

    return call


def rounded(weight: Tensor, *, symmetric: bool = True) -> Tensor:
    grid = fit_grid(weight, bits=8, group_size=16, symmetric=symmetric, clip="mse", dtype=torch.float32)
    return rtn(weight, grid).dense()


def linears_of(folder: Path, names: list[str]) -> dict[str, Tensor]:
    model = help.opened(folder)
    found = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        is_turned = type(model.get_submodule(name)).__name__ == "Conv1D"
        found[name] = rounded(weight.T.contiguous()).T if is_turned else rounded(weight)
    return found


@pytest.mark.parametrize(("kin", "symmetric"), [*((kin, True) for kin in TABLES), ("llama-tied", False)])
@torch.no_grad()
def test_tables_and_poolers_become_the_nearest_points_of_their_groups_grids(
    kin, symmetric, models, saved, compressed, tmp_path
):
    stage = {"method": "rtn", "bits": 8, "group_size": 16, "embeddings": True, "symmetric": symmetric}
    out, report = compressed(saved(kin), {"quantize": {**stage, "ignore": ["re:.*(layers|layer|h)\\..*"]}})
    tables = [TABLES[kin][0], *POSITIONS.get(kin, [])]
    outside = [*tables, *INNER.get(kin, [])]
    truth = help.opened(saved(kin))
    dense = {name: rounded(truth.get_submodule(name).weight.detach(), symmetric=symmetric) for name in outside}
    model = help.opened(out)
    for name in outside:
        assert isinstance(model.get_submodule(name), CompressedEmbedding if name in tables else CompressedLinear)
    found = list(models.outputs(model))
    assert help.distance(found, list(models.outputs(replaced(saved(kin), dense)))) < 1e-6  # measured: 2e-7
    rows = {row["name"]: row for row in report["modules"]}
    stored = Checkpoint.open(str(out)).config["quantization_config"]["modules"].keys()
    assert len(rows) == len(outside)
    for row in rows.values():
        assert row["name"] in stored
        assert row["method"] == "rtn"
        assert 0 < row["weight_error"] < 0.02  # measured: 0.003 to 0.006


@torch.no_grad()
def test_the_blocks_are_compressed_for_what_the_rounded_table_gives_them(models, saved, compressed, monkeypatch):
    """The second moment of what the first linear is fed, taken from the dense model with the rounded table."""
    stage = {"method": "gptq", "bits": 2, "group_size": 16, "embeddings": True}
    seen: dict[str, Tensor] = {}
    windows: list[Tensor] = []
    solve = layerwise.solve.solve

    def spied(name, weight, now, *, settings, statistic, job):
        if statistic is not None:
            seen.setdefault(name, statistic.value.clone())
        return solve(name, weight, now, settings=settings, statistic=statistic, job=job)

    kept = layerwise.compress_blocks

    def spied_on(job, streamed, batches, **rest):
        windows.extend(batch["input_ids"] for batch in batches)
        return kept(job, streamed, batches, **rest)

    monkeypatch.setattr(layerwise.solve, "solve", spied)
    monkeypatch.setattr("modelzip.pipeline.layer_stage.compress_blocks", spied_on)
    compressed(saved("gemma"), {"quantize": stage})
    table = help.opened(saved("gemma")).model.embed_tokens.weight.detach()
    grid = fit_grid(table, bits=2, group_size=16, symmetric=True, clip="mse", dtype=torch.float32)
    model = replaced(saved("gemma"), {"model.embed_tokens": rtn(table, grid).dense()})
    inputs: list[Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(torch.cat(windows))
    x = inputs[0].reshape(-1, 32).double()
    truth = (x.T @ x / len(x)).float()
    found = seen["model.layers.0.self_attn.q_proj"]
    assert float((found - truth).norm() / truth.norm()) < 1e-5


def test_a_narrow_table_is_rounded_factor_by_factor(models, saved, compressed):
    narrow = {"factorize": {"method": "embedding", "rank": 8}}
    out, _ = compressed(saved("llama-tied"), narrow, {"quantize": {**QUANTIZE["quantize"], "embeddings": True}})
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    meta = config["modules"]["model.embed_tokens"]
    assert (meta["left"]["kind"], meta["right"]["kind"], meta["left"]["bits"]) == ("affine", "affine", 8)
    assert config["modules"]["lm_head"] == meta
    assert {name for name in config["shared"] if not name.startswith("lm_head.weight_")} == set()


def test_without_being_asked_for_tables_stay_dense(saved, compressed):
    out, report = compressed(saved("llama-tied"), {"quantize": {**QUANTIZE["quantize"], "layout": "modelzip"}})
    assert "model.embed_tokens.weight" in Checkpoint.open(str(out)).tensors
    assert not any("embed" in row["name"] for row in report["modules"])


def test_tables_in_the_other_layout_are_refused(saved, tmp_path):
    stage = {"quantize": {**QUANTIZE["quantize"], "embeddings": True, "layout": "compressed-tensors"}}
    recipe = parse_recipe({"model": str(saved("llama")), "stages": [stage], "evaluate": {"enabled": False}}, "test")
    with pytest.raises(ProblemsError, match="compressed-tensors holds no embeddings; leave out --layout"):
        plan_recipe(recipe, output=tmp_path / "out")


SHARE = {"factorize": {"method": "share"}}
CHAINS = {
    "quantize": [SHARE, QUANTIZE],
    "prune": [SHARE, {"prune": {"method": "magnitude", "sparsity": 0.5}}],
    "factorize": [SHARE, {"factorize": {"method": "svd", "ratio": 0.5}}],
    "three": [SHARE, {"prune": {"method": "magnitude", "sparsity": 0.5}}, QUANTIZE],
}


@pytest.mark.parametrize(
    ("kin", "chain"),
    [*(("llama-tied", chain) for chain in CHAINS), ("bert-classifier", "quantize"), ("gpt2", "quantize")],
)
@torch.no_grad()
def test_what_layers_share_is_compressed_once_for_all_of_them(kin, chain, models, saved, compressed):
    out, report = compressed(saved(kin), *CHAINS[chain])
    model = help.opened(out)
    linears = models.FAMILIES[kin].expected_linears()
    stored = Checkpoint.open(str(out)).tensors
    for first, second in zip(linears[: len(linears) // 2], linears[len(linears) // 2 :], strict=True):
        one, other = model.get_submodule(first), model.get_submodule(second)
        assert isinstance(one, CompressedLinear)
        assert all(getattr(one, suffix) is getattr(other, suffix) for suffix in one.weight_value.tensors())
        assert not any(name.startswith(f"{second}.weight") for name in stored)
    assert {row["name"] for row in report["modules"]} == set(linears[: len(linears) // 2])


@torch.no_grad()
def test_a_shared_matrix_is_compressed_for_the_inputs_of_all_its_layers(models, saved, compressed, monkeypatch):
    seen: dict[str, Tensor] = {}
    windows: list[Tensor] = []
    solve, kept = layerwise.solve.solve, layerwise.compress_blocks

    def spied(name, weight, now, *, settings, statistic, job):
        seen[name] = statistic.value.clone()
        return solve(name, weight, now, settings=settings, statistic=statistic, job=job)

    def spied_on(job, streamed, batches, **rest):
        windows.extend(batch["input_ids"] for batch in batches)
        return kept(job, streamed, batches, **rest)

    monkeypatch.setattr(layerwise.solve, "solve", spied)
    monkeypatch.setattr("modelzip.pipeline.layer_stage.compress_blocks", spied_on)
    shared, _ = compressed(saved("llama"), SHARE, name="shared")
    compressed(shared, {"quantize": {"method": "gptq", "group_size": 16}})
    model = help.opened(shared)
    assert seen.keys() == set(models.FAMILIES["llama"].expected_linears(layers=1))
    for name, found in seen.items():
        inputs: list[Tensor] = []
        for layer in ("0", "1"):
            module = model.get_submodule(name.replace("layers.0", f"layers.{layer}"))
            module.register_forward_pre_hook(lambda module, args, into=inputs: into.append(args[0]))
        model(torch.cat(windows))
        x = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs]).double()
        truth = (x.T @ x / len(x)).float()
        assert float((found - truth).norm() / truth.norm()) < 1e-5, name


@torch.no_grad()
def test_a_killed_run_over_shared_layers_ends_in_the_same_bytes(models, here, tmp_path, monkeypatch):
    models.FAMILIES["llama-tied"].build(num_hidden_layers=3).save_pretrained(tmp_path / "in")
    share = {"factorize": {"method": "share", "scope": "feed-forward"}}
    quantize = {"quantize": {"method": "gptq", "group_size": 16, "embeddings": True}}
    calibration = {"source": "self", "samples": 4, "seq_len": 12}
    data = {"model": str(tmp_path / "in"), "calibration": calibration, "evaluate": {"enabled": False}}
    recipe = parse_recipe({**data, "stages": [share, quantize]}, "test")

    def run(name: str, **options: bool) -> None:
        here(lambda: run_recipe(recipe, output=tmp_path / name, progress=Progress(), **options))

    run("whole")
    solve = layerwise.solve.solve

    def killed(name, *args, **options):
        if "layers.2" in name:
            raise KeyboardInterrupt
        return solve(name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(layerwise.solve, "solve", killed)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    run("out", resume=True)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)
