"""The plan: made from headers alone, right to the byte, and the place where every mistake is told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from modelzip.checkpoints import index
from modelzip.checkpoints.errors import CheckpointError, MachineError, OutputError, ProblemsError
from modelzip.pipeline.run import plan_recipe

HERE = Path("out")


def copy_of(source: Path, folder: Path, *, config: dict[str, object] | None = None) -> Path:
    shutil.copytree(source, folder)
    if config is not None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **config}))
    return folder


def test_a_plan_reads_no_weights(saved, recipe_of, family, tmp_path, monkeypatch):
    """All weights are NaN, and reading one fails."""
    folder = copy_of(saved(family), tmp_path / "model")
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin:] = b"\xff" * (len(data) - begin)
    file.write_bytes(data)

    def read(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(index, "read_tensors", read)
    stages = {"method": "gptq", "bits": 4}
    (found,) = plan_recipe(recipe_of(folder, stages), output=HERE)
    (wanted,) = plan_recipe(recipe_of(saved(family), stages), output=HERE)
    assert found.rows() == wanted.rows()
    assert found.bytes_after == wanted.bytes_after


def test_a_plan_leaves_nothing_behind(saved, recipe_of, tmp_path):
    plan_recipe(recipe_of(saved("llama"), {"method": "gptq"}), output=tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_refused_where_the_output_may_not_be_written(saved, recipe_of, tmp_path):
    model = copy_of(saved("llama"), tmp_path / "model")
    recipe = recipe_of(model, {"method": "rtn"})
    with pytest.raises(OutputError, match=r"model/small and the model .* overlap; name another output folder"):
        plan_recipe(recipe, output=model / "small")
    there = copy_of(saved("llama"), tmp_path / "there")
    with pytest.raises(OutputError, match=r"there exists already; give --overwrite to replace it"):
        plan_recipe(recipe, output=there)
    assert plan_recipe(recipe, output=there, overwrite=True)
    assert plan_recipe(recipe, output=there, resume=True)
    recipe = recipe_of(model, {"method": "rtn"}, export=[{"format": "dense", "output": str(there)}])
    with pytest.raises(OutputError, match=r"there exists already"):
        plan_recipe(recipe, output=tmp_path / "out")


GRIDS = {
    "2 bits in groups": {"bits": 2, "group_size": 16},
    "3 bits with zero points": {"bits": 3, "group_size": 16, "symmetric": False},
    "4 bits with zero points": {"bits": 4, "group_size": 16, "symmetric": False},
    "5 bits a row": {"bits": 5, "group_size": "channel"},
    "7 bits a row with zero points": {"bits": 7, "group_size": "channel", "symmetric": False},
    "8 bits a tensor": {"bits": 8, "group_size": "tensor"},
    "6 bits a tensor with a zero point": {"bits": 6, "group_size": "tensor", "symmetric": False},
    "groups that don't divide": {"bits": 4, "group_size": 128},
    "rules": {"bits": 4, "rules": [{"match": "*.down_proj", "bits": 8}, {"match": "*.0.*", "group_size": "channel"}]},
    "skipped modules": {"bits": 4, "ignore": ["*.q_proj"], "rules": [{"match": "re:.*mlp.*", "skip": True}]},
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_predicted_bytes_are_the_bytes_of_the_outputs_tensors(
    saved, recipe_of, compress, tensors_of, tmp_path, grid
):
    stage = {"method": "rtn", **grid}
    (plan,) = plan_recipe(recipe_of(saved("llama"), stage), output=HERE)
    result = compress(saved("llama"), tmp_path / "out", stage)
    stored = tensors_of(tmp_path / "out")
    assert plan.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    assert plan.bytes_before == sum(tensor.nbytes for tensor in tensors_of(saved("llama")).values())
    assert result.report["size"]["bytes_after"] == plan.bytes_after
    for module in plan.modules:
        assert module.after.nbytes == sum(t.nbytes for name, t in stored.items() if name.startswith(f"{module.name}."))


def test_a_bf16_models_bytes_are_predicted_too(models, recipe_of, compress, tensors_of, tmp_path):

    source = models.saved("llama", tmp_path / "half", dtype=torch.bfloat16)
    stage = {"method": "rtn", "bits": 4, "symmetric": False}
    (plan,) = plan_recipe(recipe_of(source, stage), output=HERE)
    compress(source, tmp_path / "out", stage)
    assert plan.bytes_after == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())


def test_a_group_size_that_does_not_divide_becomes_the_largest_power_of_two_that_does(saved, recipe_of):
    (plan,) = plan_recipe(recipe_of(saved("llama"), {"method": "rtn", "group_size": 64}), output=HERE)
    groups = {(module.linear.shape[1], module.after.group_size, module.note) for module in plan.modules}
    assert groups == {
        (32, 32, "group 64 doesn't divide 32 columns"),
        (48, 16, "group 64 doesn't divide 48 columns"),
    }
    assert "group 64 doesn't divide 48 columns: group 16 is taken for 2 of 14 modules" in plan.notes


def test_a_group_that_does_not_divide_is_no_matter_where_weights_stay_floats(saved, recipe_of):
    recipe = recipe_of(saved("llama"), stages=[{"prune": {"method": "magnitude"}}])
    (plan,) = plan_recipe(recipe, output=HERE)
    assert not any(module.note for module in plan.modules)


def test_where_no_group_fits_a_row_gets_one_scale(saved, recipe_of):
    (plan,) = plan_recipe(recipe_of(saved("minilm"), {"method": "rtn", "group_size": 64}), output=HERE)
    assert {(module.linear.shape[1], module.after.strategy, module.after.group_size) for module in plan.modules} == {
        (24, "channel", 24),
        (96, "group", 32),
    }
    assert "group 64 doesn't divide 24 columns: one scale a row is taken for 10 of 12 modules" in plan.notes


def test_another_group_than_asked_for_stands_in_the_report(saved, compress, tmp_path):
    report = compress(saved("llama"), tmp_path / "out", {"method": "rtn", "group_size": 64}).report
    row = next(row for row in report["modules"] if row["name"] == "model.layers.1.mlp.down_proj")
    assert row["form"] == "4 bit, group 16"
    assert f"{row['name']}: group 64 doesn't divide 48 columns: group 16" in report["fallbacks"]


def told(recipe) -> list[str]:
    """The sentences with which a recipe's plan is refused."""
    with pytest.raises(ProblemsError) as caught:
        plan_recipe(recipe, output=HERE)
    return list(caught.value.sentences)


