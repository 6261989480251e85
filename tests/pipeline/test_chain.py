"""Stages of different engines in a row: each goes on with what the one before it left, whatever that is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.compressors.obs import inverse_factor
from modelzip.compressors.quantize.gptq import gptq
from modelzip.compressors.quantize.grid import fit_grid
from modelzip.pipeline.run import plan_recipe
from modelzip.weights.layouts import decoder
from modelzip.weights.low_rank import LowRank
from modelzip.weights.sparse import Sparse
from modelzip.weights.value import CompressedWeight

GPTQ = {"quantize": {"method": "gptq", "bits": 4, "group_size": 16, "clip": "none"}}


def weights_in(folder: Path) -> dict[str, CompressedWeight]:
    """Every compressed weight of a folder in modelzip's own layout."""
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.quantization is not None
    read = decoder(checkpoint.quantization)
    found = {}
    for name in checkpoint.quantization["modules"]:
        parts = [key for key in checkpoint.tensors if key.startswith(f"{name}.weight")]
        found[name] = read(name, {key.removeprefix(f"{name}."): t for key, t in checkpoint.read(parts).items()})
    return found


@torch.no_grad()
def logits_of(folder: Path, windows: Tensor, auto: str = "AutoModelForCausalLM") -> Tensor:
    logits: Tensor = getattr(transformers, auto).from_pretrained(folder).eval()(windows).logits
    return logits


@torch.no_grad()
def logits_with(folder: Path, weights: dict[str, CompressedWeight], windows: Tensor) -> Tensor:
    """Logits of the ordinary model in `folder` with these weights written into it, dense."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight.dense(torch.float32))
    logits: Tensor = model(windows).logits
    return logits


@pytest.fixture(scope="module")
def chain(speaking, compress, text_file, tmp_path_factory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """chain(family, *stages) -> the output and the report of these stages, run once for the module."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(family: str, *stages: dict[str, Any], **rest: Any) -> tuple[Path, dict[str, Any]]:
        key = json.dumps([family, stages, rest])
        if key not in done:
            folder = tmp_path_factory.mktemp("chain") / "out"
            more = {"calibration": {"source": str(text_file)}, **rest}
            done[key] = folder, compress(speaking(family), folder, *stages, **more).report
        return done[key]

    return run


WANDA = {"prune": {"method": "wanda", "sparsity": 0.5}}
PRUNINGS = [
    {"prune": {"method": "sparsegpt", "sparsity": 0.5}},
    {"prune": {"method": "sparsegpt", "sparsity": "2:4"}},
    {"prune": {"method": "wanda", "sparsity": "4:8"}},
    {"prune": {"method": "magnitude", "sparsity": 0.6}},
]


@pytest.mark.parametrize("pruning", PRUNINGS, ids=lambda stage: "-".join(map(str, stage["prune"].values())))
def test_what_was_pruned_is_quantized_with_every_zero_kept(chain, pruning):
    first, second = weights_in(chain("llama", pruning)[0]), weights_in(chain("llama", pruning, GPTQ)[0])
    assert first.keys() == second.keys()
    assert len(first) == 14
    for name, weight in second.items():
        assert isinstance(weight, Sparse)
        assert weight.scales is not None
        assert weight.pattern == first[name].pattern
        assert torch.equal(weight.kept, first[name].kept)
        assert (weight.dense(torch.float32)[~first[name].kept] == 0).all()


@pytest.mark.parametrize("pruning", PRUNINGS, ids=lambda stage: "-".join(map(str, stage["prune"].values())))
def test_the_bytes_of_both_stages_are_planned_exactly(chain, speaking, recipe_of, pruning):
    folder, report = chain("llama", pruning, GPTQ)
    plans = plan_recipe(recipe_of(speaking("llama"), pruning, GPTQ), output=Path("out"))
    assert [stage["bytes_after"] for stage in report["stages"]] == [plan.bytes_after for plan in plans]
    assert Checkpoint.open(str(folder)).nbytes == plans[1].bytes_after
    assert report["size"]["bytes_after"] == plans[1].bytes_after


