"""Which modules a pattern names, and what a stage does to a module."""

from __future__ import annotations

import pytest

from modelzip.checkpoints.errors import RecipeError
from modelzip.compressors.quantize.settings import Gptq
from modelzip.recipes.load import parse_recipe
from modelzip.recipes.match import matches, settings_for, unmatched
from modelzip.recipes.schema import QuantizeStage

DOWN = "model.layers.3.mlp.down_proj"
Q = "model.layers.3.self_attn.q_proj"


def stage(**settings) -> QuantizeStage:
    return parse_recipe({"stages": [{"quantize": settings}]}, "").stages[0]


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("*.down_proj", True),
        (DOWN, True),
        ("down_proj", False),
        ("model.layers.?.mlp.*", True),
        (r"re:.*\.layers\.[0-3]\..*", True),
        (r"re:layers", False),
        ("*.DOWN_proj", False),
    ],
)
def test_a_pattern_must_fit_the_whole_name(pattern, fits):
    assert matches(pattern, DOWN) is fits


def test_a_module_without_a_rule_gets_the_stages_own_settings():
    assert settings_for(stage(bits=3), Q) == Gptq(bits=3)


def test_the_last_rule_that_fits_wins_field_by_field():
    one = stage(rules=[{"match": "*.down_proj", "bits": 8, "clip": "none"}, {"match": "*.layers.3.*", "bits": 6}])
    assert settings_for(one, DOWN) == Gptq(bits=6, clip="none")
    assert settings_for(one, Q) == Gptq(bits=6)


def test_ignored_and_skipped_modules_have_no_settings():
    one = stage(ignore=["*.q_proj"], rules=[{"match": "*.down_proj", "skip": True}])
    assert settings_for(one, Q) is None
    assert settings_for(one, DOWN) is None


def test_a_later_rule_can_take_a_skip_back_but_only_by_saying_so():
    skip = {"match": "*", "skip": True}
    assert settings_for(stage(rules=[skip, {"match": "*.q_proj", "skip": False}]), Q) == Gptq()
    assert settings_for(stage(rules=[skip, {"match": "*.q_proj", "bits": 8}]), Q) is None


def test_patterns_that_fit_nothing_are_listed_in_order():
    one = stage(ignore=["lm_head", "*.q_proj"], rules=[{"match": "*.dwn_proj", "bits": 8}, {"match": "*", "bits": 3}])
    assert unmatched(one, [Q, DOWN]) == ["lm_head", "*.dwn_proj"]


def test_rules_that_only_together_contradict_are_told_with_the_module():
    rules = [{"match": "*", "max_damping": 0.05}, {"match": "*.q_proj", "damping": 0.5}]
    with pytest.raises(RecipeError, match=Q):
        settings_for(stage(rules=rules), Q)
