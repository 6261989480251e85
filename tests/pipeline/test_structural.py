"""The smaller model against the dense one with the same parts masked, in every family."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint

spec = importlib.util.spec_from_file_location("structural_help", Path(__file__).with_name("structural.py"))
help = importlib.util.module_from_spec(spec)
spec.loader.exec_module(help)

OUTPUT = {  # what each family's heads and neurons are put together by, and the size of a head
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt-neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "bart": ("attn.out_proj", "fc2"),
    **dict.fromkeys(
        ("bert", "bert-classifier", "bert-mlm", "minilm", "roberta"), ("attention.output.dense", "output.dense")
    ),
}
LLAMA = ("self_attn.o_proj", "mlp.down_proj")
PLAIN_HEADS = {"llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3"}
NO_HEADS = {"t5": "no query, key, value and output", "switch": "no query, key, value and output"}
EXPERTS = {"mixtral", "qwen2-moe", "qwen3-moe", "switch"}
TOLERANCE = 2e-6


def outputs_of(family: str, place: int) -> str:
    return OUTPUT.get(family, LLAMA)[place]


def mask(model: nn.Module, name: str, gone: list[int], width: int) -> None:
    """Zero what the linear is fed of these units."""
    columns = torch.tensor([unit * width + i for unit in gone for i in range(width)], dtype=torch.int64)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].index_fill(-1, columns, 0.0),)

    model.get_submodule(name).register_forward_pre_hook(hook)


def linears_of(model: nn.Module, ending: str) -> list[str]:
    """The blocks' linears of this ending; of BERT's two `output.dense`, only the one that is asked for."""
    found = [
        name
        for name, _ in model.named_modules()
        if name.endswith(f"{ending}") and ".0." in f"{name}." or name.endswith(ending)
    ]
    return [name for name in found if ending != "output.dense" or not name.endswith("attention.output.dense")]


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_heads_taken_out_are_heads_masked(family, scope, models, saved, tmp_path):
    settings = {"method": "heads", "share": 0.5, "scope": scope}
    folder = saved(family)
    if family in NO_HEADS or (family == "phi3" and scope == "global"):
        with pytest.raises(ProblemsError, match=NO_HEADS.get(family, "can't say what is left")):
            help.plan_of(Checkpoint.open(str(folder)), tmp_path, **settings)
        return
    _, records = help.prune(folder, tmp_path / "out", windows=models.tokens(count=4), **settings)
    model = help.opened(folder)
    for name in linears_of(model, outputs_of(family, 0)):
        (record,) = [one for path, one in records.items() if name.startswith(path)]
        assert record["of"] == 4
        width = model.get_submodule(name).weight.shape[0 if family == "gpt2" else 1] // 4
        mask(model, name, sorted({0, 1, 2, 3} - set(record["kept"])), width)
    assert help.distance(list(models.outputs(help.opened(tmp_path / "out"))), list(models.outputs(model))) < TOLERANCE
    assert help.is_plain(tmp_path / "out") == (scope == "uniform" and family in PLAIN_HEADS | EXPERTS)


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_neurons_taken_out_are_neurons_masked(family, scope, models, saved, tmp_path, kept_neurons):
    settings = {"method": "neurons", "share": 0.25, "scope": scope, "criterion": "magnitude"}
    folder = saved(family)
    if family in EXPERTS:
        with pytest.raises(ProblemsError, match="mixture of experts"):
            help.plan_of(Checkpoint.open(str(folder)), tmp_path, **settings)
        return
    _, records = help.prune(folder, tmp_path / "out", **settings)
    model = help.opened(folder)
    assert sum(one["kept"] for one in records.values()) == sum(one["of"] for one in records.values()) * 0.75
    for name, kept in zip(linears_of(model, outputs_of(family, 1)), kept_neurons, strict=True):
        count = model.get_submodule(name).weight.shape[0 if family == "gpt2" else 1]
        mask(model, name, sorted(set(range(count)) - set(kept)), 1)
    assert help.distance(list(models.outputs(help.opened(tmp_path / "out"))), list(models.outputs(model))) < TOLERANCE
    assert help.is_plain(tmp_path / "out") == (scope == "uniform")


@pytest.fixture
def kept_neurons(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The neurons that the engine keeps, filled as it runs: the report has only their number."""
    from modelzip.pipeline import unit_pruning

    found: list[list[int]] = []
    build = unit_pruning.choose

    def choose(*args: Any, **options: Any) -> Any:
        chosen = build(*args, **options)
        found[:] = [one.units.tolist() for one in chosen]
        return chosen

    monkeypatch.setattr(unit_pruning, "choose", choose)
    return found
