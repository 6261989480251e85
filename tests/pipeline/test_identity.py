"""What a run must share with the one that it goes on with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline.identity import fingerprint_of
from modelzip.recipes.load import parse_recipe


@pytest.mark.parametrize("changed", ["train.tsv", "dev.tsv", "teacher/model.safetensors", "corpus.txt", "text.txt"])
def test_a_run_is_another_one_once_a_file_that_it_reads_has_changed(changed, saved, tmp_path):
    files = [
        tmp_path / name for name in ("train.tsv", "dev.tsv", "teacher/model.safetensors", "corpus.txt", "text.txt")
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("something")
    training = {"data": str(files[0]), "validation": str(files[1]), "teacher": str(files[2].parent)}
    stages = [
        {"prune": {"method": "vocabulary", "corpus": str(files[3])}},
        {"distill": {"method": "logits", **training}},
    ]
    recipe = parse_recipe({"calibration": {"source": str(files[4])}, "stages": stages}, "test")
    checkpoint = Checkpoint.open(str(saved("bert-classifier")))
    before = fingerprint_of(recipe, checkpoint)
    assert fingerprint_of(recipe, checkpoint) == before
    file = Path(tmp_path / changed)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10))
    assert fingerprint_of(recipe, checkpoint) != before
