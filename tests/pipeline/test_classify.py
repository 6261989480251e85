"""Classifiers measured on labelled examples: what each is fed, and that streaming changes nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from modelzip.checkpoints.errors import CheckpointError, ModelzipError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline import feeding
from modelzip.pipeline.bench import Bench
from modelzip.pipeline.classify import classification_section
from modelzip.pipeline.data_kind import kind_of
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.pipeline.labelled import read_examples
from modelzip.pipeline.opened import open_by_transformers
from modelzip.recipes.schema import Evaluation

WORDS = [f"w{place}" for place in range(92)]
CPU = torch.device("cpu")


class Silent:
    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total > 0

    def say(self, line: str) -> None:
        pass


@pytest.fixture(scope="session")
def classifier(models: Any) -> Callable[..., Path]:
    """classifier(folder, words=WORDS, family=..., **changes of the config) -> a pico model with a word tokenizer."""

    def make(folder: Path, words: list[str] = WORDS, family: str = "bert-classifier", **changes: Any) -> Path:
        models.FAMILIES[family].build(**changes).save_pretrained(folder)
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        vocabulary = {word: place for place, word in enumerate([*special, *words])}
        raw = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
        raw.pre_tokenizer = WhitespaceSplit()
        raw.post_processor = processors.TemplateProcessing(
            **{"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"},
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
        PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def model(classifier: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pairs of 1 to 20 words each with labels."""
    draw = random.Random(3)
    file = tmp_path_factory.mktemp("data") / "dev.jsonl"
    sides = [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(120)]
    rows = (
        {"premise": a, "hypothesis": b, "label": draw.randint(0, 1)}
        for a, b in zip(sides[::2], sides[1::2], strict=True)
    )
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def section(model: Path, against: Path | None, **evaluation: Any) -> Mapping[str, Any]:
    one, other = Checkpoint.open(str(model)), None if against is None else Checkpoint.open(str(against))
    with torch.no_grad():
        return classification_section(one, other, Evaluation(**evaluation), Bench("auto", CPU, Silent()))


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_accuracy_is_that_of_transformers_itself_however_the_batches_are_grouped(
    model: Path, data: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "group_bytes", lambda streamed: limit)
    network = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    right = 0
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        with torch.no_grad():
            logits = network(**tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")).logits
        right += int(logits.argmax()) == row["label"]
    found = section(model, model, data=str(data), batch_size=7)
    assert 0 < right < len(rows)
    assert found["accuracy"]["compressed"] == found["accuracy"]["original"] == right / len(rows)
    assert (found["accuracy"]["lost"], found["accuracy"]["won"]) == (0, 0)
    assert found["kl"] == 0
    assert found["protocol"]["examples"] == len(rows)


def test_models_with_different_vocabularies_are_each_fed_by_their_own_tokenizer(
    model: Path, data: Path, classifier: Callable[..., Path], tmp_path: Path
) -> None:
    other = classifier(tmp_path / "other", words=WORDS[::-1])
    network = AutoModelForSequenceClassification.from_pretrained(model)
    permuted = AutoModelForSequenceClassification.from_pretrained(other, vocab_size=96)
    with torch.no_grad():
        table = network.get_input_embeddings().weight
        permuted.load_state_dict(network.state_dict())
        permuted.get_input_embeddings().weight.copy_(torch.cat([table[:4], table[4:].flip(0)]))
    permuted.save_pretrained(other)
    found = section(other, model, data=str(data))
    assert found["kl"] < 1e-12  # measured: 0.0
    assert found["top1_agreement"] == 1
    shorter = classifier(tmp_path / "shorter", words=WORDS[:50], vocab_size=54)
    report = evaluate_models(
        str(shorter),
        **{"against": str(model), "evaluation": Evaluation(data=str(data)), "revision": None},
        **{"device": "cpu", "dtype": "auto", "progress": Silent()},
    )
    assert report["evaluation"]["kl"] > 0


def test_classes_in_another_order_are_compared_by_their_names(
    model: Path, data: Path, classifier: Callable[..., Path], tmp_path: Path
) -> None:
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    one = classifier(tmp_path / "one", **names)
    other = classifier(tmp_path / "other", id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    turned = AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        for parameter in turned.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    turned.save_pretrained(other)
    found = section(other, one, data=str(data))
    assert found["top1_agreement"] == 1
    assert found["kl"] < 1e-12


def test_examples_that_are_too_long_are_cut_and_counted(model: Path, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    long = sum(len(f"{row['premise']} {row['hypothesis']}".split()) + 3 > 16 for row in rows)
    assert section(model, None, data=str(data), seq_len=16)["protocol"]["cut"] == long
    assert section(model, None, data=str(data))["protocol"] | {"sha256": ""} == {
        **{"source": str(data), "sha256": "", "examples": 60, "cut": 0, "seq_len": 64, "dtype": "float32"}
    }


def test_the_streamed_and_the_whole_model_give_the_same_logits(model: Path, data: Path) -> None:
    examples = read_examples(str(data))
    checkpoint = Checkpoint.open(str(model))
    found = []
    with torch.no_grad():
        whole = open_by_transformers(checkpoint, CPU, dtype=torch.float32)
        for network in (feeding.open_classifier(checkpoint, torch.float32, CPU), whole):
            fed = feeding.feed(checkpoint, network, examples, seq_len=64, batch_size=8)
            found.append(feeding.class_logits(fed, lambda more: None))
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-6  # measured: 1.4e-7


def test_a_model_without_a_padding_token_takes_one_example_at_a_time(
    data: Path, classifier: Callable[..., Path], tmp_path: Path
) -> None:
    folder = classifier(tmp_path / "model", family="distilbert", max_position_embeddings=64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padded = section(folder, None, data=str(data))["accuracy"]
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert section(folder, None, data=str(data))["accuracy"] == padded


def test_times_are_taken_of_both_models_if_asked_for(model: Path, data: Path) -> None:
    found = section(model, model, data=str(data), latency=True, batch_size=4)["latency"]
    assert (found["single"]["batch_size"], found["batched"]["batch_size"]) == (1, 4)
    assert all(found[way]["original_ms"] > 0 and found[way]["speedup"] > 0 for way in ("single", "batched"))
    alone = found["text"]["compressed"]
    assert 0 < alone["p50_ms"] <= alone["p90_ms"] <= alone["p99_ms"]
    assert [row["batch_size"] for row in found["throughput"]] == [1, 4, 16]  # as many as are asked for by default
    first = found["throughput"][0]  # the very repetitions of `single`
    assert first["original"] == pytest.approx(1e3 / found["single"]["original_ms"])
    with pytest.raises(RecipeError, match="compares two classifiers"):
        section(model, None, data=str(data), latency=True)


def test_classes_are_taken_where_the_model_has_them_and_the_data_have_labels(data: Path, tmp_path: Path) -> None:
    config = {"architectures": ["BertForSequenceClassification"]}
    text = tmp_path / "plain.jsonl"
    text.write_text('{"text": "a"}\n', encoding="utf-8")
    assert kind_of(Evaluation(data=str(data)), config) == "classification"
    assert kind_of(Evaluation(data=str(data)), {"architectures": ["BertModel"]}) == "similarity"
    assert kind_of(Evaluation(data=str(data)), {"architectures": ["BertForMaskedLM"]}) == "tokens"
    assert kind_of(Evaluation(data=str(text)), config) == "tokens"
    assert kind_of(Evaluation(data=str(data), task="tokens"), config) == "tokens"
    with pytest.raises(RecipeError, match=r"the model is BertModel, which has no classes"):
        kind_of(Evaluation(data=str(data), task="classification"), {"architectures": ["BertModel"]})


def test_a_model_of_several_labels_a_text_and_one_with_other_classes_are_refused(
    model: Path, data: Path, classifier: Callable[..., Path], tmp_path: Path
) -> None:
    many = classifier(tmp_path / "many", num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(CheckpointError, match="predicts several labels or numbers at once"):
        section(many, None, data=str(data))
    with pytest.raises(ModelzipError, match=r"has 3 classes and .* has 2"):
        section(model, classifier(tmp_path / "three", num_labels=3), data=str(data))


@pytest.mark.parametrize(
    ("condition", "words"),
    [("perplexity > 3", "labelled examples don't give"), ("speedup < 2", "--latency")],
)
def test_a_condition_on_what_is_not_measured_is_refused_at_once(
    model: Path, data: Path, condition: str, words: str
) -> None:
    evaluation = Evaluation(data=str(data), fail_if=(condition,))
    with pytest.raises(RecipeError, match=words):
        evaluate_models(
            str(model),
            **{"against": str(model), "evaluation": evaluation, "revision": None},
            **{"device": "cpu", "dtype": "auto", "progress": Silent()},
        )


@torch.no_grad()
def test_a_model_that_predicts_a_number_is_measured_by_correlations(
    classifier: Callable[..., Path], tmp_path: Path
) -> None:
    original = classifier(tmp_path / "number", num_labels=1, problem_type="regression")
    draw = random.Random(4)
    rows = [{"text": " ".join(draw.choices(WORDS, k=6)), "label": draw.random()} for _ in range(40)]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = section(original, original, data=str(tmp_path / "dev.jsonl"))
    network, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(original).eval(),
        AutoTokenizer.from_pretrained(original),
    )
    said = torch.cat([network(**tokenizer(row["text"], return_tensors="pt")).logits[0] for row in rows])
    wanted = float(torch.corrcoef(torch.stack([said, torch.tensor([row["label"] for row in rows])]))[0, 1])
    assert found["pearson"]["compressed"] == pytest.approx(wanted, abs=1e-5)
    assert found["pearson"]["compressed"] == found["pearson"]["original"]
    assert found["spearman"]["low"] < found["spearman"]["compressed"] < found["spearman"]["high"]
    assert found["kl"] is None
    assert "accuracy" not in found


def test_a_number_is_not_compared_with_classes(classifier: Callable[..., Path], model: Path, tmp_path: Path) -> None:
    number = classifier(tmp_path / "number", num_labels=1)
    (tmp_path / "dev.jsonl").write_text(json.dumps({"text": "w1", "label": 0.5}), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"has 2 classes and .* predicts a number: name the original"):
        section(number, model, data=str(tmp_path / "dev.jsonl"))