def test_strict_groups_name_a_module_that_the_group_does_not_fit(saved, recipe_of):
    stage = {"method": "rtn", "group_size": 32, "strict_groups": True}
    assert told(recipe_of(saved("llama"), stage)) == [
        "quantize: group_size 32 doesn't divide 2 modules: model.layers.0.mlp.down_proj has 48 columns "
        "(and 1 more); choose a divisor, or leave out --strict-groups."
    ]


def test_strict_groups_let_a_group_that_fits_everywhere_pass(saved, recipe_of):
    (plan,) = plan_recipe(recipe_of(saved("llama"), {"method": "rtn", "strict_groups": True}), output=HERE)
    assert {module.after.group_size for module in plan.modules} == {16}


@pytest.mark.parametrize("pattern", ["*.donw_proj", "re:.*donw_proj", "down_proj", "model.layers.7.*"])
@pytest.mark.parametrize("key", ["rules", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error_that_shows_what_names_look_like(saved, recipe_of, pattern, key):
    given = {"rules": [{"match": pattern, "bits": 8}], "ignore": [pattern]}
    (sentence,) = told(recipe_of(saved("llama"), {"method": "rtn", key: given[key]}))
    assert sentence.startswith(f"quantize: the pattern '{pattern}' matches no module; ")
    assert re.search(r"model\.layers\.0\.\w+\.\w+_proj\.$", sentence)


def test_a_rule_for_what_is_never_compressed_says_why(saved, recipe_of):
    stage = {"method": "rtn", "rules": [{"match": "lm_head", "bits": 8}]}
    assert told(recipe_of(saved("llama"), stage)) == [
        "quantize: the rule 'lm_head' matches only lm_head, which is never compressed (output head)."
    ]


@pytest.mark.parametrize("stage", [{"method": "rtn"}, {"method": "rtn", "kv_cache": "fp8"}], ids=str)
def test_to_ignore_everything_is_one_sentence(saved, recipe_of, stage):
    with pytest.raises(ProblemsError, match="nothing is left to compress: all 14 linears are ignored"):
        plan_recipe(recipe_of(saved("llama"), {**stage, "ignore": ["*"]}), output=HERE)


def test_to_ignore_what_is_never_compressed_is_no_mistake(saved, recipe_of):
    (plan,) = plan_recipe(recipe_of(saved("llama"), {"method": "rtn", "ignore": ["lm_head"]}), output=HERE)
    assert len(plan.modules) == 14


def test_all_problems_are_told_at_once(saved, recipe_of):
    first = {"method": "rtn", "group_size": 32, "strict_groups": True, "ignore": ["*.donw_proj"]}
    second = {"method": "gptq", "layout": "compressed-tensors", "bits": 3, "rules": [{"match": "x", "bits": 8}]}
    sentences = told(recipe_of(saved("llama"), first, second))
    starts = ["stages[0].quantize: the pattern", "stages[0].quantize: group_size 32", "stages[1].quantize: the pattern"]
    starts += ["stages[1].quantize: model.layers.0.self_attn.q_proj (and 13 more): it is quantized already;"]
    for start in starts:
        assert sum(sentence.startswith(start) for sentence in sentences) == 1, start
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences)


def test_a_stage_that_leaves_nothing_to_compress_is_refused(saved, recipe_of):
    assert told(recipe_of(saved("llama"), {"method": "rtn", "ignore": ["model.*"]}))[0] == (
        "quantize: nothing is left to compress: all 14 linears are ignored, skipped or refused."
    )


def test_a_layout_that_cannot_hold_the_result_is_refused_if_it_was_asked_for(saved, recipe_of):
    stage = {"method": "rtn", "bits": 3, "layout": "compressed-tensors"}
    (sentence,) = told(recipe_of(saved("llama"), stage))
    assert sentence.startswith("quantize: compressed-tensors holds 2, 4 and 8 bits in plain linears")


def test_an_output_of_our_own_is_refused_as_input(saved, compress, recipe_of, tmp_path):
    compress(saved("llama"), tmp_path / "once", {"method": "rtn"})
    (sentence,) = told(recipe_of(tmp_path / "once", {"method": "rtn", "bits": 2}))
    assert sentence == (
        "quantize: model.layers.0.self_attn.q_proj (and 13 more): it is quantized already; give the original "
        "model, or leave what is compressed out with --ignore."
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_model_that_others_quantized_is_refused(saved, recipe_of, tmp_path, method):
    folder = copy_of(saved("llama"), tmp_path / "model", config={"quantization_config": {"quant_method": method}})
    with pytest.raises(CheckpointError) as caught:
        plan_recipe(recipe_of(folder, {"method": "rtn"}), output=HERE)
    assert str(caught.value) == (
        f"{folder} is already quantized as {method}, which modelzip can't take as input: give the original model."
    )


class Machine:
    """What psutil and shutil say is free."""

    def __init__(self, memory: int, disk: int) -> None:
        self.memory, self.disk = memory, disk

    def virtual_memory(self) -> SimpleNamespace:
        return SimpleNamespace(available=self.memory, total=1 << 40)

    def disk_usage(self, path: object) -> SimpleNamespace:
        return SimpleNamespace(total=1 << 40, used=0, free=self.disk)


@pytest.mark.parametrize(
    ("short", "sentence"),
    [
        ("memory", r"^This needs about \d+ MB of memory and 0 MB are free: lower --samples, [^\n]*\.$"),
        ("disk", r"^The output needs 0\.\d MB and .* has 0\.0 MB free: make room, or name another place [^\n]*\.$"),
    ],
)
def test_too_little_memory_or_disk_is_told_before_anything_is_written(
    saved, compress, tmp_path, monkeypatch, short, sentence
):
    machine = Machine(memory=1 << 40, disk=1 << 40)
    setattr(machine, short, 1000)
    monkeypatch.setattr(psutil, "virtual_memory", machine.virtual_memory)
    monkeypatch.setattr(shutil, "disk_usage", machine.disk_usage)
    with pytest.raises(MachineError, match=sentence):
        compress(saved("llama"), tmp_path / "out", {"method": "rtn", "bits": 2})
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_shown_on_a_machine_that_is_too_small_for_the_run(saved, recipe_of, monkeypatch):
    machine = Machine(memory=1000, disk=1000)
    monkeypatch.setattr(psutil, "virtual_memory", machine.virtual_memory)
    monkeypatch.setattr(shutil, "disk_usage", machine.disk_usage)
    (plan,) = plan_recipe(recipe_of(saved("llama"), {"method": "rtn"}), output=HERE)
    assert plan.memory_bytes > 1000
    assert plan.disk_bytes == plan.bytes_after


def test_more_calibration_text_needs_more_memory_and_a_method_without_data_does_not_care(saved, recipe_of):
    def memory(method: str, samples: int) -> int:
        recipe = recipe_of(saved("llama"), {"method": method}, calibration={"samples": samples, "seq_len": 64})
        return plan_recipe(recipe, output=HERE)[0].memory_bytes

    assert memory("gptq", 1000) > memory("gptq", 10) > memory("rtn", 10) == memory("rtn", 1000)


def test_memory_is_reckoned_in_the_type_that_the_forward_computes_in(models, recipe_of, tmp_path):
    folder = models.saved("llama", tmp_path, dtype=torch.float16)

    def held(dtype: str) -> int:
        few, many = (
            recipe_of(folder, {"method": "gptq"}, calibration={"samples": samples}, dtype=dtype, device="cpu")
            for samples in (8, 1008)
        )
        plans = [plan_recipe(recipe, output=HERE)[0] for recipe in (few, many)]
        return plans[1].memory_bytes - plans[0].memory_bytes

    assert held("auto") == held("float32") == 2 * held("float16")  # on a CPU, fp16 runs in fp32


def test_an_output_that_is_there_is_refused_before_the_model_writes_its_text(saved, compress, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(OutputError, match="--overwrite"):
        compress(saved("llama"), tmp_path / "out", {"method": "rtn"})
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_a_plan_as_plain_data_is_json_with_every_module(saved, recipe_of):
    (plan,) = plan_recipe(recipe_of(saved("llama"), {"method": "gptq"}), output=HERE)
    data = json.loads(json.dumps(plan.as_dict()))
    assert [module["name"] for module in data["modules"]] == [module.name for module in plan.modules]
    assert sum(module["bytes_before"] - module["bytes_after"] for module in data["modules"]) == (
        data["bytes_before"] - data["bytes_after"]
    )
