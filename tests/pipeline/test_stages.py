"""Several stages in a row: each starts from what the one before it left, and only the last one's output stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modelzip.checkpoints.errors import OutputError, RecipeError
from modelzip.compressors.quantize.settings import Gptq, Rtn
from modelzip.pipeline.run import plan_recipe, run_recipe

ATTENTION = {"bits": 8, "ignore": ["*.mlp.*"]}
MLP = {"bits": 4, "ignore": ["*.self_attn.*"]}


def stages(method: str) -> list[dict[str, Any]]:
    """The attention at 8 bits, then the rest at 4."""
    return [{"method": method, "clip": "none", **ATTENTION}, {"method": method, "clip": "none", **MLP}]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def done(speaking, compress, text_file, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output and the report of the two GPTQ stages."""
    folder = tmp_path_factory.mktemp("stages") / "out"
    result = compress(speaking("llama"), folder, *stages("gptq"), calibration={"source": str(text_file)})
    return folder, result.report


def test_two_stages_of_rounding_are_one_stage_with_a_rule(speaking, compress, tensors_of, tmp_path):
    compress(speaking("llama"), tmp_path / "two", *stages("rtn"))
    rule = {"match": "*.self_attn.*", "bits": 8}
    compress(speaking("llama"), tmp_path / "one", {"method": "rtn", "clip": "none", "bits": 4, "rules": [rule]})
    two, one = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "one")
    assert two.keys() == one.keys()
    assert all(torch.equal(two[name], one[name]) for name in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("two", "one")]
    assert configs[0] == configs[1]


def test_the_second_stage_is_calibrated_on_what_the_first_left(
    speaking, windows, weights_of, names, naive, agreement, done
):
    attention = [name for name in names if ".self_attn." in name]
    first = naive(speaking("llama"), windows, dict.fromkeys(attention, Gptq(clip="none", bits=8, group_size=16)))
    before = {name: weight for name, (weight, _) in first.items()}
    rest = dict.fromkeys(set(names) - set(attention), Gptq(clip="none", bits=4, group_size=16))
    second = naive(speaking("llama"), windows, rest, before=before)
    wanted = before | {name: weight for name, (weight, _) in second.items()}
    assert agreement(weights_of(done[0]), wanted) >= 0.999  # measured: 1
    alone = naive(speaking("llama"), windows, rest)
    assert any(not torch.equal(alone[name][0].codes(), wanted[name].codes()) for name in rest)


def test_the_second_stage_leaves_what_the_first_compressed_as_it_is(
    speaking, compress, text_file, tensors_of, tmp_path, done
):
    stage = stages("gptq")[0]
    compress(speaking("llama"), tmp_path / "first", stage, calibration={"source": str(text_file)})
    alone, both = tensors_of(tmp_path / "first"), tensors_of(done[0])
    packed = [name for name in alone if "_proj.weight_" in name]
    assert len(packed) == 2 * 4 * 3  # layers, linears, tensors of each
    assert all(torch.equal(alone[name], both[name]) for name in packed)


def test_transformers_opens_the_result_of_two_stages(speaking, windows, weights_of, done):
    with torch.no_grad():
        opened = transformers.AutoModelForCausalLM.from_pretrained(done[0]).eval()
        wanted = transformers.AutoModelForCausalLM.from_pretrained(speaking("llama")).eval()
        for name, weight in weights_of(done[0]).items():
            wanted.get_submodule(name).weight.copy_(weight.dense())
        found, truth = opened(windows).logits, wanted(windows).logits
    assert (found - truth).norm() <= 1e-5 * truth.norm()  # measured: 0


def test_the_report_covers_both_stages(speaking, names, done):
    folder, report = done
    assert report["command"] == "run"
    assert {row["name"]: (row["stage"], row["form"]) for row in report["modules"]} == {
        name: (1, "8 bit, group 16") if ".self_attn." in name else (2, "4 bit, group 16") for name in names
    }
    assert report["plan"]["modules"] == 14
    assert report["plan"]["bytes_after"] == report["size"]["bytes_after"]
    assert report["source"]["name"] == str(speaking("llama"))
    assert len(report["recipe"]["stages"]) == 2
    recorded = [stage["records"].keys() for stage in json.loads((folder / "modelzip.json").read_text())["stages"]]
    assert set().union(*recorded) == set(names)
    assert [len(records) for records in recorded] == [8, 6]


def test_only_the_output_is_left(done):
    assert [path.name for path in done[0].parent.iterdir()] == ["out"]


