"""Data that can't be used are told while a run is planned, in the words of those who can mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelzip.checkpoints.errors import ModelzipError
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.pipeline.run import plan_recipe
from modelzip.recipes.load import parse_recipe
from modelzip.recipes.schema import Evaluation

ROWS = "sentence\tlabel\n" + "good film\t1\nbad film\t0\n" * 10
PRUNED = {"prune": {"method": "layers", "drop": [1]}}


@pytest.fixture(scope="module")
def folder(save_classifier: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers of two and of three classes."""
    made = tmp_path_factory.mktemp("classifiers")
    save_classifier(made / "two")
    save_classifier(made / "three", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    return made


def planned(model: Path, stage: dict[str, Any], **sections: Any) -> str:
    """What is said against a run of one stage, of which nothing but the plan is made."""
    recipe = parse_recipe({"model": str(model), "stages": [stage], **sections}, "test")
    with pytest.raises(ModelzipError) as caught:
        plan_recipe(recipe, output=model.parent / "out")
    return str(caught.value)


EVALUATION = {
    "a class that isn't there": (ROWS + "a film\t5\n", "line 22: the label '5' in the column 'label' is none of the 2"),
    "a word that is no class": (ROWS + "a film\tyes\n", "line 22: the label 'yes'"),
    "a ragged row": (ROWS + "a film\n", "line 22 has 1 columns, but its first line names 2"),
    "a header alone": ("sentence\tlabel\n", "holds no examples below its first line"),
    "no column of labels": ("sentence\tmark\na\t0\n", "it has sentence, mark: name one by evaluate.label."),
    "no column of texts": ("body\tlabel\na\t0\n", "name one by evaluate.text, a second text by evaluate.pair."),
}


@pytest.mark.parametrize(("content", "told"), EVALUATION.values(), ids=EVALUATION)
def test_examples_to_evaluate_on_are_read_to_their_end_before_anything_is_done(folder, tmp_path, content, told):
    (tmp_path / "dev.tsv").write_text(content)
    assert told in planned(folder / "two", PRUNED, evaluate={"data": str(tmp_path / "dev.tsv")})


def test_times_without_a_classifier_to_compare_with_are_refused_before_anything_is_done(speaking, tmp_path):
    (tmp_path / "dev.tsv").write_text(ROWS)
    data = str(tmp_path / "dev.tsv")
    stage = {"distill": {"method": "labels", "data": data}}
    assert "no original with classes" in planned(speaking("bert"), stage, evaluate={"data": data, "latency": True})


TRAINING = {
    "no column of texts": (
        *("dev.tsv", "body\tlabel\na\t0\n", {}),
        "it has body, label: name one by text_column, a second text by pair_column.",
    ),
    "no such column": ("dev.tsv", ROWS, {"label_column": "mark"}, "it has sentence, label: name one by label_column."),
    "no such field": (
        "dev.jsonl",
        '{"a": "b"}\n',
        {"task": "language-modelling"},
        "it has a: name one by text_column.",
    ),
    "a table with labels as running text": (
        *("dev.tsv", ROWS, {"task": "language-modelling"}),
        "is a table, and running text comes from .txt, .jsonl or .parquet files: give such a file.",
    ),
}


@pytest.mark.parametrize(("name", "content", "settings", "told"), TRAINING.values(), ids=TRAINING)
def test_data_to_learn_from_are_told_in_the_words_of_a_training(folder, tmp_path, name, content, settings, told):
    (tmp_path / name).write_text(content)
    stage = {"method": "labels", "data": str(tmp_path / name), **settings}
    assert told in planned(folder / "two", {"distill": stage})


def test_text_too_short_to_learn_from_names_the_length_of_a_training(speaking, train_stage, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    stage = {"method": "labels", "data": str(tmp_path / "short.txt"), "max_length": 16}
    with pytest.raises(ModelzipError, match=r"enough for 0 windows of 16; 1 were .* or lower max_length\.$"):
        train_stage(speaking("llama"), tmp_path / "out", "distill", stage)


def test_a_corpus_without_the_field_names_the_setting_of_the_corpus(folder, tmp_path):
    (tmp_path / "corpus.tsv").write_text(ROWS)
    stage = {"prune": {"method": "vocabulary", "corpus": str(tmp_path / "corpus.tsv")}}
    assert "it has sentence, label: name one by corpus_field" in planned(folder / "two", stage)


EVALUATE = {
    "no column of labels": ("two", None, "dev.tsv", "sentence\tmark\na\t0\n", "name one by --label."),
    "a class that isn't there": ("two", "two", "dev.tsv", ROWS + "a film\t5\n", "line 22: the label '5'"),
    "an original of other classes": ("two", "three", "dev.tsv", ROWS, "/three has 3 classes and "),
    "text without labels": (
        *("two", None, "text.txt", "abc"),
        "/two is a BertForSequenceClassification, of which text alone measures nothing: name labelled examples with "
        "--data, or an original to compare with by --against.",
    ),
    "an encoder alone": ("bert", None, "text.txt", "abc", "measures nothing: name an original to compare with by"),
    "an original without classes": (
        *("two", "bert", "dev.tsv", ROWS),
        "is a BertModel, which has no classes to compare with: name the classifier that",
    ),
    "too little text": ("llama", None, "short.txt", "abc", "give more text, or lower --seq-len."),
    "no such field": ("llama", None, "rows.jsonl", '{"a": "b"}\n', "it has a: name one by --field."),
}


@pytest.mark.parametrize(("model", "against", "name", "content", "told"), EVALUATE.values(), ids=EVALUATE)
def test_what_can_not_be_measured_is_told_before_a_weight_is_read(
    folder, speaking, progress, tmp_path, monkeypatch, model, against, name, content, told
):
    monkeypatch.setattr("modelzip.checkpoints.index.Checkpoint.read", lambda *_: pytest.fail("read weights"))
    (tmp_path / name).write_text(content)
    model, against = (
        None if one is None else str(folder / one if one in ("two", "three") else speaking(one))
        for one in (model, against)
    )
    with pytest.raises(ModelzipError) as caught:
        evaluate_models(
            model,
            against=against,
            evaluation=Evaluation(data=str(tmp_path / name), seq_len=16),
            **{"revision": None, "device": "cpu", "dtype": "auto", "progress": progress},
        )
    assert told in str(caught.value)


def test_text_too_short_to_evaluate_on_names_the_recipes_key(speaking, compress, tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    section = {"data": str(tmp_path / "short.txt"), "seq_len": 16}
    with pytest.raises(ModelzipError, match=r"give more text, or lower evaluate\.seq_len\.$"):
        compress(speaking("llama"), tmp_path / "out", {"method": "rtn"}, evaluate=section)


def test_a_model_without_a_tokenizer_is_not_told_of_calibration(saved, progress, tmp_path):
    (tmp_path / "text.txt").write_text("abc")
    with pytest.raises(ModelzipError, match=r"add the tokenizer files\.$"):
        evaluate_models(
            str(saved("llama")),
            evaluation=Evaluation(data=str(tmp_path / "text.txt"), seq_len=16),
            **{"against": None, "revision": None, "device": "cpu", "dtype": "auto", "progress": progress},
        )
