"""The training engine on pico models, with data whose pattern takes some dozens of steps to learn."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modelzip.checkpoints.errors import OutputError, ProblemsError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline.training import training_section

QUICK = {
    "method": "labels",
    "max_steps": 6,
    "train_batch_size": 8,
    "learning_rate": 2e-3,
    "log_every": 2,
    "warmup": 0.0,
}


def write_table(file: Path, *, count: int, seed: int, labelled: bool = True) -> Path:
    """Words; the label says whether an `a` stands before the first `b`."""
    draw = random.Random(seed)
    lines = ["text\tlabel" if labelled else "text"]
    for _ in range(count):
        label = draw.randrange(2)
        word = "".join(draw.choices("cdefgh", k=draw.randint(2, 9)))
        place = draw.randrange(len(word))
        word = word[:place] + "ba"[label] * 2 + word[place:]
        lines.append(f"{word}\t{label}" if labelled else word)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv (256 rows), dev.tsv (64) and texts.tsv, which has no labels."""
    folder = tmp_path_factory.mktemp("tables")
    write_table(folder / "train.tsv", count=256, seed=1)
    write_table(folder / "dev.tsv", count=64, seed=2)
    write_table(folder / "texts.tsv", count=256, seed=3, labelled=False)
    return folder


@pytest.fixture(scope="module")
def learn(train_stage) -> Callable[..., dict[str, Any]]:
    """learn(model, output, stage, seed=..., ...) -> the record of that one stage."""
    return lambda model, output, stage, **options: train_stage(model, output, "distill", stage, **options)


