"""The layer-wise engine: right for every family, and equal to a naive one that exchanges linear by linear."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.blocks import Linear
from modelzip.checkpoints.errors import CheckpointError, ModelzipError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.methods import METHODS as METHOD_OF
from modelzip.compressors.quantize.settings import Gptq, QuantizeSettings, Rtn
from modelzip.pipeline.calibrate import batches, forward_inputs
from modelzip.pipeline.clock import Clock
from modelzip.pipeline.forms import expected
from modelzip.pipeline.layer_plan import ModulePlan
from modelzip.pipeline.layerwise import Job, compress_blocks
from modelzip.weights.affine import Affine
from modelzip.weights.dense import Dense
from modelzip.weights.kinds import from_tensors

METHODS = ("rtn", "gptq")
MOE = ("mixtral", "qwen2-moe", "qwen3-moe", "switch")
LONGEST = {"roberta": 63}
"""Tokens that a model takes, where that isn't its number of positions."""
SAME = 0.999
"""Share of codes that must agree where only the order of sums differs."""


@dataclass(frozen=True)
class Outcome:
    """A pico model before and after."""

    source: Path
    folder: Path
    report: dict[str, Any]
    records: dict[str, Any]


@pytest.fixture(scope="session")
def outcome(saved, compress, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Outcome]:
    """outcome("llama", "gptq") -> the pico Llama compressed by GPTQ at 4 bits, made once a session."""
    made: dict[tuple[str, str], Outcome] = {}

    def of(family: str, method: str) -> Outcome:
        if (family, method) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{method}") / "out"
            result = compress(saved(family), folder, {"method": method, "bits": 4})
            records = json.loads((folder / "modelzip.json").read_text())["stages"][0]["records"]
            made[family, method] = Outcome(saved(family), folder, result.report, records)
        return made[family, method]

    return of


@pytest.fixture(scope="session")
def opened(models) -> Callable[[str, Path], nn.Module]:
    """opened("llama", folder) -> the model as plain transformers opens it; made once, not to be changed."""
    return cache(
        lambda family, folder: (
            getattr(transformers, models.FAMILIES[family].model_class).from_pretrained(folder, dtype="auto").eval()
        )
    )


def parameter_of(model: nn.Module, linear: str) -> tuple[nn.Module, Tensor]:
    """The module whose parameter a linear's weight is, and that or, of an expert that is fused there, its part."""
    parent, expert, leaf = linear.rsplit(".", 2)
    if expert.isdigit() and parent.endswith(".experts"):
        fused = model.get_submodule(parent)
        return fused, fused.get_parameter(leaf)[int(expert)]
    module = model.get_submodule(linear)
    return module, module.weight