@pytest.mark.parametrize(
    "stages",
    [[PRUNINGS[0], GPTQ], [{"factorize": {"method": "svd-llm", "ratio": 0.6}}, GPTQ], [PRUNINGS[1]]],
    ids=["pruned and quantized", "factorized and quantized", "pruned"],
)
def test_transformers_opens_the_result_with_the_logits_of_the_same_weights_dense(chain, speaking, windows, stages):
    folder, report = chain("llama", *stages)
    wanted = logits_with(speaking("llama"), weights_in(folder), windows)
    found = logits_of(folder, windows)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()  # measured: 5.2e-7 factorized, else 0
    assert report["verification"]["max_logit_difference"] <= 1e-4  # measured: 4e-6


def test_a_stage_of_pruning_alone_says_nothing_about_groups(chain):
    assert chain("llama", PRUNINGS[0], GPTQ)[1]["fallbacks"] == []


def test_gptq_of_a_factorized_model_takes_both_factors_for_the_inputs_that_reach_them(
    chain, speaking, windows, names, agreement
):
    factorized = weights_in(chain("llama", {"factorize": {"method": "svd-llm", "ratio": 0.6}})[0])
    found = weights_in(chain("llama", {"factorize": {"method": "svd-llm", "ratio": 0.6}}, GPTQ)[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(speaking("llama")).eval()
    for name, weight in factorized.items():
        model.get_submodule(name).weight.data.copy_(weight.dense(torch.float32))
    wanted, blind = {}, {}
    for name in names:
        weight = factorized[name]
        assert isinstance(weight, LowRank)
        x = inputs_of(model, name, windows)
        right = plain_gptq(weight.right.dense(torch.float32), x)
        inner = x @ right.dense(torch.float32).T
        left = plain_gptq(weight.left.dense(torch.float32), inner)
        wanted |= {f"{name}.left": left, f"{name}.right": right}
        blind[f"{name}.left"] = plain_gptq(weight.left.dense(torch.float32), torch.randn_like(inner))
        product = left.dense(torch.float32) @ right.dense(torch.float32)
        model.get_submodule(name).weight.data.copy_(product)
    parts = {f"{name}.{side}": getattr(weight, side) for name, weight in found.items() for side in ("left", "right")}
    assert agreement(parts, wanted) >= 0.995  # measured: 1
    lefts = {name: weight for name, weight in parts.items() if name in blind}
    assert agreement(lefts, blind) < 0.95  # measured: 0.912


def inputs_of(model: Any, name: str, windows: Tensor) -> Tensor:
    """What flows into a linear, [tokens, in]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(windows)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def plain_gptq(weight: Tensor, x: Tensor) -> Any:
    """GPTQ at the settings of the stage, in groups that fit as the plan fits them, for inputs x [tokens, in]."""
    columns = weight.shape[1]
    factor = inverse_factor(
        (x.double().T @ x.double() / len(x)).float(), damping=0.01, max_damping=1.0, order="activation"
    )
    size = 16 if columns % 16 == 0 else columns
    grid = {"bits": 4, "symmetric": True, "clip": "none", "dtype": torch.float32, "group_size": size}
    return gptq(weight, factor, fit_grid(weight, importance=factor.importance(), **grid), block_size=128)


SVD = {"factorize": {"method": "svd", "ratio": 0.6}}


def test_wanda_of_a_factorized_model_prunes_both_factors_by_the_norms_of_what_reaches_them(
    chain, speaking, windows, names
):
    factorized, found = weights_in(chain("llama", SVD)[0]), weights_in(chain("llama", SVD, WANDA)[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(speaking("llama")).eval()
    for name, weight in factorized.items():
        model.get_submodule(name).weight.data.copy_(weight.dense(torch.float32))
    same = []
    for name in names:
        x, pruned = inputs_of(model, name, windows), found[name]
        for before, after in ((factorized[name].right, pruned.right), (factorized[name].left, pruned.left)):
            dense = before.dense(torch.float32)
            scores = dense.abs() * x.norm(dim=0)
            (count,) = set(after.kept.sum(1).tolist())
            assert abs(count - dense.shape[1] / 2) < 1
            least = scores.topk(count, dim=1).values[:, -1:]
            same.append(float(((scores >= least) == after.kept).float().mean()))
            x = x @ after.dense(torch.float32).T
        model.get_submodule(name).weight.data.copy_(pruned.dense(torch.float32))
    assert min(same) >= 0.99  # measured: 1


def test_one_threshold_for_all_matrices_prunes_the_share_asked_for_of_factors_too(chain):
    stage = {"prune": {"method": "magnitude", "sparsity": 0.5, "scope": "global"}}
    found = weights_in(chain("llama", SVD, stage)[0])
    kept = [half.kept for weight in found.values() for half in (weight.left, weight.right)]
    assert sum(int(mask.sum()) for mask in kept) == pytest.approx(0.5 * sum(mask.numel() for mask in kept), rel=0.01)


NEURONS = {"prune": {"method": "neurons", "share": 0.5, "scope": "global"}}
ENERGY = {"factorize": {"method": "svd", "energy": 0.6}}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}, "group 16 doesn't divide"),
        ({"prune": {"method": "wanda", "sparsity": "2:4"}}, "left alone (2:4 takes columns by 4"),
    ],
    ids=["groups", "pattern"],
)
def test_a_stage_is_planned_again_where_widths_were_only_known_once_measured(chain, second, said):
    folder, report = chain("llama", NEURONS, second)
    assert any(said in one for one in report["fallbacks"]), report["fallbacks"]
    weights_in(folder)


def test_a_pattern_that_fits_none_of_the_ranks_that_came_out_is_refused(chain):
    with pytest.raises(ProblemsError, match=r"stages\[1\].prune: .*2:4 takes columns by 4"):
        chain("llama", ENERGY, {"prune": {"method": "magnitude", "sparsity": "2:4"}})


def test_an_encoder_without_some_heads_is_quantized_in_our_own_layout(chain):
    heads = {"prune": {"method": "heads", "share": 0.25}}
    first, _ = chain("bert-mlm", heads)
    folder, report = chain("bert-mlm", heads, GPTQ)
    assert [stage["method"] for stage in report["stages"]] == ["heads-25", "gptq-4bit"]
    assert report["size"]["bytes_after"] == report["plan"]["bytes_after"]
    dense = transformers.AutoModelForMaskedLM.from_pretrained(first).eval()
    opened = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    window = torch.arange(4, 20)[None]
    with torch.no_grad():
        for name, weight in weights_in(folder).items():
            dense.get_submodule(name).weight.copy_(weight.dense(torch.float32))
        assert torch.allclose(opened(window).logits, dense(window).logits, atol=1e-5)


def test_what_is_left_of_the_layers_is_factorized_for_the_smaller_models_inputs(chain, windows):
    layers = {"prune": {"method": "layers", "drop": [0]}}
    first, _ = chain("llama", layers)
    folder, _ = chain("llama", layers, {"factorize": {"method": "svd-llm", "ratio": 0.6}})
    name = "model.layers.0.self_attn.q_proj"
    model = transformers.AutoModelForCausalLM.from_pretrained(first).eval()
    x = inputs_of(model, name, windows)
    weight = model.get_submodule(name).weight.detach()
    found = weights_in(folder)[name]
    assert isinstance(found, LowRank)
    rank = found.left.shape[1]
    s = torch.linalg.svdvals(x @ weight.T)
    least = s[rank:].norm()  # Eckart and Young: no matrix of this rank has outputs that are closer
    assert (x @ (weight - found.dense(torch.float32)).T).norm() <= 1.001 * least  # measured: 1.00007
