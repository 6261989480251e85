"""What users run into: each mistake is one sentence that names the culprit, an exit code, and nothing at the output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

RTN = ("--method", "rtn", "--group-size", "32", "--no-evaluate")
GPTQ = ("--method", "gptq", "--group-size", "32", "--no-evaluate", "--samples", "4", "--seq-len", "32")
TENSOR = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def nothing(model: Path) -> None:
    """The model stays as it is."""


def break_header(model: Path) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])


def lose_shard(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()


def point_outside(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"][TENSOR] = "../other/model.safetensors"
    (model / INDEX).write_text(json.dumps(index))


def poison(model: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shard = model / json.loads((model / INDEX).read_text())["weight_map"][TENSOR]
    tensors = load_file(shard)
    tensors[TENSOR][3, 5] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})


def quantize_elsewhere(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))


def pickle_weights(model: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"PK")


def lose_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def occupy(model: Path) -> None:
    (model.parent / "out").mkdir()
    (model.parent / "out" / "diary.txt").write_text("mine")


@dataclass(frozen=True)
class Mistake:
    """What is done to the model's folder, the command line, and what the sentence must name."""

    options: tuple[str, ...]
    names: tuple[str, ...]
    spoil: Callable[[Path], None] = nothing
    model: str = "my-model"
    files: dict[str, str] = field(default_factory=dict)


MISTAKES = {
    "no such folder": Mistake(RTN, ("./my-modle", "did you mean my-model?"), model="./my-modle"),
    "no such hub model": Mistake(RTN, ("somebody/something", "hub"), model="somebody/something"),
    "broken header": Mistake(RTN, ("model-00001-of-00002.safetensors", "not a valid"), break_header),
    "missing shard": Mistake(RTN, ("lacks the shard model-00002-of-00002.safetensors",), lose_shard),
    "index outside the folder": Mistake(RTN, (INDEX, "'../other/model.safetensors'"), point_outside),
    "weights that are pickled": Mistake(RTN, ("pytorch_model.bin",), pickle_weights),
    "NaN weights, seen while rounding": Mistake(RTN, (TENSOR, "1 values that are NaN"), poison),
    "NaN weights, seen while the model writes": Mistake(GPTQ, ("NaN", "weights are damaged"), poison),
    "quantized by another tool": Mistake(RTN, ("my-model", "already", "awq"), quantize_elsewhere),
    "a pattern that matches nothing": Mistake((*RTN, "--ignore", "*.q_porj"), ("'*.q_porj'", "matches no module")),
    "strict groups": Mistake(
        ("--method", "rtn", "--group-size", "48", "--strict-groups"), ("group_size 48", "q_proj has 64 columns")
    ),
    "windows beyond the model's positions": Mistake((*GPTQ, "--seq-len", "4096"), ("--seq-len is 4096", "1024")),
    "no data": Mistake((*GPTQ, "--calibration", "none.txt"), ("none.txt",)),
    "empty data": Mistake((*GPTQ, "--calibration", "empty.txt"), ("empty.txt is empty",), files={"empty.txt": ""}),
    "blank data": Mistake(
        (*GPTQ, "--calibration", "blank.txt"), ("blank.txt holds no text",), files={"blank.txt": " \n"}
    ),
    "too little data": Mistake(
        (*GPTQ, "--calibration", "short.txt"),
        ("short.txt holds 60 tokens", "1 windows of 32", "4 were asked for"),
        files={"short.txt": "abc " * 15},
    ),
    "no such field of the data": Mistake(
        (*GPTQ, "--calibration", "rows.jsonl", "--field", "text"),
        ("rows.jsonl line 1", "'text'", "body"),
        files={"rows.jsonl": '{"body": "abc"}\n'},
    ),
    "no tokenizer": Mistake(
        (*GPTQ, "--calibration", "some.txt"), ("tokenizer",), lose_tokenizer, files={"some.txt": "abc " * 500}
    ),
    "an output that is no model": Mistake(RTN, ("out", "--overwrite"), occupy),
    "an output that is no model, to be replaced": Mistake((*RTN, "--overwrite"), ("out", "is no model"), occupy),
    "an output inside the model": Mistake((*RTN, "--output", "my-model/small"), ("overlap", "my-model/small")),
    "the current folder as output": Mistake((*RTN, "--output", "."), ("overlap", "my-model")),
    "a device that isn't there": Mistake((*RTN, "--device", "cuda:97"), ("cuda:97",)),
}