@pytest.mark.parametrize("method", METHODS)
def test_transformers_opens_the_output_as_the_source_with_the_stored_weights_in_place(
    models, outcome, opened, weights_of, family, method
):
    done = outcome(family, method)
    model = deepcopy(opened(family, done.source))
    with torch.no_grad():
        for name, weight in weights_of(done.folder).items():
            module, parameter = parameter_of(model, name)
            parameter.copy_(weight.dense().T if isinstance(module, Conv1D) else weight.dense())
    plain = list(models.outputs(opened(family, done.source)))
    found, wanted = list(models.outputs(opened(family, done.folder))), list(models.outputs(model))
    assert len(found) == len(wanted) > 0
    for one, other, before in zip(found, wanted, plain, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()  # measured: 0
        assert (one - before).norm() > 1e-4 * before.norm()  # measured: 4e-3 of it at least


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_linears_of_the_blocks_are_compressed(models, outcome, tensors_of, family, method):
    done = outcome(family, method)
    expected = set(models.FAMILIES[family].compressed_linears())
    packed = {name.removesuffix(".weight_packed") for name in tensors_of(done.folder) if name.endswith("_packed")}
    assert {row["name"] for row in done.report["modules"]} == expected
    assert packed == expected
    assert {row["method"] for row in done.report["modules"]} == {method}


@pytest.mark.parametrize("method", METHODS)
def test_every_other_tensor_is_the_sources_to_the_bit(models, outcome, tensors_of, family, method):
    done = outcome(family, method)
    linears = models.FAMILIES[family].compressed_linears()
    before, after = tensors_of(done.source), tensors_of(done.folder)
    kept = before.keys() - {f"{name}.weight" for name in linears}
    if models.FAMILIES[family].fused:
        kept = {name for name in kept if ".experts." not in name}
    parts = {f"{name}.weight_{part}" for name in linears for part in ("packed", "scale", "shape")}
    assert after.keys() == kept | parts
    for name in kept:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("method", METHODS)
def test_what_is_tied_stays_tied_and_is_stored_once(models, outcome, opened, tensors_of, family, method):
    done = outcome(family, method)

    def ties(model: nn.Module) -> set[frozenset[str]]:
        shared: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared.setdefault(parameter.data_ptr(), set()).add(name)
        return {frozenset(names) for names in shared.values() if len(names) > 1}

    tied = models.FAMILIES[family].tied
    found = ties(opened(family, done.folder))
    assert found == ties(opened(family, done.source))
    assert not tied or tied in found
    assert len(tied & tensors_of(done.folder).keys()) == bool(tied)


@pytest.mark.parametrize("method", METHODS)
def test_the_output_reopened_by_transformers_gives_what_was_streamed(outcome, family, method):
    verification = outcome(family, method).report["verification"]
    assert verification["tokens"] == min(64, LONGEST.get(family, 64))
    assert verification["max_logit_difference"] <= 1e-4  # measured: 0


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_predicts_the_bytes_of_every_family(outcome, tensors_of, family, method):
    done = outcome(family, method)
    assert done.report["plan"]["bytes_after"] == sum(tensor.nbytes for tensor in tensors_of(done.folder).values())


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_is_further_off_than_the_grid_allows(outcome, family, method):
    records = outcome(family, method).records
    assert max(record["weight_error"] for record in records.values()) < {"rtn": 0.13, "gptq": 0.25}[method]


def test_every_linear_of_a_decoder_sees_every_token(outcome):
    assert {record["tokens"] for record in outcome("llama", "gptq").records.values()} == {8 * 16}


def engine(
    folder: Path,
    targets: Mapping[str, QuantizeSettings],
    windows: Tensor,
    target: Path,
    *,
    propagate: str = "compressed",
    batch_size: int = 4,
) -> dict[str, tuple[Affine, dict[str, Any]]]:
    """The engine alone, with methods mixed freely: each module's weight and record."""

    class Silent:
        def step(self, stage: str, done: int, total: int, note: str = "") -> None: ...

        def say(self, line: str) -> None: ...

    checkpoint = Checkpoint.open(str(folder))
    streamed = StreamedModel(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    linears = {linear.name: linear for block in streamed.structure.blocks for linear in block.linears}
    plans = {name: planned(linears[name], settings) for name, settings in targets.items()}
    job = Job("quantize", plans, propagate=propagate, seed=0, spill_limit=1 << 40, spill_folder=None)
    data = batches(windows, batch_size, forward_inputs(streamed.model))
    with torch.no_grad(), CheckpointWriter.open(target, source=checkpoint, fingerprint="test") as writer:
        compress_blocks(job, streamed, data, writer=writer, clock=Clock(), progress=Silent())
        tensors = {name: tensor for block in writer.done for name, tensor in writer.read_part(block).items()}
        records = {name: record for part in writer.done.values() for name, record in part["modules"].items()}
    return {
        name: (from_tensors({key.removeprefix(f"{name}."): t for key, t in tensors.items()}, record["weight"]), record)
        for name, record in records.items()
    }


def planned(linear: Linear, settings: QuantizeSettings) -> ModulePlan:
    """The plan of one dense linear in fp32."""
    before = Dense(torch.empty(linear.shape, device="meta"))
    after = expected(METHOD_OF[type(settings)], before, settings, torch.float32)
    assert not isinstance(after, str)
    return ModulePlan(linear.name, settings, before, after, note="", linear=linear, replaces=(linear.tensor,))


def first(found: Mapping[str, tuple[Affine, Any]]) -> dict[str, Affine]:
    return {name: weight for name, (weight, _) in found.items()}


@pytest.mark.parametrize("propagate", ["compressed", "original"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "clip": "none"},
        {"bits": 3, "clip": "none", "symmetric": False, "order": "none", "block_size": 5},
        {"bits": 2, "clip": "none", "group_size": "channel"},
        {"bits": 4, "clip": "mse"},
    ],
    ids=["4 bits", "3 bits with zero points", "2 bits a row", "4 bits clipped"],
)
def test_a_run_gives_the_codes_of_the_naive_implementation(
    speaking, text_file, windows, compress, weights_of, tmp_path, settings, propagate, names, naive, agreement
):
    model = speaking("llama")
    stage = {"method": "gptq", "propagate": propagate, **settings}
    compress(model, tmp_path / "out", stage, calibration={"source": str(text_file)})
    targets = dict.fromkeys(names, Gptq.model_validate({"group_size": 16, **stage}))
    wanted = first(naive(model, windows, targets, propagate=propagate))
    share = agreement(weights_of(tmp_path / "out"), wanted)
    assert share >= {"none": SAME, "mse": 0.99}[settings["clip"]]  # measured: 1


def test_the_naive_implementation_tells_compressed_from_original_inputs(speaking, windows, names, naive, agreement):
    targets = dict.fromkeys(names, Gptq(clip="none", group_size=16))
    both = [first(naive(speaking("llama"), windows, targets, propagate=way)) for way in ("compressed", "original")]
    assert agreement(*both) < 0.97  # measured: 0.859


def test_a_modules_error_is_that_of_its_output_on_the_calibration_tokens(
    speaking, text_file, windows, compress, tmp_path, names, naive
):
    result = compress(
        speaking("llama"), tmp_path / "out", {"method": "gptq", "clip": "none"}, calibration={"source": str(text_file)}
    )
    wanted = naive(speaking("llama"), windows, dict.fromkeys(names, Gptq(clip="none", group_size=16)))
    for row in result.report["modules"]:
        assert row["error"] == pytest.approx(wanted[row["name"]][1], rel=1e-3)  # measured: 1e-6 at most


def test_a_rule_for_one_of_the_linears_that_share_an_input_changes_that_one_only(
    speaking, text_file, windows, compress, weights_of, tmp_path, names, naive, agreement
):
    rule = {"match": "*.v_proj", "bits": 8, "damping": 0.1}
    stage = {"method": "gptq", "clip": "none", "rules": [rule]}
    compress(speaking("llama"), tmp_path / "out", stage, calibration={"source": str(text_file)})
    targets = {name: Gptq(clip="none", group_size=16) for name in names}
    targets |= {
        name: Gptq(clip="none", group_size=16, bits=8, damping=0.1) for name in names if name.endswith("v_proj")
    }
    assert agreement(weights_of(tmp_path / "out"), first(naive(speaking("llama"), windows, targets))) >= SAME


@pytest.mark.parametrize(
    "rounded",
    [
        ("v_proj",),
        ("q_proj",),
        ("q_proj", "k_proj"),
        ("k_proj",),
        ("gate_proj",),
        ("up_proj",),
        ("o_proj", "down_proj"),
    ],
    ids=" ".join,
)
def test_methods_with_and_without_statistics_mix_among_linears_that_share_an_input(
    speaking, windows, tmp_path, rounded, names, naive, agreement
):
    targets = {
        name: Rtn(group_size=16) if name.endswith(rounded) else Gptq(clip="none", group_size=16) for name in names
    }
    found = engine(speaking("llama"), targets, windows, tmp_path / "out")
    assert agreement(first(found), first(naive(speaking("llama"), windows, targets))) >= SAME
    for name, (_, record) in found.items():
        assert record["fallback"] is None
        assert record["method"] == targets[name].method
        assert record["tokens"] == windows.numel() or name.endswith(rounded)


@pytest.mark.parametrize("family_of_shared", ["llama", "bert", "t5", "bart", "gpt-neox"])
def test_linears_that_share_an_input_see_the_same_number_of_tokens(outcome, models, family_of_shared):
    done = outcome(family_of_shared, "gptq")
    tokens = Counter(record["tokens"] for record in done.records.values())
    assert tokens == {8 * 16: len(models.FAMILIES[family_of_shared].expected_linears())}


def test_leaving_out_a_linear_leaves_its_siblings_statistics_as_they_are(
    speaking, windows, tmp_path, names, naive, agreement
):
    targets = {name: Gptq(clip="none", group_size=16) for name in names if not name.endswith(("q_proj", "up_proj"))}
    found = engine(speaking("llama"), targets, windows, tmp_path / "out")
    assert agreement(first(found), first(naive(speaking("llama"), windows, targets))) >= SAME


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_changes_no_codes(speaking, windows, tmp_path, batch_size, names, agreement):
    targets = dict.fromkeys(names, Gptq(clip="none", group_size=16))
    some = engine(speaking("llama"), targets, windows, tmp_path / "one", batch_size=batch_size)
    others = engine(speaking("llama"), targets, windows, tmp_path / "other", batch_size=2)
    assert agreement(first(some), first(others)) >= SAME  # measured: 1
    assert {record["tokens"] for _, record in some.values()} == {windows.numel()}


def test_gptq_keeps_each_layers_output_better_than_rounding(speaking, windows, names, naive, tmp_path):
    rounded = naive(speaking("llama"), windows, dict.fromkeys(names, Rtn(group_size=16)))
    found = engine(speaking("llama"), dict.fromkeys(names, Gptq(clip="none", group_size=16)), windows, tmp_path / "out")
    better = [found[name][1]["error"] < rounded[name][1] for name in names]
    assert sum(better) >= 12  # measured: 14 of 14


# Mixtures of experts


@pytest.mark.parametrize("mixture", MOE)
def test_routers_stay_as_they_are_and_the_plan_says_so(models, outcome, tensors_of, mixture):
    done = outcome(mixture, "gptq")
    routers = [name for name, why in models.FAMILIES[mixture].left_alone.items() if why == "router"]
    assert routers
    before, after = tensors_of(done.source), tensors_of(done.folder)
    stored = [name for name in before if ".gate.weight" in name or "router" in name or "shared_expert_gate" in name]
    assert stored
    assert all(torch.equal(before[name], after[name]) for name in stored)
    assert any(note.startswith("left alone (router)") for note in done.report["plan"]["notes"])


@pytest.mark.parametrize("stack", ["encoder.block.{}.layer.1", "decoder.block.{}.layer.2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_every_token_reaches_one_expert_of_a_switch_layer(outcome, stack, layer):
    start = f"{stack.format(layer)}.mlp.experts.expert_"
    records = outcome("switch", "gptq").records
    tokens = [record["tokens"] for name, record in records.items() if name.startswith(start) and name.endswith(".wi")]
    assert len(tokens) == 4
    assert sum(tokens) == 8 * 16


def starve(source: Path, folder: Path, *, routers: tuple[str, ...], experts: tuple[int, ...]) -> Path:
    """A copy of the pico Switch model in which no token chooses these experts: another two always score more."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if name.endswith("router.classifier.weight") and name.startswith(routers)]
    assert names
    for name in names:
        tensors[name][1] = -tensors[name][0]
        tensors[name][list(experts)] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_expert_that_no_token_reaches_is_rounded_and_recorded_as_a_fallback(
    saved, outcome, compress, tensors_of, tmp_path
):
    model = starve(saved("switch"), tmp_path / "starved", routers=("encoder.block.1",), experts=(3,))
    result = compress(model, tmp_path / "out", {"method": "gptq", "bits": 4})
    starved = [f"encoder.block.1.layer.1.mlp.experts.expert_3.{name}" for name in ("wi", "wo")]
    rows = {row["name"]: row for row in result.report["modules"]}
    assert [name for name, row in rows.items() if row["method"] == "rtn"] == starved
    told = [sentence for sentence in result.report["fallbacks"] if "rounded to nearest: " in sentence]
    assert told == [f"{name}: rounded to nearest: no calibration token reached it" for name in starved]
    rounded, found = tensors_of(outcome("switch", "rtn").folder), tensors_of(tmp_path / "out")
    for name in starved:
        assert rows[name]["error"] is None
        assert torch.equal(found[f"{name}.weight_packed"], rounded[f"{name}.weight_packed"])


def test_too_many_fallbacks_are_an_error_and_nothing_is_published(saved, compress, tmp_path):
    model = starve(saved("switch"), tmp_path / "starved", routers=("encoder", "decoder"), experts=(2, 3))
    with pytest.raises(ModelzipError, match=r"^16 of 56 modules couldn't be compressed as asked, .*\.$"):
        compress(model, tmp_path / "out", {"method": "gptq", "bits": 4})
    assert not (tmp_path / "out").exists()


# What comes in damaged, and what is asked for in vain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_one_sentence_that_names_the_tensor(saved, compress, tmp_path, method, value):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in saved("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelzipError) as caught:
        compress(folder, tmp_path / "out", {"method": method})
    told = str(caught.value)
    assert "\n" not in told
    assert told.endswith(".")
    if method == "rtn":  # the model doesn't have to write text, so the engine is the first to see the weight
        assert isinstance(caught.value, CheckpointError)
        assert told.startswith(f"{name} holds 1 values that are NaN or infinite")
    assert not (tmp_path / "out").exists()
