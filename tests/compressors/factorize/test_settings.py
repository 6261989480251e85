"""What the settings take, how one choice of size gives way to another, and the ratio for a target size."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from modelzip.checkpoints.errors import ProblemsError
from modelzip.compressors import FACTORIZE
from modelzip.compressors.factorize.budget import ratio_for_budget
from modelzip.compressors.factorize.settings import Kronecker, Share, Svd, SvdLlm
from modelzip.compressors.factorize.spectrum import rank_for_ratio
from modelzip.recipes.load import dump_recipe, parse_recipe
from modelzip.recipes.match import settings_for


def stage(**settings):
    return parse_recipe({"stages": [{"factorize": settings}]}, "").stages[0]


def test_without_a_word_about_size_four_fifths_are_kept():
    assert Svd().ratio == 0.8
    assert Svd(ratio=None).ratio == 0.8


@pytest.mark.parametrize("choice", [{"energy": 0.9}, {"rank": 8}, {"target_size": "60MB"}])
def test_any_other_choice_takes_the_ratios_place(choice):
    settings = Svd(**choice)
    assert settings.ratio is None
    assert Svd.model_validate(settings.model_dump()) == settings


def test_two_choices_are_told_in_one_sentence():
    with pytest.raises(ProblemsError) as caught:
        stage(method="svd", ratio=0.5, rank=8)
    assert caught.value.sentences == (
        "stages[0].factorize: ratio and rank each say how large the factors are; keep one of them",
    )


def test_a_rules_choice_takes_the_place_of_the_stages_and_a_later_rules_of_an_earlier_ones():
    rules = [{"match": "*.down_proj", "rank": 64}, {"match": "*.3.down_proj", "energy": 0.9}]
    one = stage(method="svd-llm", ratio=0.5, damping=0.1, rules=rules)
    assert settings_for(one, "a.q_proj") == SvdLlm(ratio=0.5, damping=0.1)
    assert settings_for(one, "a.2.down_proj") == SvdLlm(rank=64, damping=0.1)
    assert settings_for(one, "a.3.down_proj") == SvdLlm(energy=0.9, damping=0.1)


def test_a_rule_about_something_else_leaves_the_size_alone():
    one = stage(method="svd-llm", rank=9, rules=[{"match": "*", "damping": 0.1}])
    assert settings_for(one, "a") == SvdLlm(rank=9, damping=0.1)


def test_a_rule_cannot_give_one_module_a_target_size():
    with pytest.raises(ProblemsError, match="target_size: holds for the whole stage"):
        stage(method="svd", rules=[{"match": "*", "target_size": "3MB"}])


@pytest.mark.parametrize(("text", "size"), [("60MB", 60_000_000), ("1.5 GB", 1_500_000_000), ("700KB", 700_000)])
def test_sizes_are_read_in_decimal_units(text, size):
    assert Svd(target_size=text).target_bytes == size


@pytest.mark.parametrize("wrong", [{"target_size": "60"}, {"ratio": 1}, {"energy": 0}, {"rank": 0}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        Svd(**wrong)


def test_a_wrong_size_is_told_with_an_example():
    with pytest.raises(ProblemsError, match="it must be a size such as 60MB"):
        stage(method="svd", target_size="60 apples")


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        (Svd(), "svd-80"),
        (SvdLlm(energy=0.95), "svd-llm-energy95"),
        (Kronecker(rank=4), "kronecker-rank4"),
        (Svd(target_size="60 MB"), "svd-60MB"),
        (Share(scope="attention", groups=3), "share-attention-3"),
    ],
)
def test_labels_say_method_and_size(settings, label):
    assert settings.label == label


@pytest.mark.parametrize("name", FACTORIZE)
def test_every_methods_sample_stage_is_a_valid_recipe_of_that_method(name):
    recipe = parse_recipe(yaml.safe_load("stages:\n" + FACTORIZE[name].example), "")
    assert type(recipe.stages[0].settings) is FACTORIZE[name]
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "") == recipe


@pytest.mark.parametrize("name", FACTORIZE)
def test_every_method_and_every_setting_is_described(name):
    settings = FACTORIZE[name]
    assert settings.summary
    assert settings.citation
    assert all(field.description for field in settings.model_fields.values())
    assert settings.model_fields["method"].default == name


def model_bytes(ratio: float) -> int:
    matrices = [(576, 1536), (1536, 576), (576, 576), (192, 576)] * 30
    return 1_000_000 + sum(2 * rank_for_ratio(ratio, shape) * sum(shape) for shape in matrices)


@pytest.mark.parametrize("budget", [20_000_000, 60_000_000, 100_000_000])
def test_the_ratio_for_a_budget_is_the_largest_that_fits(budget):
    ratio = ratio_for_budget(model_bytes, budget)
    assert model_bytes(ratio) <= budget < model_bytes(ratio + 2e-6) + 30 * 2 * (576 + 1536)
    assert model_bytes(min(1.0, ratio + 0.01)) > budget


def test_a_budget_below_the_least_gives_none_and_one_above_the_most_nearly_everything():
    assert ratio_for_budget(model_bytes, 999_999) is None
    assert ratio_for_budget(model_bytes, 10**10) == pytest.approx(1, abs=1e-5)
    assert ratio_for_budget(model_bytes, 10**10) < 1
