"""What accelerate was told of sharing out the weights, checked before anything runs."""

from __future__ import annotations

import pytest

from modelzip.compressors.distill.settings import DistillSettings, Labels
from modelzip.compressors.prune.settings_training import GradualMagnitude, Lottery, Movement
from modelzip.pipeline.train.fit import Problems
from modelzip.pipeline.train.spread import check_spread

FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO_2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO_3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}


@pytest.fixture
def told(monkeypatch):
    """told(settings, environment) -> what is said of them, where deepspeed is installed or not."""

    def check(settings: DistillSettings, environment: dict[str, str], *, installed: bool = True) -> list[str]:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name if installed else None)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        problems = Problems("distill")
        check_spread(settings, problems)
        return problems.sentences

    return check


@pytest.mark.parametrize("settings", [GradualMagnitude, Movement, Lottery])
@pytest.mark.parametrize(("environment", "name"), [(FSDP, "FSDP"), (ZERO_3, "DeepSpeed's ZeRO 3")])
def test_methods_that_compare_whole_matrices_are_refused_where_they_are_spread(told, settings, environment, name):
    assert told(settings(), environment) == [
        f"distill: {settings().method} compares the weights of whole matrices, which {name} spreads over the "
        "processes: launch without it."
    ]


@pytest.mark.parametrize("environment", [{}, ZERO_2])
def test_they_are_taken_where_each_process_has_all_weights(told, environment):
    assert told(Movement(), environment) == []


@pytest.mark.parametrize("environment", [{}, FSDP, ZERO_2, ZERO_3])
def test_other_trainings_take_any(told, environment):
    assert told(Labels(), environment) == []


def test_zero_3_that_would_not_gather_the_weights_is_refused(told):
    environment = ZERO_3 | {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"}
    assert told(Labels(), environment) == [
        "distill: DeepSpeed's ZeRO 3 was told not to gather the weights at the end: give --zero3_save_16bit_model true "
        "to accelerate launch, or stage3_gather_16bit_weights_on_model_save in DeepSpeed's own file."
    ]


def test_a_file_of_deepspeeds_that_is_missing_is_named(told):
    sentences = told(Labels(), ZERO_2 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "missing.json"})
    assert len(sentences) == 1
    assert sentences[0].startswith("distill: accelerate can't use what it was told of DeepSpeed: ")
    assert "missing.json" in sentences[0]


def test_deepspeed_that_isnt_installed_is_told(told):
    assert told(Labels(), ZERO_2, installed=False) == [
        "distill: accelerate was told to use DeepSpeed, which isn't installed: install the package deepspeed."
    ]
