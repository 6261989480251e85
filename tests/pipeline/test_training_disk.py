"""A disk that has no room for what a training saves."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelzip.checkpoints.errors import MachineError


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def stage(tmp_path: Path) -> dict[str, object]:
    rows = [f"{word}\t{label}" for label, word in enumerate(("aa", "bb"))] * 8
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    data = str(tmp_path / "train.tsv")
    return {"method": "labels", "data": data, "max_steps": 2, "train_batch_size": 8, "save_every": 1}


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.5, r"A file in .* would be larger"), (1.5, r"A file in .* wasn't written to its end.* MB are free.*--resume")],
    ids=["weights", "optimizer"],
)
def test_weights_or_an_optimizer_that_dont_fit_are_a_sentence_and_the_run_resumes(
    speaking, train_stage, stage, tmp_path, share, told
):
    size = (speaking("bert") / "model.safetensors").stat().st_size
    with largest_file(int(share * size)), pytest.raises(MachineError, match=told):
        train_stage(speaking("bert"), tmp_path / "out", "distill", stage)
    assert train_stage(speaking("bert"), tmp_path / "out", "distill", stage, resume=True)["steps"] == 2