OPTIONS = {
    "unknown method": (
        ("--method", "gtpq"),
        "--method: gtpq is not a quantize method; did you mean gptq?",
    ),
    "bits out of range": (("--bits", "9"), "--bits: "),
    "unknown option": (("--bitz", "4"), "--bits"),
    "condition with an unknown metric": (("--fail-if", "kll > 1"), "did you mean kl"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, save_llama) -> Path:
    """Two blocks in two shards."""
    return save_llama(tmp_path_factory.mktemp("good") / "my-model", layers=2, max_shard_size="250KB")


def told(done) -> str:
    """The one sentence of a command that failed."""
    assert "Traceback" not in done.err
    assert len(done.errors) == 1, done.err
    return done.errors[0]


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_sentence_that_names_the_culprit_and_leaves_nothing(mistake, good, tmp_path, modelzip):
    shutil.copytree(good, tmp_path / "my-model")
    mistake.spoil(tmp_path / "my-model")
    for name, content in mistake.files.items():
        (tmp_path / name).write_text(content)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    output = () if "--output" in mistake.options else ("--output", "out")
    done = modelzip.fork("quantize", mistake.model, *mistake.options, *output, cwd=tmp_path).wait()
    sentence = told(done)
    assert done.code == (4 if "--device" in mistake.options else 2), sentence
    assert [name for name in mistake.names if name not in sentence] == [], sentence
    assert done.out == ""
    left = [path for path in sorted(str(path) for path in tmp_path.rglob("*")) if ".out.partial" not in path]
    assert left == before


@pytest.mark.parametrize(("options", "sentence"), OPTIONS.values(), ids=OPTIONS.keys())
def test_a_wrong_option_is_told_by_the_process_itself_with_exit_code_2(options, sentence, tmp_path, modelzip):
    done = modelzip.start("quantize", "my-model", *options, cwd=tmp_path).wait()
    assert done.code == 2
    assert sentence in told(done)
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_of_a_command_line_are_told_at_once_one_a_line(tmp_path, modelzip):
    done = modelzip.start("quantize", "m", "--bits", "99", "--clip", "mes", "--samples", "0", cwd=tmp_path).wait()
    assert done.code == 2
    assert [error.split(":")[1].strip() for error in done.errors] == ["--samples", "--bits", "--clip"]


def test_a_model_that_modelzip_has_quantized_already_is_refused(good, tmp_path, modelzip):
    modelzip.fork("quantize", good, *RTN, "--output", "once", cwd=tmp_path, strike_at_process=1).wait()
    done = modelzip.fork("quantize", "once", *RTN, "--output", "twice", cwd=tmp_path).wait()
    assert done.code == 2
    assert "it is quantized already" in told(done)
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_an_output_that_is_there_is_refused_and_kept(good, tmp_path, modelzip, hashes):
    modelzip.fork("quantize", good, *RTN, "--output", "out", cwd=tmp_path, strike_at_process=1).wait()
    before = hashes(tmp_path)
    done = modelzip.fork("quantize", good, *RTN, "--bits", "8", "--output", "out", cwd=tmp_path).wait()
    assert done.code == 2
    assert "--overwrite" in told(done)
    assert hashes(tmp_path) == before


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """A file that leaves so many bytes of the disk free."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return ballast


def test_a_disk_that_is_too_small_is_told_before_any_work_is_done(good, tmp_path, disk, modelzip):
    fill(disk, leave=100_000)
    done = modelzip.fork("quantize", good, *RTN, "--output", disk / "out", cwd=tmp_path).wait()
    assert done.code == 4
    assert str(disk) in told(done)
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_disk_that_fills_up_in_the_middle_is_one_sentence_and_resume_completes_after_room_is_made(
    good, tmp_path, disk, modelzip, hashes
):
    command = ("quantize", good, *RTN, "--output")
    running = modelzip.fork(*command, disk / "out", cwd=tmp_path, strike_at=60, hang=True)
    running.hangs()
    ballast = fill(disk, leave=4096)
    running.release()
    done = running.wait()
    assert done.code == 4
    assert str(disk) in told(done)
    assert "--resume" in told(done)
    assert not (disk / "out").exists()
    ballast.unlink()
    resumed = modelzip.fork(*command, disk / "out", "--resume", cwd=tmp_path).wait()
    assert resumed.code == 0, resumed.err
    modelzip.fork(*command, "elsewhere", cwd=tmp_path, strike_at_process=1).wait()
    assert hashes(disk / "out") == hashes(tmp_path / "elsewhere")


def test_a_disk_that_side_files_fill_up_is_one_sentence_too(good, tmp_path, disk, modelzip):
    shutil.copytree(good, tmp_path / "my-model")
    (tmp_path / "my-model" / "README.md").write_bytes(b"x" * 900_000)
    done = modelzip.fork("quantize", "my-model", *RTN, "--output", disk / "out", cwd=tmp_path).wait()
    assert done.code == 4
    assert str(disk) in told(done)
    assert not (disk / "out").exists()