@pytest.fixture(scope="module")
def taught(speaking, learn, tables, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A pico encoder that was fine-tuned until it knows the pattern, and the record."""
    folder = tmp_path_factory.mktemp("taught") / "out"
    stage = {**QUICK, "data": str(tables / "train.tsv"), "validation": str(tables / "dev.tsv"), "max_steps": 80}
    return folder, learn(speaking("bert"), folder, {**stage, "train_batch_size": 32, "eval_every": 40})


def test_an_encoder_without_a_head_learns_labels_and_opens_as_a_classifier(taught, tables):
    folder, record = taught
    assert record["curve"][-1]["accuracy"] >= 0.9  # measured: 1
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [line.split("\t") for line in (tables / "dev.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        said = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text, _ in rows]
    right = sum(guess == int(label) for guess, (_, label) in zip(said, rows, strict=True))
    assert right / len(rows) == record["curve"][-1]["accuracy"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_killed_run_that_is_resumed_ends_on_the_same_curve_and_the_same_bytes(speaking, learn, tables, tmp_path):
    stage = {**QUICK, "data": str(tables / "train.tsv"), "validation": str(tables / "dev.tsv"), "max_steps": 9}
    stage |= {"save_every": 4, "eval_every": 3, "train_batch_size": 64, "log_every": 4}  # an epoch has 4 steps
    whole = learn(speaking("bert"), tmp_path / "whole", stage)
    job = {"model": str(speaking("bert")), "stage": stage, "output": str(tmp_path / "killed")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("runs_training.py")
    killed = subprocess.run([sys.executable, str(script), str(tmp_path / "job.json"), "6"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "killed").exists()
    with pytest.raises(OutputError, match=r"was in the middle of its work; give --resume"):
        learn(speaking("bert"), tmp_path / "killed", stage)
    resumed = learn(speaking("bert"), tmp_path / "killed", stage, resume=True)
    assert resumed["curve"] == whole["curve"]
    assert [row["step"] for row in whole["curve"]] == [3, 4, 6, 8, 9]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "killed", "whole"]


@pytest.mark.parametrize("moment", [1, 5, 8])
def test_a_run_that_keeps_its_best_weights_resumes_at_any_step(speaking, learn, tables, killed_at, tmp_path, moment):
    stage = {**QUICK, "data": str(tables / "train.tsv"), "validation": str(tables / "dev.tsv"), "max_steps": 9}
    stage |= {"save_every": 3, "eval_every": 2, "train_batch_size": 64, "keep": "loss", "gradient_accumulation": 2}
    whole = learn(speaking("bert"), tmp_path / "whole", stage)
    with killed_at("train", moment) as progress:
        learn(speaking("bert"), tmp_path / "killed", stage, progress=progress)
    resumed = learn(speaking("bert"), tmp_path / "killed", stage, resume=True)
    assert resumed == whole
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_another_seed_gives_other_weights(speaking, learn, tables, tmp_path):
    stage = {**QUICK, "data": str(tables / "train.tsv")}
    records = [learn(speaking("bert"), tmp_path / str(seed), stage, seed=seed) for seed in (0, 1)]
    assert records[0]["curve"] != records[1]["curve"]


def test_generators_of_the_process_are_left_as_they_were(speaking, learn, tables, tmp_path):
    model = speaking("bert")
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    learn(model, tmp_path / "out", {**QUICK, "data": str(tables / "train.tsv"), "max_steps": 1}, seed=5)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1][1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_early_stopping_ends_the_run_and_the_best_weights_are_kept(taught, learn, tables, tmp_path):
    """A model that knows the pattern only gets worse at a learning rate that breaks it."""
    stage = {**QUICK, "data": str(tables / "train.tsv"), "validation": str(tables / "dev.tsv"), "max_steps": 40}
    stage |= {"learning_rate": 0.05, "eval_every": 2, "early_stopping": 3, "schedule": "constant"}
    record = learn(taught[0], tmp_path / "out", stage)
    section = training_section(record)
    measured = [row for row in record["curve"] if "eval_loss" in row]
    best = min(measured, key=lambda row: row["eval_loss"])
    assert record["stopped_early"]
    assert record["steps"] == best["step"] + 3 * 2 < 40
    assert record["kept_step"] == best["step"]
    assert section["best"] == section["kept"] == {key: best[key] for key in ("step", "eval_loss", "accuracy")}
    again = learn(tmp_path / "out", tmp_path / "again", {**stage, "learning_rate": 1e-12, "max_steps": 1})
    assert again["curve"][-1]["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-5)  # measured: 0


def test_max_steps_wins_over_epochs_and_epochs_are_counted_in_steps(speaking, learn, tables, tmp_path):
    stage = {**QUICK, "data": str(tables / "train.tsv"), "train_batch_size": 64}
    assert learn(speaking("bert"), tmp_path / "steps", {**stage, "max_steps": 3, "epochs": 7})["steps"] == 3
    del stage["max_steps"]
    epochs = learn(speaking("bert"), tmp_path / "epochs", {**stage, "epochs": 1.5, "gradient_accumulation": 2})
    assert epochs["steps"] == 3  # an epoch has 256 / 64 / 2 = 2 steps
    assert epochs["curve"][-1]["epoch"] == 1.5


def test_accumulated_batches_learn_what_one_large_batch_learns(speaking, learn, tables, tmp_path, without_dropout):
    stage = {**QUICK, "data": str(tables / "train.tsv"), "log_every": 1}
    model = without_dropout("bert")
    large = learn(model, tmp_path / "large", {**stage, "train_batch_size": 256, "max_steps": 3})
    small = learn(
        model, tmp_path / "small", {**stage, "train_batch_size": 32, "gradient_accumulation": 8, "max_steps": 3}
    )
    for one, two in zip(large["curve"], small["curve"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)  # measured: 0


def test_modules_that_are_ignored_keep_their_weights(speaking, learn, tables, tmp_path):
    stage = {**QUICK, "data": str(tables / "train.tsv"), "ignore": ["*.embeddings", "*.layer.0"]}
    learn(speaking("bert"), tmp_path / "out", stage)
    before, after = weights(speaking("bert")), weights(tmp_path / "out")
    for name, tensor in before.items():
        is_kept = name.startswith(("embeddings", "encoder.layer.0"))
        assert torch.equal(after[f"bert.{name}"], tensor) == is_kept, name


@pytest.fixture(scope="module")
def without_dropout(speaking, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """without_dropout("bert") -> a copy of the pico model that drops nothing out."""

    def copy(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(speaking(name), folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], float)}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def logits_of(folder: Path, texts: list[str]) -> torch.Tensor:
    """Logits [texts, classes], one text at a time, by transformers alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def column(file: Path, place: int) -> list[str]:
    return [line.split("\t")[place] for line in file.read_text().splitlines()[1:]]


def test_a_student_of_some_layers_reaches_the_teacher_on_texts_without_labels(taught, learn, tables, tmp_path):
    stage = {**QUICK, "method": "logits", "data": str(tables / "texts.tsv"), "layers": [1], "max_steps": 60}
    record = learn(taught[0], tmp_path / "out", {**stage, "train_batch_size": 32})
    assert Checkpoint.open(str(tmp_path / "out")).config["num_hidden_layers"] == 1
    texts = column(tables / "dev.tsv", 0)
    found, truth = logits_of(tmp_path / "out", texts), logits_of(taught[0], texts)
    agreement = (found.argmax(-1) == truth.argmax(-1)).double().mean()
    assert agreement >= 0.9  # measured: 1
    assert record["curve"][-1]["loss"] < 0.1 * record["curve"][0]["loss"]  # measured: 0.009


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_first_loss_is_the_one_computed_by_hand(taught, without_dropout, learn, tables, tmp_path, divergence):
    """T² times the KL of the two softmaxes at T, times alpha, and the cross-entropy with the labels for the rest."""
    student = tmp_path / "student"
    stage = {**QUICK, "data": str(tables / "train.tsv"), "max_steps": 2}
    learn(without_dropout("bert"), student, stage)
    stage |= {"method": "logits", "teacher": str(taught[0]), "temperature": 3, "alpha": 0.7, "divergence": divergence}
    record = learn(student, tmp_path / "out", {**stage, "train_batch_size": 256, "max_steps": 1})
    texts, labels = (column(tables / "train.tsv", place) for place in (0, 1))
    mine, theirs = (logits_of(folder, texts).double() for folder in (student, taught[0]))
    p, q = ((one / 3).softmax(-1) for one in (theirs, mine))
    if divergence == "reverse":
        p, q = q, p
    soft = 9 * (p * (p / q).log()).sum(-1).mean()
    hard = -mine.log_softmax(-1)[torch.arange(len(texts)), torch.tensor([int(one) for one in labels])].mean()
    assert record["curve"][0]["loss"] == pytest.approx(float(0.7 * soft + 0.3 * hard), rel=1e-5)  # measured: 1e-7


def test_a_narrower_student_is_copied_from_the_leading_part_or_starts_at_random(taught, learn, tables, tmp_path):
    stage = {**QUICK, "method": "logits", "data": str(tables / "texts.tsv"), "learning_rate": 1e-12, "max_steps": 1}
    stage["student_config"] = {"intermediate_size": 24, "num_hidden_layers": 1}
    learn(taught[0], tmp_path / "copied", {**stage, "start": "copy"})
    learn(taught[0], tmp_path / "random", stage)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    leading = weights(taught[0])[name][:24]
    assert torch.allclose(weights(tmp_path / "copied")[name], leading, atol=1e-6)
    assert not torch.allclose(weights(tmp_path / "random")[name], leading, atol=1e-2)


def test_hidden_states_of_another_width_are_learned_through_a_projection_that_isnt_saved(
    taught, learn, tables, tmp_path
):
    stage = {**QUICK, "method": "logits", "data": str(tables / "texts.tsv"), "max_steps": 30}
    stage |= {"student_config": {"hidden_size": 16}, "signals": {"hidden": 1.0}, "layer_map": [1, 2]}
    record = learn(taught[0], tmp_path / "out", stage)
    assert record["curve"][-1]["loss"] < 0.8 * record["curve"][0]["loss"]  # measured: 0.58
    assert not [name for name in weights(tmp_path / "out") if "projection" in name]


def test_attention_maps_are_learned(taught, learn, tables, tmp_path):
    stage = {**QUICK, "method": "logits", "data": str(tables / "texts.tsv"), "max_steps": 10}
    stage |= {"student_config": {"num_hidden_layers": 1}, "signals": {"attention": 100.0}}
    record = learn(taught[0], tmp_path / "out", stage)
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert-mlm"])
def test_a_language_model_learns_running_text(speaking, learn, text_file, tmp_path, name):
    stage = {**QUICK, "data": str(text_file), "max_length": 16, "max_steps": 20, "validation": str(text_file)}
    model = speaking(name)
    if name == "bert-mlm":
        model = tmp_path / "masking"
        shutil.copytree(speaking(name), model)
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": "</s>"}))
    record = learn(model, tmp_path / "out", stage)
    assert record["curve"][-1]["loss"] < 0.85 * record["curve"][0]["loss"]  # measured: 0.74, 0.68, 0.60
    assert "accuracy" in record["curve"][-1]
    assert weights(tmp_path / "out").keys() == weights(model).keys()


def test_a_causal_models_loss_is_transformers_own(speaking, learn, text_file, spell, tmp_path):
    stage = {**QUICK, "data": str(text_file), "max_length": 16, "train_batch_size": 125, "max_steps": 1}
    record = learn(speaking("llama"), tmp_path / "out", stage)
    windows = spell(text_file.read_text(encoding="utf-8")).view(125, 16)
    model = transformers.AutoModelForCausalLM.from_pretrained(speaking("llama"))
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    assert record["curve"][0]["loss"] == pytest.approx(loss, rel=1e-5)  # measured: 0


def test_weights_keep_the_type_that_they_came_in(models, speaking, learn, text_file, tmp_path):
    model = tmp_path / "half"
    shutil.copytree(speaking("llama"), model)
    opened = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    opened.save_pretrained(model)
    learn(model, tmp_path / "out", {**QUICK, "data": str(text_file), "max_length": 16})
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_number_is_learned_where_labels_are_numbers(speaking, learn, tmp_path):
    rows = "\n".join(f"{'a' * (1 + place % 8)}\t{place % 8 / 4 + 0.05}" for place in range(64))
    (tmp_path / "scores.tsv").write_text(f"text\tscore\n{rows}\n")
    stage = {**QUICK, "data": str(tmp_path / "scores.tsv"), "max_steps": 30}
    record = learn(speaking("bert"), tmp_path / "out", stage)
    assert record["task"] == "number"
    assert record["curve"][-1]["loss"] < 0.5 * record["curve"][0]["loss"]  # measured: 0.30
    told = sentences(learn, speaking("bert"), {**stage, "validation": stage["data"], "keep": "accuracy"})
    assert told == ["distill: keep: accuracy: this model predicts a number, which has a loss alone: take keep: loss."]


def sentences(learn: Any, model: Path, stage: dict[str, Any]) -> list[str]:
    """What is told of a stage that can't be planned."""
    with pytest.raises(ProblemsError) as told:
        learn(model, Path("never"), stage)
    return list(told.value.sentences)


def test_all_mistakes_are_told_at_once(taught, learn, tables):
    stage = {"method": "logits", "data": str(tables / "none.tsv"), "layers": [0, 7], "validation": "other.csv"}
    told = sentences(learn, taught[0], stage)
    assert [line for line in told if "no file" in line and "none.tsv" in line]
    assert [line for line in told if "no file" in line and "other.csv" in line]


def test_layers_that_the_teacher_hasnt_got_are_named(taught, learn, tables):
    told = sentences(learn, taught[0], {"method": "logits", "data": str(tables / "train.tsv"), "layers": [0, 7]})
    assert told == [f"distill: {taught[0]} has the layers 0 to 1, and none with the number 7."]


def test_labels_that_the_head_doesnt_have_are_named(taught, learn, tmp_path):
    (tmp_path / "three.tsv").write_text("text\tlabel\nab\t0\nba\t2\n")
    told = sentences(learn, taught[0], {"data": str(tmp_path / "three.tsv")})
    assert len(told) == 1
    assert "line 3: the label '2'" in told[0]


def test_a_missing_column_is_named(taught, learn, tables):
    told = sentences(learn, taught[0], {"data": str(tables / "train.tsv"), "label_column": "stars"})
    assert "has no column 'stars'; it has text, label" in told[0]


def test_a_teacher_of_other_tokens_is_refused(taught, speaking, learn, tables, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(taught[0], other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"a": 4,', '"Z": 4,', 1))
    stage = {"method": "logits", "teacher": str(other), "data": str(tables / "train.tsv")}
    told = sentences(learn, taught[0], stage)
    assert len(told) == 1
    assert "speak of other tokens: " in told[0]
    assert "name a teacher with the student's tokenizer" in told[0]


def test_a_teacher_without_classes_is_refused(speaking, learn, tables):
    told = sentences(learn, speaking("bert"), {"method": "logits", "data": str(tables / "train.tsv")})
    assert any("has no logits for a whole text: train it with method labels first" in line for line in told)


def test_compressed_integers_are_refused(compress, speaking, learn, text_file, tmp_path):
    compress(speaking("llama"), tmp_path / "small", {"method": "rtn"})
    told = sentences(learn, tmp_path / "small", {"data": str(text_file)})
    assert "holds integers (compressed-tensors), which have no gradient: train it first" in told[0]


def test_a_loss_that_is_no_number_ends_the_run(speaking, learn, tables, tmp_path):
    stage = {**QUICK, "data": str(tables / "train.tsv"), "learning_rate": 10, "max_grad_norm": 0, "log_every": 1}
    model = tmp_path / "broken"
    shutil.copytree(speaking("bert"), model)
    found = weights(model)
    found["embeddings.LayerNorm.weight"].fill_(torch.nan)
    save_file(found, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"^The loss is nan at step 1: lower learning_rate"):
        learn(model, tmp_path / "out", stage)


def test_tensorboard_that_isnt_installed_is_told_before_anything_runs(speaking, learn, tables, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = sentences(learn, speaking("bert"), {**QUICK, "data": str(tables / "train.tsv"), "tensorboard": True})
    assert told == ["distill: tensorboard needs the package of that name: install it, or leave tensorboard out."]


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch --use_fsdp` tells its processes."""
ZERO_3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "DS_ACCELERATOR": "cpu",
}
"""What `accelerate launch --use_deepspeed --zero_stage 3 --zero3_save_16bit_model true` tells them."""
WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed isn't installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spread", [{}, FSDP, pytest.param(ZERO_3, marks=WITH_DEEPSPEED)], ids=["ddp", "fsdp", "zero-3"]
)
def test_two_processes_learn_what_one_learns_that_accumulates_twice(spread, without_dropout, tables, tmp_path):
    """61 rows to measure on: the processes' shares aren't alike."""
    write_table(tmp_path / "dev.tsv", count=61, seed=2)
    stage = {**QUICK, "data": str(tables / "train.tsv"), "validation": str(tmp_path / "dev.tsv"), "max_steps": 10}
    curves = {}
    script, model = str(Path(__file__).with_name("runs_training.py")), str(without_dropout("bert"))
    for count in (1, 2):
        output = tmp_path / str(count)
        job = {"model": model, "output": str(output), "stage": {**stage, "gradient_accumulation": 2 // count}}
        (tmp_path / "job.json").write_text(json.dumps({**job, "stage": {**job["stage"], "eval_every": 5}}))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if count == 2 else []
        command = [sys.executable, *launch, script, str(tmp_path / "job.json")]
        told = subprocess.run(command, capture_output=True, env={**os.environ, **(spread if count == 2 else {})})
        assert told.returncode == 0, told.stderr.decode()
        assert told.stdout == b"" or find_spec("deepspeed") is not None  # which speaks as soon as it is imported
        curves[count] = json.loads((output / "modelzip.json").read_text())["curve"]
    for one, two in zip(curves[1], curves[2], strict=True):
        assert one == pytest.approx(two, rel=1e-5)  # measured: 6e-8
    one, two = (weights(tmp_path / name) for name in ("1", "2"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if not name.endswith("key.bias"):  # its gradient is rounding alone: softmax doesn't see it
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