def test_a_method_without_data_and_one_with_follow_each_other(
    speaking, compress, text_file, windows, weights_of, names, naive, agreement, tmp_path
):
    ignored = sorted(name for name in names if not name.endswith("v_proj"))
    order = [{"method": "rtn", "ignore": ignored}, {"method": "gptq", "clip": "none", "ignore": ["*.v_proj"]}]
    compress(speaking("llama"), tmp_path / "out", *order, calibration={"source": str(text_file)})
    values = dict.fromkeys((name for name in names if name.endswith("v_proj")), Rtn(group_size=16))
    before = {name: weight for name, (weight, _) in naive(speaking("llama"), windows, values).items()}
    rest = naive(speaking("llama"), windows, dict.fromkeys(ignored, Gptq(clip="none", group_size=16)), before=before)
    wanted = before | {name: weight for name, (weight, _) in rest.items()}
    assert agreement(weights_of(tmp_path / "out"), wanted) >= 0.999


def test_a_second_run_on_a_partly_compressed_output_gives_what_two_stages_give(
    speaking, compress, text_file, tensors_of, tmp_path, done
):
    calibration = {"source": str(text_file)}
    first, second = stages("gptq")
    compress(speaking("llama"), tmp_path / "first", first, calibration=calibration)
    compress(tmp_path / "first", tmp_path / "second", second, calibration=calibration)
    found, wanted = tensors_of(tmp_path / "second"), tensors_of(done[0])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_second_stages_plan_starts_from_the_firsts_bytes_and_counts_its_disk(speaking, recipe_of):
    plans = plan_recipe(recipe_of(speaking("llama"), *stages("rtn")), output=Path("out"))
    assert plans[1].bytes_before == plans[0].bytes_after
    assert plans[1].disk_bytes == plans[0].bytes_after + plans[1].bytes_after
    assert [len(plan.modules) for plan in plans] == [8, 6]


@pytest.fixture
def killed(speaking, recipe_of, text_file, here, killed_at, tmp_path) -> Path:
    """Where the output would be of a run that was killed in its second stage."""
    recipe = recipe_of(speaking("llama"), *stages("gptq"), calibration={"source": str(text_file)})
    with killed_at("quantize", 1, times=3) as progress:  # the first stage is at 1 and 2
        here(lambda: run_recipe(recipe, output=tmp_path / "out", progress=progress))
    assert sorted(hidden(tmp_path)) == [".out.partial", ".out.stage1"]
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def test_a_killed_run_is_not_started_again_unasked(speaking, compress, text_file, killed):
    with pytest.raises(OutputError, match=r"--resume to go on with it, or --overwrite to start again\.$"):
        compress(speaking("llama"), killed, *stages("gptq"), calibration={"source": str(text_file)})
    assert sorted(hidden(killed.parent)) == [".out.partial", ".out.stage1"]


@pytest.mark.parametrize("way", ["resume", "overwrite"])
def test_a_killed_run_ends_in_the_same_bytes(speaking, compress, text_file, killed, done, way):
    calibration = {"source": str(text_file)}
    result = compress(speaking("llama"), killed, *stages("gptq"), calibration=calibration, **{way: True})
    same = [path for path in sorted(done[0].iterdir()) if path.name not in ("report.json", "report.md", "report.html")]
    assert [path.name for path in same] == sorted(
        path.name for path in killed.iterdir() if path.name not in ("report.json", "report.md", "report.html")
    )
    assert [path.name for path in same if path.read_bytes() != (killed / path.name).read_bytes()] == []
    assert [row["error"] for row in result.report["modules"]] == [row["error"] for row in done[1]["modules"]]
    assert hidden(killed.parent) == []


def test_an_output_that_exists_is_refused_before_a_gguf_file_is_converted(compress, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    monkeypatch.setattr("modelzip.pipeline.run._open", lambda _: pytest.fail("opened"))
    with pytest.raises(OutputError, match=r"exists already; give --overwrite to replace it"):
        compress(tmp_path / "model.gguf", taken, {"method": "rtn"})


def test_kernels_that_are_named_wrong_are_refused_before_the_model_is_opened(compress, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELZIP_KERNELS", "fastest")
    monkeypatch.setattr("modelzip.pipeline.run._open", lambda _: pytest.fail("opened"))
    with pytest.raises(RecipeError, match=r"^MODELZIP_KERNELS is 'fastest'; it must be auto, reference or compiled\.$"):
        compress(tmp_path / "model", tmp_path / "out", {"method": "rtn"})
