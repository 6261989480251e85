"""Layers that share one set of weights, against the dense model with the shared weights put in by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.exporters.formats import export
from modelzip.exporters.request import Request
from modelzip.pipeline.headers import info_of
from modelzip.pipeline.measure import streamed_model
from modelzip.pipeline.plans import make_plans
from modelzip.pipeline.sharing import _write_fit
from modelzip.recipes.files import library, read_yaml
from modelzip.recipes.load import parse_recipe

spec = importlib.util.spec_from_file_location("structural_help", Path(__file__).with_name("structural.py"))
help = importlib.util.module_from_spec(spec)
spec.loader.exec_module(help)

FEED_FORWARD = {
    "llama-tied": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "t5": ("DenseReluDense.wi", "DenseReluDense.wo"),
    **dict.fromkeys(("bert-classifier", "roberta"), ("intermediate.dense", "output.dense")),
}
STACKS = {
    "llama-tied": ["model.layers"],
    "gpt2": ["transformer.h"],
    "bert-classifier": ["bert.encoder.layer"],
    "roberta": ["roberta.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
}
FAMILIES = list(STACKS)


def is_shared(family: str, leaf: str, scope: str) -> bool:
    """Whether a parameter (named from its layer on) is to be shared: stated here by its name alone."""
    if scope == "all":
        return True
    module = leaf.rpartition(".")[0]
    inside = module.endswith(FEED_FORWARD[family]) and not module.endswith("attention.output.dense")
    is_norm = "norm" in leaf.lower() or "ln_" in leaf
    is_table = "relative_attention_bias" in leaf
    return not is_norm and not is_table and inside == (scope == "feed-forward")


@torch.no_grad()
def averaged(family: str, folder: Path, scope: str) -> nn.Module:
    """The dense model, each parameter that is to be shared the mean of all layers'."""
    model = help.opened(folder)
    for stack in STACKS[family]:
        layers = [dict(layer.named_parameters()) for layer in model.get_submodule(stack)]
        for leaf in layers[0]:
            if is_shared(family, leaf, scope):
                mean = torch.stack([layer[leaf].double() for layer in layers]).mean(0)
                for layer in layers:
                    layer[leaf].copy_(mean)
    return model


@pytest.mark.parametrize("scope", ["all", "attention", "feed-forward"])
@pytest.mark.parametrize("kin", FAMILIES)
def test_shared_layers_are_the_dense_model_with_the_mean_in_all_of_them(kin, scope, models, saved, tmp_path):
    if (kin, scope) == ("t5", "all"):
        with pytest.raises(ProblemsError, match=r"aren't alike.*relative_attention_bias"):
            help.plan_of(Checkpoint.open(str(saved(kin))), tmp_path, kind="factorize", method="share")
        return
    plan, records = help.prune(saved(kin), tmp_path / "out", kind="factorize", method="share", scope=scope)
    assert records.keys() == set(STACKS[kin])
    truth = list(models.outputs(averaged(kin, saved(kin), scope)))
    model = help.opened(tmp_path / "out")
    assert help.distance(list(models.outputs(model)), truth) < 1e-6  # measured: 6e-8
    export(Request(Checkpoint.open(str(tmp_path / "out")), tmp_path / "dense"), "dense")
    assert help.is_plain(tmp_path / "dense")
    assert help.distance(list(models.outputs(help.opened(tmp_path / "dense"))), truth) < 1e-6  # measured: 6e-8
    assert any("feed-forwards" in note or "layers" in note or "attentions" in note for note in plan.notes)


def test_reopened_layers_hold_the_same_tensors(models, saved, tmp_path):
    help.prune(saved("bert-classifier"), tmp_path / "out", kind="factorize", method="share")
    model = help.opened(tmp_path / "out")
    first, second = (dict(layer.named_parameters()) for layer in model.bert.encoder.layer)
    assert first.keys() == second.keys()
    assert all(first[name] is second[name] for name in first)
    model.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(str(tmp_path / "again")).nbytes == Checkpoint.open(str(tmp_path / "out")).nbytes


@torch.no_grad()
def test_the_streamed_model_is_the_reopened_one(models, saved, tmp_path):
    for family in FAMILIES[:4]:
        help.prune(saved(family), tmp_path / family, kind="factorize", method="share", scope="feed-forward")
        streamed = streamed_model(Checkpoint.open(str(tmp_path / family)), torch.float32, torch.device("cpu"))
        found = next(streamed.outputs([{"input_ids": models.tokens()}])).logits
        truth = help.opened(tmp_path / family)(models.tokens()).logits
        assert float((found - truth).norm() / truth.norm()) < 1e-6, family  # measured: 0


