"""What an output folder is called when nobody named it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelzip.recipes.load import parse_recipe
from modelzip.recipes.naming import default_output

RECIPE = parse_recipe({"stages": [{"quantize": {"method": "gptq", "bits": 4}}]}, "")


@pytest.mark.parametrize(
    "model",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "models/SmolLM2-135M-Instruct/",
        "/a/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct-Q4_K_M.gguf",
        "/c/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/12fd25f7",
    ],
)
def test_the_folder_is_named_after_model_method_and_bits(model):
    assert default_output(model, RECIPE) == Path("SmolLM2-135M-Instruct-gptq-4bit")


def test_a_version_number_in_a_models_name_is_kept():
    assert default_output("org/Qwen2.5-0.5B", RECIPE) == Path("Qwen2.5-0.5B-gptq-4bit")


def test_the_current_folder_gives_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert default_output(".", RECIPE) == Path("mine-gptq-4bit")


def test_every_stage_is_in_the_name():
    recipe = parse_recipe({"stages": [{"quantize": {"method": "rtn", "bits": 8}}, "quantize"]}, "")
    assert default_output("m", recipe) == Path("m-rtn-8bit-gptq-4bit")
