"""Recipes: strict, and every problem is told at once with its path and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from modelzip.checkpoints.errors import ProblemsError, RecipeError
from modelzip.compressors import QUANTIZE
from modelzip.compressors.quantize.settings import Gptq, Rtn
from modelzip.recipes.files import library, read_yaml
from modelzip.recipes.json_schema import recipe_schema
from modelzip.recipes.load import dump_recipe, load_recipe, parse_recipe
from modelzip.recipes.schema import STAGES


def problems(data: dict, origin: str = "", **more) -> tuple[str, ...]:
    with pytest.raises(ProblemsError) as caught:
        parse_recipe(data, origin, **more)
    return caught.value.sentences


def stage(**settings) -> dict:
    return {"stages": [{"quantize": settings}]}


def test_a_flat_stage_becomes_settings_ignore_and_rules():
    rules = [{"match": "*.down_proj", "bits": 8}]
    recipe = parse_recipe(stage(method="gptq", bits=3, ignore=["lm_head"], rules=rules), "")
    assert recipe.stages[0].settings == Gptq(bits=3)
    assert recipe.stages[0].ignore == ("lm_head",)
    assert recipe.stages[0].rules[0].overrides == {"bits": 8}


def test_several_stages_in_a_row_are_kept_in_order():
    recipe = parse_recipe({"stages": [{"quantize": {"method": "rtn"}}, {"quantize": {"method": "gptq"}}]}, "")
    assert [type(one.settings) for one in recipe.stages] == [Rtn, Gptq]


def test_a_stage_that_names_no_method_takes_the_default_one():
    assert parse_recipe({"stages": ["quantize"]}, "").stages[0].settings == Gptq()


def test_bits_out_of_range_say_the_path_the_value_and_the_range():
    told = problems({"stages": [{"quantize": {"bits": 9}}]}, "r.yaml")
    assert told == ("r.yaml: stages[0].quantize.bits: 9 is not allowed; it must be 2 to 8, or 1 on the grid binary",)


def test_a_number_that_is_settled_is_told_as_one():
    told = problems({"stages": [{"quantize": {"method": "smoothquant", "bits": 4}}]}, "r.yaml")
    assert told == ("r.yaml: stages[0].quantize.bits: 4 is not allowed; it must be 8",)


def test_all_problems_are_told_at_once_each_with_its_path():
    told = problems(
        {
            "modle": "x",
            "seed": -1,
            "calibration": {"sampels": 3},
            "stages": [{"quantize": {"bits": 9}}, {"quantize": {"method": "rtn", "clip": "msee"}}, {"quantise": {}}],
            "evaluate": {"windows": 0},
        }
    )
    assert set(told) == {
        "modle: is not a known key; did you mean model?",
        "seed: -1 is not allowed; it must be a whole number (0 or more)",
        "calibration.sampels: is not a known key; did you mean samples?",
        "stages[0].quantize.bits: 9 is not allowed; it must be 2 to 8, or 1 on the grid binary",
        "stages[1].quantize.clip: msee is not allowed; it must be none or mse; did you mean mse?",
        "stages[2].quantise: is not a known stage; did you mean quantize?",
        "evaluate.windows: 0 is not allowed; it must be a whole number (1 or more)",
    }


def test_a_setting_of_another_method_names_the_methods_that_have_it():
    assert problems(stage(method="rtn", order="none")) == (
        "stages[0].quantize.order: is not a setting of rtn; gptq, spqr, gptvq, aqlm or quik has it",
    )


def test_an_unknown_method_names_the_nearest_one():
    assert problems(stage(method="gtpq"))[0].endswith("gtpq is not a quantize method; did you mean gptq?")


def test_a_value_of_a_union_gives_one_problem_not_one_a_branch():
    told = problems(stage(group_size="chanel"))
    assert told == (
        "stages[0].quantize.group_size: chanel is not allowed; it must be a whole number (1 or more), channel or "
        "tensor; did you mean channel?",
    )


def test_settings_that_contradict_each_other_are_a_problem_of_the_stage():
    assert problems(stage(damping=0.5, max_damping=0.1)) == (
        "stages[0].quantize: max_damping (0.1) must not be less than damping (0.5)",
    )


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"match": "*", "bits": 1}, ": 1 bit is of the grid binary; int has 2 to 8"),
        ({"match": "*", "layout": "modelzip"}, ".layout: holds for the whole stage, so a rule can't change it"),
        ({"match": "*", "bitz": 3}, ".bitz: is not a setting of gptq; did you mean bits?"),
        ({"bits": 3}, ".match: is missing; it must be text"),
        ({"match": "*"}, ": changes nothing; give it skip: true or a setting such as bits: 8"),
        (
            {"match": "*", "skip": True, "bits": 3},
            ": skips its modules, so bits would do nothing; remove one of the two",
        ),
        ({"match": "re:(", "bits": 3}, ".match: re:( is not a regular expression"),
    ],
)
def test_a_wrong_rule_is_told_with_its_index(rule, told):
    (sentence,) = problems(stage(rules=[{"match": "a", "bits": 8}, rule]))
    assert sentence.startswith("stages[0].quantize.rules[1]" + told)


@pytest.mark.parametrize("where", ["top", "stage", "calibration"])
def test_no_recipe_can_enable_remote_code(where):
    data = stage(bits=4)
    data["calibration"] = {}
    target = {"top": data, "stage": data["stages"][0]["quantize"], "calibration": data["calibration"]}[where]
    target["trust_remote_code"] = True
    assert "can't enable code" in problems(data)[0]


@pytest.mark.parametrize("stages", [None, [], "gptq", [3], [{"quantize": {}, "prune": {}}], [{"quantize": [1]}]])
def test_stages_of_the_wrong_shape_are_problems_not_crashes(stages):
    assert problems({"stages": stages})[0].startswith("stages")


def test_what_an_option_set_is_told_by_the_options_name():
    told = problems(stage(bits=9), "r.yaml", renamed={"stages[0].quantize.bits": "--bits"})
    assert told == ("--bits: 9 is not allowed; it must be 2 to 8, or 1 on the grid binary",)


@pytest.mark.parametrize("name", library())
def test_every_shipped_recipe_loads_and_survives_being_dumped(name):
    recipe = load_recipe(name)
    assert recipe.stages
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "") == recipe


def test_a_dumped_recipe_keeps_an_explicit_skip_false():
    rules = [{"match": "*", "skip": True}, {"match": "*.q_proj", "skip": False}]
    recipe = parse_recipe(stage(rules=rules), "")
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)), "")
    assert [rule.model_fields_set for rule in again.stages[0].rules] == [{"match", "skip", "overrides"}] * 2


@pytest.mark.parametrize("name", QUANTIZE)
def test_every_methods_sample_stage_is_a_valid_recipe_of_that_method(name):
    recipe = parse_recipe(yaml.safe_load("stages:\n" + QUANTIZE[name].example), "")
    assert type(recipe.stages[0].settings) is QUANTIZE[name]


@pytest.mark.parametrize("name", QUANTIZE)
def test_every_method_and_every_setting_is_described(name):
    settings = QUANTIZE[name]
    assert settings.summary
    assert settings.citation
    assert all(field.description for field in settings.model_fields.values())
    assert settings.model_fields["method"].default == name


def test_keys_given_twice_are_told_with_their_lines():
    with pytest.raises(ProblemsError) as caught:
        read_yaml("seed: 1\nstages:\n- quantize: {bits: 3}\n- quantize:\n    bits: 4\n    bits: 5\nseed: 2\n", "r.yaml")
    assert caught.value.sentences == (
        "r.yaml: stages[1].quantize.bits: is given twice, in lines 5 and 6; keep one",
        "r.yaml: seed: is given twice, in lines 1 and 7; keep one",
    )


@pytest.mark.parametrize("text", ["a: [1\nb: 2", "\tx: 1", "a: !!python/object/apply:os.system [ls]", "a: *b"])
def test_broken_or_unsafe_yaml_is_told_with_its_line(text):
    with pytest.raises(RecipeError, match=r"r\.yaml, line \d"):
        read_yaml(text, "r.yaml")


def test_yaml_that_is_no_mapping_is_refused():
    with pytest.raises(RecipeError, match="must be a mapping"):
        read_yaml("- 1\n- 2\n", "r.yaml")


def test_an_alias_that_holds_itself_ends_in_problems_not_in_recursion():
    data = read_yaml("stages: &a\n- quantize: *a\n", "r.yaml")
    assert problems(data)[0].startswith("stages[0].quantize: ")


@pytest.mark.parametrize(
    ("make", "told"), [("missing", "no such recipe file"), ("folder", "is not a file"), ("bytes", "UTF-8")]
)
def test_a_recipe_file_that_cannot_be_read_is_told_by_name(tmp_path: Path, make, told):
    path = tmp_path / "r.yaml"
    if make == "folder":
        path.mkdir()
    elif make == "bytes":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=told) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value)


def test_a_shipped_recipes_name_with_a_typo_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean gptq-int4-down8"):
        load_recipe("gptq-int4-dwn8")


def test_the_json_schema_describes_the_flat_yaml_with_every_method():
    schema = recipe_schema()
    stages = schema["properties"]["stages"]["items"]["anyOf"]
    kinds = {kind: one for stage in stages for kind, one in stage["properties"].items()}
    assert kinds.keys() == STAGES.keys()
    assert all(len(kinds[kind]["anyOf"]) == len(stage.methods) for kind, stage in STAGES.items())
    methods = kinds["quantize"]["anyOf"]
    assert [one["properties"]["method"]["const"] for one in methods] == list(QUANTIZE)
    assert "order" not in methods[0]["properties"]
    assert methods[1]["properties"]["bits"]["maximum"] == 8
    rule = methods[1]["properties"]["rules"]["items"]["properties"]
    assert {"match", "skip", "bits"} <= set(rule)
    assert not {"method", "layout", "overrides"} & set(rule)


def test_a_setting_named_keep_goes_to_the_method_and_a_stages_folder_is_its_output():
    data = {"stages": [{"prune": {"method": "layers", "keep": [0], "output": "pruned"}}, {"quantize": {}}]}
    first, _ = parse_recipe(data, "r.yaml").stages
    assert first.settings.keep == (0,)
    assert first.output == "pruned"


def test_the_last_stages_output_is_the_runs():
    (told,) = problems({"stages": [{"prune": {"output": "a"}}, {"quantize": {"output": "b"}}]}, "r.yaml")
    assert told.startswith("r.yaml: stages[1].quantize.output: is for stages before the last")