def inputs_of(model: nn.Module, name: str, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@torch.no_grad()
def test_the_fit_solves_the_least_squares_problem_of_all_layers_inputs(models, saved, tmp_path):
    """Stacked as one regression: rows of √(1/n) X_l against X_l W_lᵀ, and √λ I against the mean's."""
    windows = models.tokens(count=8)
    settings = {"method": "share", "scope": "attention", "start": "least-squares", "damping": 0.05}
    _, records = help.prune(saved("llama"), tmp_path / "out", windows=windows, kind="factorize", **settings)
    model, made = help.opened(saved("llama")), help.opened(tmp_path / "out")
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
        names = [f"model.layers.{layer}.{leaf}" for layer in (0, 1)]
        xs = [inputs_of(model, name, windows) for name in names]
        weights = [model.get_submodule(name).weight.double() for name in names]
        level = 0.05 * float(sum((x.T @ x / len(x)).diagonal().mean() for x in xs))
        mean = (weights[0] + weights[1]) / 2
        rows = [x / len(x) ** 0.5 for x in xs] + [level**0.5 * torch.eye(xs[0].shape[1], dtype=torch.float64)]
        aims = [row @ weight.T for row, weight in zip(rows, [*weights, mean], strict=True)]
        truth = torch.linalg.lstsq(torch.cat(rows), torch.cat(aims)).solution.T
        found = made.get_submodule(names[1]).weight.double()
        assert float((found - truth).norm() / truth.norm()) < 3e-6, leaf  # measured: 5.8e-7
        record = records[names[0]]
        lost = sum(float((x @ (found - w).T).norm() ** 2) for x, w in zip(xs, weights, strict=True))
        kept = sum(float((x @ w.T).norm() ** 2) for x, w in zip(xs, weights, strict=True))
        assert record["error"] == pytest.approx((lost / kept) ** 0.5, rel=1e-4)
        assert record["error"] < 0.99 * record["error_of_average"]


def test_neighbours_make_groups(models, tmp_path):
    models.FAMILIES["bert"].build(num_hidden_layers=5).save_pretrained(tmp_path / "in")
    plan, records = help.prune(tmp_path / "in", tmp_path / "out", kind="factorize", method="share", groups=2)
    (record,) = records.values()
    assert record["groups"] == [[f"encoder.layer.{layer}" for layer in group] for group in ((0, 1, 2), (3, 4))]
    assert plan.notes[0].startswith("5 layers become 2")


def test_layers_that_arent_alike_are_refused(models, saved, tmp_path):
    def problem(folder: Path, **settings: object) -> str:
        with pytest.raises(ProblemsError) as caught:
            help.plan_of(Checkpoint.open(str(folder)), tmp_path, kind="factorize", method="share", **settings)
        return str(caught.value)

    assert "groups 2 shares nothing among the 2 layers" in problem(saved("llama"), groups=2)
    assert "mixture of experts" in problem(saved("mixtral"), scope="feed-forward")
    pruned = tmp_path / "pruned"
    help.prune(saved("bert"), pruned, method="neurons", share=0.25, scope="global", criterion="magnitude")
    assert "aren't alike: intermediate.dense.weight is" in problem(pruned)
    help.prune(saved("bert"), tmp_path / "shared", kind="factorize", method="share", scope="attention")
    assert "tied to another weight already" in problem(tmp_path / "shared")


@torch.no_grad()
def test_a_killed_fit_goes_on_after_the_last_group(models, tmp_path, monkeypatch):
    models.FAMILIES["llama"].build(num_hidden_layers=4).save_pretrained(tmp_path / "in")
    settings = {"kind": "factorize", "method": "share", "groups": 2, "start": "least-squares"}
    windows = models.tokens(count=4)
    help.prune(tmp_path / "in", tmp_path / "whole", windows=windows, **settings)
    written = []

    def killed(settings, group, fits, **rest):
        if written:
            raise KeyboardInterrupt
        written.append(group)
        _write_fit(settings, group, fits, **rest)

    with monkeypatch.context() as patch:
        patch.setattr("modelzip.pipeline.sharing._write_fit", killed)
        with pytest.raises(KeyboardInterrupt):
            help.prune(tmp_path / "in", tmp_path / "out", windows=windows, **settings)
    _, records = help.prune(tmp_path / "in", tmp_path / "out", windows=windows, resume=True, **settings)
    for name in ("model.safetensors", "config.json"):
        one, other = tmp_path / "out" / name, tmp_path / "whole" / name
        assert not one.exists() or one.read_bytes() == other.read_bytes()
    shards = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert shards == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in shards)
    assert "model.layers.0.mlp.up_proj" in records
    assert json.loads((tmp_path / "out" / "modelzip.json").read_text()) == records


def test_it_opens_in_a_class_without_the_head(saved, tmp_path):
    help.prune(saved("bert-classifier"), tmp_path / "out", kind="factorize", method="share")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert encoder.encoder.layer[0].output.dense.weight is encoder.encoder.layer[1].output.dense.weight


def test_the_shipped_recipes_plan_on_bert_base(tmp_path):
    """From headers alone: 110 million parameters are never in memory."""
    config = transformers.BertConfig(architectures=["BertModel"])
    with torch.device("meta"):
        state = transformers.BertModel(config).state_dict()
    tensors = {name: info_of(name, tensor) for name, tensor in state.items()}
    source = Checkpoint(tmp_path, config.to_dict(), tensors, "bert")
    whole, inner, outer = source.nbytes, 768 * 3072, 768 + 3072
    after = {
        "share-feed-forward": whole - 4 * 6 * (2 * inner + outer),
        "embedding-128": whole - 4 * (30522 * 768 - 128 * (30522 + 768)),
    }
    for name, expected in after.items():
        recipe = parse_recipe({**read_yaml(library()[name], name), "model": "bert"}, name)
        (plan,) = make_plans(recipe, source, output=tmp_path / "out")
        assert plan.bytes_after == expected
