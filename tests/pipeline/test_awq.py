"""AWQ from a recipe to a model that plain transformers opens."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import modelzip.weights  # noqa: F401  # teaches the layout to transformers
from modelzip.checkpoints.errors import ModelzipError
from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline import layer_stage
from modelzip.pipeline.run import plan_recipe
from modelzip.pipeline.scales import choose_scales

STAGE = {"method": "awq", "bits": 3, "group_size": 16}


@pytest.fixture(scope="module")
def uneven(speaking, edited):
    """A llama a few of whose inputs are ten times as large as the others, as in trained models."""

    def change(name, tensor):
        if name.endswith("layernorm.weight"):
            tensor[[3, 17]] *= 10
        if name.endswith(("v_proj.weight", "up_proj.weight")):
            tensor[[1, 5]] *= 10

    return edited(speaking("llama"), change)


def kl(report):
    return report["evaluation"]["kl"]


def test_it_loses_less_than_rounding_where_inputs_are_uneven(uneven, compress, tmp_path):
    """Measured: rtn 0.32, awq 0.19; gptq 0.16, gptq on scaled weights 0.11."""
    found = {}
    for stage in ({"method": "rtn"}, {"method": "awq"}, {"method": "gptq"}, {"method": "awq", "solver": "gptq"}):
        name = "-".join(stage.values())
        report = compress(uneven, tmp_path / name, {**STAGE, **stage}, evaluate={"enabled": True}).report
        found[name] = kl(report)
        if name == "awq":
            told = {module["name"]: module["note"] for module in report["modules"]}
            assert told["model.layers.0.self_attn.q_proj"].startswith("inputs scaled by mean|x|^0.")
    assert found["awq"] < 0.75 * found["rtn"]
    assert found["awq-gptq"] < 0.85 * found["gptq"]


def test_norms_take_the_scales_and_plain_transformers_opens_the_result(uneven, compress, tensors_of, tmp_path):
    compress(uneven, tmp_path / "out", {**STAGE, "bits": 4})
    before, after = tensors_of(uneven), tensors_of(tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(before[norm], after[norm])
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_with_rotation_it_is_one_chain_of_changes(uneven, compress, tmp_path):
    stage = {**STAGE, "bits": 8, "rotate": "all"}
    report = compress(uneven, tmp_path / "out", stage, evaluate={"enabled": True}).report
    assert kl(report) < 0.002  # measured 0.0006


@pytest.fixture
def passes(monkeypatch):
    """How often scales were chosen."""
    found = []
    monkeypatch.setattr(
        layer_stage, "choose_scales", lambda *args, **more: found.append(1) or choose_scales(*args, **more)
    )
    return found


def test_a_run_that_was_killed_ends_in_the_same_bytes(uneven, compress, killed_at, tensors_of, passes, tmp_path):
    """And doesn't choose its scales a second time."""
    compress(uneven, tmp_path / "whole", STAGE)
    with killed_at("quantize", 1) as progress:
        compress(uneven, tmp_path / "killed", STAGE, progress=progress)
    assert len(passes) == 2
    report = compress(uneven, tmp_path / "killed", STAGE, resume=True).report
    assert len(passes) == 2
    assert all("inputs scaled by" in module["note"] for module in report["modules"])
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_plan_says_where_no_scales_can_be_folded(speaking, recipe_of, tmp_path):
    (plan,) = plan_recipe(recipe_of(speaking("bert"), STAGE), output=tmp_path / "out")
    notes = "; ".join(plan.notes)
    assert "scales are folded in front of 2 of 12 modules" in notes
    assert "attention.self.query (and 7 more): its input also goes to add" in notes
    (plan,) = plan_recipe(recipe_of(speaking("switch"), STAGE), output=tmp_path / "out")
    assert any("no scales can be folded: " in note and "can't run without values" in note for note in plan.notes)


def test_what_is_pruned_is_refused(speaking, recipe_of, tmp_path):
    stages = {"prune": {"method": "magnitude", "sparsity": 0.5}}, STAGE
    with pytest.raises(ModelzipError, match="it is pruned, and awq takes plain matrices: take rtn or gptq"):
        plan_recipe(recipe_of(speaking("llama"), *stages), output=tmp_path / "out")


@pytest.mark.parametrize("model", ["llama", "bert", "mixtral", "opt"])
@pytest.mark.parametrize("more", [{}, {"grid": "nf"}, {"solver": "gptq", "symmetric": False}], ids=str)
def test_the_output_opens_and_has_the_size_that_was_planned(speaking, compress, recipe_of, tmp_path, model, more):
    stage = {**STAGE, "bits": 4, **more}
    (plan,) = plan_recipe(recipe_of(speaking(model), stage), output=tmp_path / "out")
    report = compress(speaking(model), tmp_path / "out", stage).report
    assert report["size"]["bytes_after"] == plan.bytes_after == Checkpoint.open(str(tmp_path / "out")).nbytes
    assert report["verification"] is not None
    assert all("were never active" in told for told in report["fallbacks"])  # behind OPT's ReLU
    transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
