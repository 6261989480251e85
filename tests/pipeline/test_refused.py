"""What can't be done as it was asked is refused while it is planned: one sentence, before a weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from modelzip.checkpoints.errors import ModelzipError
from modelzip.pipeline.run import plan_recipe
from modelzip.recipes.load import parse_recipe, recipe_data

LOGITS = {"method": "logits", "data": "train.tsv", "max_steps": 1}


@pytest.fixture
def refused(recipe_of, tmp_path, monkeypatch) -> Callable[..., str]:
    """refused(model, stage, ...) -> the one sentence that is told of a recipe with these stages."""
    monkeypatch.chdir(tmp_path)

    def told(model: Path, *stages: dict[str, Any], **rest: Any) -> str:
        with pytest.raises(ModelzipError) as error:
            plan_recipe(recipe_of(model, *stages, **rest), output=Path("out"))
        (line,) = str(error.value).splitlines()
        return line

    return told


@pytest.fixture
def classifier(save_classifier, write_labelled, tmp_path) -> Path:
    """A pico classifier with 64 positions, and train.tsv beside it."""
    write_labelled(tmp_path / "train.tsv", 8)
    return save_classifier(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"model_type": "gpt2"}, "student_config names model_type, which is no size of a model: leave it out"),
        ({"architectures": "x"}, "student_config names architectures, which is no size of a model"),
        ({"quantization_config": 1}, "student_config names quantization_config, which is no size of a model"),
        ({"auto_map": "x"}, "student_config names auto_map, which is no size of a model"),
        ({"depth": 1}, "student_config names depth, which config.json of teacher hasn't got"),
        ({"hidden_size": 0}, "with student_config's hidden_size=0, "),
        ({"hidden_size": "foo"}, "Field 'hidden_size' expected int, got str (value: 'foo'): give other sizes"),
        ({"num_hidden_layers": 0}, "with student_config's num_hidden_layers=0, "),
        ({"intermediate_size": 0}, "nothing is left of bert.encoder.layer.0.intermediate.dense.weight: give larger"),
        ({"vocab_size": 10}, "vocab_size is 10, and the tokenizer of teacher has 92 tokens: give at least as many"),
    ],
)
def test_a_student_that_no_config_can_say_is_refused(sizes, sentence, classifier, refused):
    assert sentence in refused(Path("teacher"), {"distill": {**LOGITS, "student_config": sizes}})


def test_a_student_predicts_the_tokens_that_its_teacher_predicts(speaking, refused, text_file):
    stage = {"distill": {**LOGITS, "data": str(text_file), "student_config": {"vocab_size": 200}}}
    assert "vocab_size is 200, and " in (told := refused(speaking("llama"), stage))
    assert "predicts 74 tokens: leave it out" in told


def test_a_student_of_fewer_positions_is_refused_where_longer_windows_measure_it(classifier, refused, recipe_of):
    stage = {"distill": {**LOGITS, "student_config": {"max_position_embeddings": 8}}}
    told = refused(classifier, stage, evaluate={"enabled": True})
    assert told.startswith("distill: the student takes at most 8 tokens, and windows of 16 measure it: set calibration")
    recipe = recipe_of(classifier, stage, evaluate={"enabled": True, "data": "train.tsv"})
    assert plan_recipe(recipe, output=Path("out"))  # whose texts are cut


def test_a_target_that_the_model_keeps_to_already_is_refused(saved, refused):
    told = refused(saved("llama"), {"factorize": {"method": "svd", "target_size": "100GB"}})
    assert told.startswith(
        "factorize: the model weighs 0.09 MB already, and target_size is 100,000.00 MB: ask for less"
    )


def test_an_encoder_decoder_whose_texts_have_no_end_is_no_classifier(
    speaking, write_labelled, recipe_of, refused, tmp_path
):
    model = tmp_path / "t5"
    shutil.copytree(speaking("t5"), model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, pad_token="<pad>", eos_token="<s>")
    tokenizer.save_pretrained(model)
    stage = {"distill": {"method": "labels", "data": str(write_labelled(tmp_path / "train.tsv", 8)), "max_steps": 1}}
    told = refused(model, stage)
    assert told.startswith("distill: a T5ForSequenceClassification reads a text by its end, and the tokenizer of ")
    assert "appends no end-of-sequence token: let the post_processor in its tokenizer.json append one" in told
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <s>", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(model)
    assert plan_recipe(recipe_of(model, stage), output=Path("out"))


@pytest.mark.parametrize(
    ("cache", "where"),
    [("teacher", "the model"), ("teacher/logits", "the model"), ("out/logits", "the output"), ("out", "the output")],
)
def test_a_cache_lies_in_no_models_folder(cache, where, classifier, refused):
    told = refused(classifier, {"distill": {**LOGITS, "layers": [0], "cache": cache}})
    assert told.startswith(f"distill: cache: {cache} lies in the folder of {where} (")
    assert told.endswith("): name another folder.")


@pytest.mark.parametrize("weight", [-1, 0])
def test_a_signal_has_a_weight_above_zero(weight, classifier, refused):
    told = refused(classifier, {"distill": {**LOGITS, "signals": {"hidden": weight}}})
    assert (
        f'signals: {{"hidden": {weight}}} is not allowed; it must be names of signals, each with a weight above 0'
        in told
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"drop": [1], "criterion": "greedy"}, "criterion chooses the layers that go with count: give count, or leave"),
        ({"drop": [1], "criterion": "similarity"}, "criterion chooses the layers that go with count"),
        ({"count": 1, "loss": "self"}, "loss is what the criterion greedy goes by: set that, or leave loss out"),
        (
            {"drop": [1], "stack": "encoder"},
            "it has one stack of layers, model.layers, and no encoder: leave stack out",
        ),
    ],
)
def test_settings_of_layers_without_effect_are_refused(settings, sentence, saved, refused):
    assert sentence in refused(saved("llama"), {"prune": {"method": "layers", **settings}})


@pytest.mark.parametrize("settings", [{"drop": [1]}, {"count": 1}, {"count": 1, "criterion": "greedy", "loss": "self"}])
def test_a_choice_of_layers_with_every_default_written_out_is_read_again(settings, saved, recipe_of):
    recipe = recipe_of(saved("llama"), {"prune": {"method": "layers", **settings}})
    assert parse_recipe(recipe_data(recipe), "test") == recipe
