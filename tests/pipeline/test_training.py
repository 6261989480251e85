"""The training engine on pico models, with data whose pattern takes some dozens of steps to learn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline.clock import Clock
from modelzip.pipeline.context import Context
from modelzip.pipeline.identity import fingerprint_of
from modelzip.pipeline.training import plan_training, run_training
from modelzip.recipes.load import parse_recipe

QUICK = {"max_steps": 6, "train_batch_size": 8, "learning_rate": 2e-3, "log_every": 2, "warmup": 0.0}


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
def learn(progress) -> Callable[..., dict[str, Any]]:
    """learn(model, output, stage, seed=..., ...) -> the record of that one stage."""

    def run(model: Path, output: Path, stage: dict[str, Any], *, seed: int = 0, **options: Any) -> dict[str, Any]:
        recipe = parse_recipe({"model": str(model), "seed": seed, "stages": [{"distill": stage}]}, "test")
        source = Checkpoint.open(str(model))
        plan = plan_training(recipe.stages[0], source, recipe=recipe, output=output)
        context = Context(recipe, torch.device("cpu"), fingerprint_of(recipe, source), Clock(), progress)
        made = {"overwrite": False, "resume": False, **options}
        record = run_training(
            plan, source, target=output, describe=lambda found: json.dumps(found).encode(), context=context, **made
        )
        written = Checkpoint.open(str(output))
        assert {name: (info.dtype, info.shape) for name, info in written.tensors.items()} == {
            name: (info.dtype, info.shape) for name, info in plan.result.tensors.items()
        }
        assert plan.bytes_after == written.nbytes
        return record

    return run


@pytest.fixture(scope="module")
def taught(speaking, learn, tables, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A pico encoder that was fine-tuned until it knows the pattern, and the record."""
    folder = tmp_path_factory.mktemp("taught") / "out"
    stage = {**QUICK, "data": str(tables / "train.tsv"), "validation": str(tables / "dev.tsv"), "max_steps": 80}
    return folder, learn(speaking("bert"), folder, {**stage, "train_batch_size": 32, "eval_every": 40})


def test_an_encoder_without_a_head_learns_labels_and_opens_as_a_classifier(taught, tables):
    folder, record = taught
    assert record["curve"][-1]["accuracy"] >= 0.9  # measured: see below
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [line.split("\t") for line in (tables / "dev.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        said = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text, _ in rows]
    right = sum(guess == int(label) for guess, (_, label) in zip(said, rows, strict=True))
    assert right / len(rows) == record["curve"][-1]["accuracy"]
