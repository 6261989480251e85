"""Students of other kinds than their teacher, text and logits from a teacher, and labels alone beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import modelzip.weights  # noqa: F401  # teaches transformers our own models
from modelzip.checkpoints.errors import CheckpointError, ProblemsError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.report import report_markdown, validate
from modelzip.pipeline.evaluate import evaluate_models
from modelzip.pipeline.measure import reopen
from modelzip.pipeline.teachertext import teacher_texts
from modelzip.pipeline.train import lessons, opening
from modelzip.pipeline.training import training_section
from modelzip.recipes.load import parse_recipe
from modelzip.recipes.schema import Evaluation

CPU = torch.device("cpu")
QUICK = {"max_steps": 12, "train_batch_size": 32, "learning_rate": 5e-3, "log_every": 4, "warmup": 0.0}
SMALL = {"embedding_size": 8, "hidden_size": 8, "inner_size": 8}


@pytest.fixture(scope="module")
def tables(write_labelled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv (256 rows), dev.tsv (96) and texts.tsv, which has no labels."""
    folder = tmp_path_factory.mktemp("tables")
    write_labelled(folder / "train.tsv", 256, seed=1)
    write_labelled(folder / "dev.tsv", 96, seed=2)
    rows = (folder / "train.tsv").read_text().splitlines()
    (folder / "texts.tsv").write_text("\n".join(row.split("\t")[0] for row in rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def distil(train_stage) -> Callable[..., dict[str, Any]]:
    """distil(model, output, stage, ...) -> the record; what was written is as it was planned."""
    return lambda model, output, stage, **options: train_stage(model, output, "distill", stage, **options)


@pytest.fixture(scope="module")
def teacher(distil, save_classifier, tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three layers that knows the words."""
    folder = tmp_path_factory.mktemp("teacher")
    stage = {**QUICK, "data": str(tables / "train.tsv"), "max_steps": 60, "learning_rate": 3e-3}
    distil(save_classifier(folder / "base", layers=3), folder / "taught", stage)
    return folder / "taught"


@pytest.fixture(scope="module")
def lstm(distil, teacher, tables, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("lstm") / "out"
    stage = {**QUICK, **SMALL, "method": "bilstm", "data": str(tables / "texts.tsv"), "max_steps": 80}
    return folder, distil(teacher, folder, {**stage, "learning_rate": 0.02})


@pytest.fixture(scope="module")
def exits(distil, teacher, tables, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exits") / "out"
    stage = {**QUICK, "method": "fastbert", "data": str(tables / "texts.tsv"), "exit_size": 16, "max_steps": 40}
    return folder, distil(teacher, folder, stage)


def logits_of(folder: Path, tables: Path, **more: Any) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [line.split("\t")[0] for line in (tables / "dev.tsv").read_text().splitlines()[1:]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt"), **more).logits


def sentences(distil: Any, model: Path, stage: dict[str, Any]) -> list[str]:
    with pytest.raises(ProblemsError) as told:
        distil(model, Path("never"), stage)
    return list(told.value.sentences)


def test_an_lstm_says_what_its_teacher_says_without_labels(lstm, teacher, tables):
    mine, theirs = logits_of(lstm[0], tables), logits_of(teacher, tables)
    assert (mine.argmax(-1) == theirs.argmax(-1)).double().mean() >= 0.85  # measured: 0.94
    assert lstm[1]["curve"][-1]["loss"] < 0.25 * lstm[1]["curve"][0]["loss"]  # measured: 0.12


def test_an_lstms_first_loss_is_the_squared_distance_of_logits(distil, teacher, tables, tmp_path):
    """Before a step is taken, the student is what the seed and the teacher's embedding make of it."""
    stage = {**SMALL, "method": "bilstm", "data": str(tables / "dev.tsv"), "dropout": 0.0, "max_steps": 1}
    record = distil(teacher, tmp_path / "out", {**stage, "train_batch_size": 96, "learning_rate": 1e-9})
    mine, theirs = logits_of(tmp_path / "out", tables), logits_of(teacher, tables)
    wanted = float((mine - theirs).square().sum(-1).mean())
    assert record["curve"][0]["loss"] == pytest.approx(wanted, rel=1e-4)  # measured: 1e-7


@pytest.mark.parametrize("kind", ["lstm", "exits"])
def test_a_student_of_our_own_kind_is_reopened_in_a_fresh_process(kind, request):
    verification, fallbacks = reopen(Checkpoint.open(str(request.getfixturevalue(kind)[0])), seed=0, device=CPU)
    assert not fallbacks
    assert verification["max_logit_difference"] < 1e-5  # measured: 1.2e-7


def test_an_lstm_is_evaluated_against_its_teacher_on_labels_and_on_tokens(lstm, teacher, tables, progress):
    more = {"revision": None, "device": "cpu", "dtype": "auto", "progress": progress}
    labelled = Evaluation(data=str(tables / "dev.tsv"))
    report = evaluate_models(str(lstm[0]), against=str(teacher), evaluation=labelled, **more)
    assert report["evaluation"]["accuracy"]["compressed"] >= 0.9  # measured: 0.99
    assert report["size"]["parameters"] == sum(one.numel() for one in load_file(lstm[0] / "model.safetensors").values())
    (tables / "plain.txt").write_text("good film . " * 40)
    tokens = Evaluation(data=str(tables / "plain.txt"), seq_len=16, windows=2)
    report = evaluate_models(str(lstm[0]), against=str(teacher), evaluation=tokens, **more)
    assert report["evaluation"]["kl"] is not None


@pytest.mark.parametrize("kind", ["lstm", "exits"])
def test_later_stages_refuse_students_of_our_own_kinds(kind, request, progress):
    from modelzip.pipeline.run import plan_recipe

    folder = request.getfixturevalue(kind)[0]
    recipe = parse_recipe({"model": str(folder), "stages": [{"quantize": {"method": "rtn"}}]}, "test")
    with pytest.raises(CheckpointError, match="no other method takes any further"):
        plan_recipe(recipe, output=folder.with_name("never"))


@pytest.mark.parametrize("method", ["bilstm", "fastbert"])
def test_a_killed_run_ends_in_the_same_bytes(method, distil, teacher, tables, killed_at, tmp_path):
    stage = {**QUICK, "method": method, "data": str(tables / "train.tsv"), "save_every": 2, "max_steps": 6}
    stage |= SMALL if method == "bilstm" else {}
    whole = distil(teacher, tmp_path / "whole", stage)
    with killed_at("train", 5) as progress:
        distil(teacher, tmp_path / "killed", stage, progress=progress)
    assert distil(teacher, tmp_path / "killed", stage, resume=True) == whole
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert read[0] == read[1]


def test_what_cant_become_an_lstm_is_told(distil, save_classifier, speaking, tables, tmp_path):
    narrow = save_classifier(tmp_path / "narrow", hidden_size=16)
    told = sentences(distil, narrow, {"method": "bilstm", "data": str(tables / "train.tsv")})
    assert told == [
        "distill: an embedding of 50 can't start from the teacher's of 16: make embedding_size smaller, or take start: "
        "random."
    ]
    told = sentences(distil, speaking("bert"), {"method": "bilstm", "data": str(tables / "train.tsv")})
    assert "has no logits for a whole text: train it with method labels first" in told[0]


def test_exits_learn_the_last_classifier_which_stays_bit_for_bit(exits, teacher, tables):
    folder, record = exits
    assert torch.equal(logits_of(folder, tables, speed=0.0), logits_of(teacher, tables))
    mine, theirs = logits_of(folder, tables, speed=1.0), logits_of(teacher, tables)
    assert (mine.argmax(-1) == theirs.argmax(-1)).double().mean() >= 0.9  # measured: 0.97
    assert record["curve"][-1]["loss"] < 0.5 * record["curve"][0]["loss"]  # measured: 0.04


def test_thresholds_trade_layers_for_accuracy_as_running_the_model_does(exits, teacher, tables, progress):
    evaluation = Evaluation(data=str(tables / "dev.tsv"), exit_threshold=["0,0.2", "1"])
    report = evaluate_models(
        str(exits[0]),
        against=None,
        evaluation=evaluation,
        revision=None,
        device="cpu",
        dtype="auto",
        progress=progress,
    )
    rows = report["evaluation"]["exits"]
    assert [row["threshold"] for row in rows] == [0, 0.2, 1]
    assert [row["layers"] for row in rows][::2] == [3, 1]
    model = AutoModelForSequenceClassification.from_pretrained(exits[0]).eval()
    lines = [line.split("\t") for line in (tables / "dev.tsv").read_text().splitlines()[1:]]
    tokenizer = AutoTokenizer.from_pretrained(exits[0])
    batch = tokenizer([text for text, _ in lines], padding=True, return_tensors="pt")
    labels = torch.tensor([int(label) for _, label in lines])
    for row in rows:
        with torch.no_grad():
            said = model(**batch, speed=row["threshold"])
        assert row["layers"] == pytest.approx(float(said.layers.double().mean()))
        assert row["accuracy"] == pytest.approx(float((said.logits.argmax(-1) == labels).double().mean()))
        assert row["latency"]["single"]["speedup"] > 0
    assert "| 0.2 | " in report_markdown(validate(report))


def test_thresholds_of_a_model_without_exits_are_refused(teacher, tables, progress):
    evaluation = Evaluation(data=str(tables / "dev.tsv"), exit_threshold=(0.5,))
    more = {"revision": None, "device": "cpu", "dtype": "auto", "progress": progress}
    with pytest.raises(RecipeError, match="needs a model with exits, and the model is BertForSequenceClassification"):
        evaluate_models(str(teacher), against=None, evaluation=evaluation, **more)


def test_exits_arent_put_on_a_decoder(distil, models, speaking, tables, tmp_path):
    told = sentences(distil, speaking("llama"), {"method": "fastbert", "data": str(tables / "train.tsv")})
    assert told


def test_a_teacher_writes_the_same_texts_from_the_same_seed_and_goes_on_from_prompts(speaking):
    more = {"length": 12, "device": CPU, "report": lambda done, total: None}
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    folder = speaking("llama")
    texts = teacher_texts(folder, prompts, count=4, temperature=0.0, seed=0, **more)
    assert texts.shape == (4, 12)
    assert torch.equal(texts[:, :3], prompts.repeat(2, 1))
    assert torch.equal(texts[:2], texts[2:])  # the likeliest text has no chance in it
    first, again = (teacher_texts(folder, None, count=3, temperature=1.0, seed=1, **more) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, teacher_texts(folder, None, count=3, temperature=1.0, seed=2, **more))


def test_a_student_of_sequences_learns_what_follows_the_prompts_alone(
    distil, speaking, text_file, tmp_path, monkeypatch
):
    written = []

    def write(*arguments: Any, **more: Any) -> torch.Tensor:
        written.append(teacher_texts(*arguments, **more))
        return written[-1]

    monkeypatch.setattr(lessons, "teacher_texts", write)
    stage = {"method": "sequence", "texts": 16, "text_length": 12, "prompt_length": 4, "data": str(text_file)}
    stage |= {"train_batch_size": 16, "max_steps": 1, "learning_rate": 1e-9, "sampling_temperature": 0.5}
    record = distil(speaking("llama"), tmp_path / "out", stage)
    model = opening.open_whole(Checkpoint.open(str(tmp_path / "out")))
    (texts,) = written
    logs = model(texts).logits.log_softmax(-1)[:, 3:-1]
    wanted = -logs.gather(-1, texts[:, 4:, None]).mean()
    assert record["curve"][0]["loss"] == pytest.approx(float(wanted), rel=1e-4)  # measured: 1e-7
    assert record["data"]["examples"] == 16


def test_a_resumed_student_of_sequences_finds_its_texts_again(distil, speaking, killed_at, tmp_path, monkeypatch):
    stage = {"method": "sequence", "texts": 16, "text_length": 8, "train_batch_size": 8, "max_steps": 4}
    with killed_at("train", 3) as progress:
        distil(speaking("llama"), tmp_path / "killed", {**stage, "save_every": 2}, progress=progress)
    monkeypatch.setattr(lessons, "teacher_texts", None)
    distil(speaking("llama"), tmp_path / "killed", {**stage, "save_every": 2}, resume=True)


def test_a_teacher_that_cant_write_is_refused(distil, teacher):
    told = sentences(distil, teacher, {"method": "sequence"})
    assert "is a BertForSequenceClassification, which can't write text." in told[0]


def test_cached_logits_teach_what_the_teacher_teaches_and_it_isnt_opened_again(
    distil, teacher, tables, tmp_path, monkeypatch
):
    stage = {**QUICK, "method": "logits", "layers": [0], "data": str(tables / "train.tsv"), "temperature": 2.0}
    stage |= {"validation": str(tables / "dev.tsv"), "eval_every": 6, "log_every": 1}
    plain = distil(teacher, tmp_path / "plain", stage)
    first = distil(teacher, tmp_path / "first", {**stage, "cache": str(tmp_path / "cache")})
    assert first["curve"][0]["loss"] == pytest.approx(plain["curve"][0]["loss"], rel=1e-3)  # measured: 9e-5
    assert first["curve"][-1]["eval_loss"] == pytest.approx(plain["curve"][-1]["eval_loss"], rel=1e-2)
    monkeypatch.setattr(lessons, "open_teacher", None)
    second = distil(teacher, tmp_path / "second", {**stage, "cache": str(tmp_path / "cache")})
    assert second["curve"] == first["curve"]


def test_cached_logits_of_a_language_model_teach_what_it_teaches(distil, speaking, text_file, tmp_path):
    stage = {**QUICK, "method": "logits", "student_config": {"num_hidden_layers": 1}, "data": str(text_file)}
    stage |= {"max_length": 16, "max_steps": 3, "log_every": 1}
    plain = distil(speaking("llama"), tmp_path / "plain", stage)
    kept = distil(speaking("llama"), tmp_path / "kept", {**stage, "cache": str(tmp_path / "cache"), "top_k": 1000})
    few = distil(speaking("llama"), tmp_path / "few", {**stage, "cache": str(tmp_path / "cache"), "top_k": 2})
    losses = [record["curve"][0]["loss"] for record in (plain, kept, few)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # measured: 3e-7
    assert losses[2] < losses[0] * (1 - 1e-3)  # two tokens and all others as one: never more
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_with_signals_is_refused():
    stage = {"method": "logits", "data": "a.tsv", "cache": True, "signals": {"hidden": 1.0}}
    with pytest.raises(ProblemsError, match="signals look inside the teacher"):
        parse_recipe({"model": "m", "stages": [{"distill": stage}]}, "test")


def test_the_student_of_labels_alone_is_the_one_that_alpha_0_gives(distil, teacher, tables, tmp_path):
    stage = {**QUICK, "method": "logits", "layers": [0], "data": str(tables / "train.tsv")}
    stage |= {"validation": str(tables / "dev.tsv"), "eval_every": 6}
    record = distil(teacher, tmp_path / "out", {**stage, "baseline": True})
    plain = distil(teacher, tmp_path / "plain", stage)
    alone = distil(teacher, tmp_path / "alone", {**stage, "alpha": 0})
    assert record["curve"] == plain["curve"]
    last = alone["curve"][-1]
    assert record["baseline"]["accuracy"] == last["accuracy"]
    assert record["baseline"]["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-6)  # measured: 0
    assert training_section(record)["baseline"] == record["baseline"]


def test_a_baseline_without_labels_or_validation_is_refused(distil, teacher, tables):
    stage = {"method": "bilstm", **SMALL, "data": str(tables / "texts.tsv"), "baseline": True}
    told = sentences(distil, teacher, stage)
    assert any("accuracies are compared on validation" in line for line in told)
    assert any("texts.tsv has no labels" in line for line in told)


def test_losses_of_a_record_are_numbers(lstm):
    section = training_section(lstm[1])
    assert math.isfinite(section["first_loss"])
    assert section["kept"] is None
    assert section["steps"] == 80
