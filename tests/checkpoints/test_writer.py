"""Writing: whole or resumable at any moment, the same bytes either way, nothing lost and nothing doubled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from modelzip.checkpoints import shards as shards_module
from modelzip.checkpoints import writer as writer_module
from modelzip.checkpoints.errors import MachineError, OutputError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.journal import NAME as JOURNAL
from modelzip.checkpoints.target import workspace_of
from modelzip.checkpoints.writer import CheckpointWriter

PARTS = [f"model.layers.{index}" for index in range(2)]


@pytest.fixture
def source(saved, tmp_path) -> Checkpoint:
    folder = tmp_path / "source"
    shutil.copytree(saved("llama"), folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("kept")
    (folder / "old.bin").write_text("not kept")
    return Checkpoint.open(str(folder))


def _open(tmp_path, source, **options) -> CheckpointWriter:
    return CheckpointWriter.open(tmp_path / "out", source=source, fingerprint=options.pop("mark", "a"), **options)


def _weight(part: str) -> str:
    return f"{part}.mlp.up_proj.weight"


def _write(writer: CheckpointWriter, source: Checkpoint, part: str) -> None:
    """Halve one weight, as two tensors."""
    name = _weight(part)
    half = source.read([name])[name] / 2
    tensors = {f"{name}_packed": half.to(torch.int8), f"{name}_scale": half[0]}
    writer.write_part(part, tensors, replaces=[name], record={"loss": 0.5})


def _finish(writer: CheckpointWriter) -> Path:
    return writer.finish(config={"model_type": "llama", "b": 1, "a": 2}, files={"modelzip.json": b"{}", "x/y.md": b"y"})


def _run(tmp_path, source, **options) -> Path:
    with _open(tmp_path, source, **options) as writer:
        for part in PARTS:
            if part not in writer.done:
                _write(writer, source, part)
        return _finish(writer)


def _bytes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _partial(tmp_path: Path) -> Path:
    return tmp_path / ".out.partial"


def test_the_result_holds_the_parts_the_copies_the_side_files_and_nothing_else(tmp_path, source):
    out = _run(tmp_path, source)
    assert set(_bytes(out)) == {
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        *("model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json"),
        *("sub/notes.txt", "modelzip.json", "x/y.md"),
    }
    result = Checkpoint.open(str(out))
    replaced = {_weight(part) for part in PARTS}
    new = {f"{name}_{suffix}" for name in replaced for suffix in ("packed", "scale")}
    assert result.tensors.keys() == source.tensors.keys() - replaced | new
    copied = source.tensors.keys() - replaced
    left, right = result.read(copied), source.read(copied)
    assert all(torch.equal(left[name], right[name]) for name in copied)
    assert list(tmp_path.glob(".out*")) == []
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.nbytes


def test_safetensors_itself_reads_the_shards(tmp_path, source):
    out = _run(tmp_path, source)
    weights = load_file(out / "model-00001-of-00003.safetensors")
    name = _weight(PARTS[0])
    assert torch.equal(weights[f"{name}_packed"], (source.read([name])[name] / 2).to(torch.int8))


def test_a_copy_without_parts_is_one_file_that_transformers_opens_alike(tmp_path, source):
    with _open(tmp_path, source) as writer:
        out = writer.finish(config=source.config, files={})
    assert (out / "model.safetensors").exists()
    assert not (out / "model.safetensors.index.json").exists()
    ours = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.folder).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_copies_are_cut_into_shards_of_the_limit(tmp_path, source, monkeypatch):
    monkeypatch.setattr(writer_module, "SHARD_LIMIT", 10_000)
    with _open(tmp_path, source) as writer:
        out = writer.finish(config=source.config, files={})
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in out.glob("*.safetensors")]
    largest = max(info.nbytes for info in source.tensors.values())
    assert len(sizes) > 5
    assert max(sizes) <= max(10_000, largest)
    assert sum(sizes) == source.nbytes


def test_two_runs_write_the_same_bytes(tmp_path, source):
    first = _bytes(_run(tmp_path, source))
    assert _bytes(_run(tmp_path, source, overwrite=True)) == first


@pytest.mark.parametrize("torn", ["", '{"part": "torn', "\x00\x00"])
def test_a_resumed_run_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path, source, torn):
    expected = _bytes(_run(tmp_path, source))
    shutil.rmtree(tmp_path / "out")
    with _open(tmp_path, source) as writer:
        _write(writer, source, PARTS[0])
    with (_partial(tmp_path) / JOURNAL).open("a") as stream:
        stream.write(torn)
    (_partial(tmp_path) / "part-half.safetensors").write_text("half")
    with _open(tmp_path, source, resume=True) as writer:
        assert dict(writer.done) == {PARTS[0]: {"loss": 0.5}}
        assert torch.equal(
            writer.read_part(PARTS[0])[f"{_weight(PARTS[0])}_scale"],
            source.read([_weight(PARTS[0])]).popitem()[1][0] / 2,
        )
        _write(writer, source, PARTS[1])
        assert _bytes(_finish(writer)) == expected


def test_a_run_killed_at_any_write_leaves_nothing_or_a_resumable_run(tmp_path, source):
    """Kill -9 in a process of its own, before its nth rename or fsync, for every other n; then resume."""
    expected = _bytes(_run(tmp_path, source))
    shutil.rmtree(tmp_path / "out")
    kills = 0
    for moment in range(1, 200, 2):
        child = os.fork()
        if child == 0:
            _die_at(moment)
            _run(tmp_path, source)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        kills += os.WTERMSIG(status) == signal.SIGKILL
        if (tmp_path / "out").exists():
            assert _bytes(tmp_path / "out").items() >= expected.items()
            with pytest.raises(OutputError, match="already finished"):
                _run(tmp_path, source, resume=True)
        else:
            _run(tmp_path, source, resume=True)
        assert _bytes(tmp_path / "out") == expected
        assert list(tmp_path.glob(".out*")) == []
        shutil.rmtree(tmp_path / "out")
    assert kills >= 10  # 16 seen


def _die_at(moment: int) -> None:
    left = [moment]
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def counted(*arguments, real=real):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, name, counted)


def test_a_part_that_was_damaged_is_done_again(tmp_path, source):
    expected = _bytes(_run(tmp_path, source))
    shutil.rmtree(tmp_path / "out")
    with _open(tmp_path, source) as writer:
        for part in PARTS:
            _write(writer, source, part)
    file = sorted(_partial(tmp_path).glob("part-*"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with _open(tmp_path, source, resume=True) as writer:
        assert len(writer.done) == 1
    assert _bytes(_run(tmp_path, source, resume=True)) == expected


def test_the_work_of_a_run_that_fails_while_finishing_is_kept(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "publish", _fail)
        with pytest.raises(OutputError, match="made to fail"):
            _run(tmp_path, source)
    with _open(tmp_path, source, resume=True) as writer:
        assert set(writer.done) == set(PARTS)
    assert _bytes(_run(tmp_path, source, resume=True)).keys() >= {"config.json"}


def _fail(*_: object) -> None:
    raise OutputError("made to fail")


def test_a_run_without_parts_leaves_nothing_behind(tmp_path, source):
    with pytest.raises(KeyboardInterrupt), _open(tmp_path, source):
        raise KeyboardInterrupt
    assert list(tmp_path.glob(".out*")) == []


def test_a_leftover_is_neither_used_nor_removed_unasked(tmp_path, source):
    with _open(tmp_path, source) as writer:
        _write(writer, source, PARTS[0])
    with pytest.raises(OutputError, match=r"1 parts done; give --resume .* or --overwrite"):
        _open(tmp_path, source)
    with _open(tmp_path, source, overwrite=True) as writer:
        assert not writer.done


def test_another_recipe_does_not_resume(tmp_path, source):
    with _open(tmp_path, source) as writer:
        _write(writer, source, PARTS[0])
    with pytest.raises(OutputError, match=r"another recipe, model or version; give --overwrite"):
        _open(tmp_path, source, mark="b", resume=True)
    with _open(tmp_path, source, resume=True) as writer:
        assert writer.done


def test_a_finished_output_is_refused_kept_or_replaced_as_asked(tmp_path, source):
    before = _bytes(_run(tmp_path, source))
    with pytest.raises(OutputError, match="exists already; give --overwrite"):
        _open(tmp_path, source)
    with pytest.raises(OutputError, match="already finished"):
        _open(tmp_path, source, resume=True)
    assert list(tmp_path.glob(".out*")) == []
    with _open(tmp_path, source, overwrite=True) as writer:
        _write(writer, source, PARTS[0])
        assert _bytes(tmp_path / "out") == before
        _finish(writer)
    assert _bytes(tmp_path / "out") != before


def test_overwriting_keeps_the_old_output_when_the_last_rename_fails(tmp_path, source, monkeypatch):
    before = _bytes(_run(tmp_path, source))
    real = Path.rename

    def rename(self, target):
        if self.name == ".out.partial":
            raise OSError(errno.EACCES, "made to fail")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(OutputError, match="made to fail"):
            _run(tmp_path, source, overwrite=True)
    assert _bytes(tmp_path / "out") == before


def test_a_run_killed_between_the_two_renames_gives_the_old_output_back(tmp_path, source):
    before = _bytes(_run(tmp_path, source))
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(OutputError, match="exists already"):
        _open(tmp_path, source)
    assert _bytes(tmp_path / "out") == before


def test_a_folder_that_is_no_model_is_never_overwritten(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is no model"):
        _open(tmp_path, source, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_empty_folder_is_filled(tmp_path, source):
    (tmp_path / "out").mkdir()
    assert (_run(tmp_path, source) / "config.json").exists()


def test_two_runs_can_not_share_an_output(tmp_path, source):
    with _open(tmp_path, source) as writer:
        _write(writer, source, PARTS[0])
        with pytest.raises(OutputError, match="Another run is writing"):
            _open(tmp_path, source, overwrite=True)
        assert writer.read_part(PARTS[0])
    with _open(tmp_path, source, resume=True) as writer:
        assert writer.done


@pytest.mark.parametrize("path", [".", "sub/out", ".."])
def test_output_and_source_must_be_apart(source, path):
    with pytest.raises(OutputError, match="overlap"):
        CheckpointWriter.open(source.folder / path, source=source, fingerprint="a", overwrite=True)


def test_a_parent_that_is_a_file_is_a_sentence(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Can't write in"):
        CheckpointWriter.open(tmp_path / "file" / "out", source=source, fingerprint="a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission_is_a_sentence(tmp_path, source):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Can't write in"):
        CheckpointWriter.open(tmp_path / "closed" / "out", source=source, fingerprint="a")


def _one(name: str = "t") -> dict[str, torch.Tensor]:
    return {name: torch.ones(2)}


@pytest.mark.parametrize(
    ("tensors", "replaces", "found"),
    [
        (_one(), ["no.such.weight"], "stands for no.such.weight, which"),
        (_one("lm_head.weight"), [], "lm_head.weight would be written twice"),
        (_one("lm_head.weight_packed"), [], "and lm_head.weight would both be there"),
    ],
)
def test_finish_refuses_what_does_not_add_up(tmp_path, source, tensors, replaces, found):
    with _open(tmp_path, source) as writer:
        writer.write_part("x", tensors, replaces=replaces, record={})
        with pytest.raises(OutputError, match=found):
            _finish(writer)
    assert not (tmp_path / "out").exists()


def test_a_tensor_is_replaced_once_or_dropped_but_not_both(tmp_path, source):
    with _open(tmp_path, source) as writer:
        writer.write_part("x", _one("lm_head.weight"), replaces=["lm_head.weight"], record={})
        writer.drop(["lm_head.weight"], "a test")
        with pytest.raises(OutputError, match="replaced by x and by what was dropped"):
            _finish(writer)
        writer.write_part("y", _one("s"), replaces=["lm_head.weight"], record={})
        with pytest.raises(OutputError, match=r"lm_head\.weight is replaced by"):
            _finish(writer)


def test_dropped_tensors_are_gone_and_remembered(tmp_path, source):
    with _open(tmp_path, source) as writer:
        writer.drop(["lm_head.weight"], "tied")
        assert writer.dropped == {"lm_head.weight": "tied"}
        out = _finish(writer)
    assert source.tensors.keys() - Checkpoint.open(str(out)).tensors.keys() == {"lm_head.weight"}


def test_a_full_disk_is_a_sentence_and_the_run_resumes(tmp_path, source, monkeypatch):
    expected = _bytes(_run(tmp_path, source))
    shutil.rmtree(tmp_path / "out")
    writer = _open(tmp_path, source)
    _write(writer, source, PARTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(shards_module.os, "write", _full)
        with pytest.raises(MachineError, match=r"\.out\.partial is full: .* MB were .* MB are free.*--resume"):
            _write(writer, source, PARTS[1])
    writer.close()
    assert _bytes(_run(tmp_path, source, resume=True)) == expected


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            MachineError,
            r"out/x is full: [\d.]+ MB are free; .*--resume",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), MachineError, r"out/x is full"),
        (SafetensorError("I/O error: File too large (os error 27)"), MachineError, r"larger than .*ulimit -f"),
        (OSError(errno.EFBIG, "File too large"), MachineError, r"larger than .*ulimit -f"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), MachineError, r"free.*--resume"),
        (OSError(errno.EIO, "Input/output error"), MachineError, r"failed: Input/output error\.$"),
        (PermissionError(errno.EACCES, "Permission denied"), OutputError, r"Can't write in .*: Permission denied\.$"),
        (SafetensorError("header too large"), SafetensorError, "header too large"),
        (RuntimeError("a mistake of ours"), RuntimeError, "a mistake of ours"),
    ],
)
def test_what_the_system_and_libraries_say_of_a_write_becomes_a_sentence(tmp_path, error, kind, told):
    with pytest.raises(kind, match=told), shards_module.disk_errors(tmp_path / "out" / "x"):
        raise error


def test_a_shard_of_many_dtypes_is_read_back_as_it_was(tmp_path, source):
    tensors = {
        "a": torch.arange(3, dtype=torch.int64),
        "b": torch.randn(2, 3).to(torch.bfloat16).T,
        "c": torch.tensor(1.5),
        "d": torch.zeros(0, 2),
        "e": torch.tensor([True, False, True]),
    }
    with _open(tmp_path, source) as writer:
        writer.write_part("p", tensors, replaces=[], record={})
        back = writer.read_part("p")
        file = next(_partial(tmp_path).glob("part-*"))
        official = load_file(file)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert torch.equal(official[name], tensor)


def test_the_lock_ends_with_the_process(tmp_path, source):
    code = (
        "import sys; from pathlib import Path; from modelzip.checkpoints.index import Checkpoint;"
        "from modelzip.checkpoints.writer import CheckpointWriter; import torch, os;"
        "w = CheckpointWriter.open(Path(sys.argv[1]), source=Checkpoint.open(sys.argv[2]), fingerprint='a');"
        "w.write_part('p', {'t': torch.ones(1)}, replaces=[], record={}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out", source.folder], check=False)
    assert done.returncode == -signal.SIGKILL
    with _open(tmp_path, source, resume=True) as writer:
        assert set(writer.done) == {"p"}


def test_a_workspace_is_found_again_by_a_run_with_resume_and_gone_when_the_output_is_finished(tmp_path, source):
    with _open(tmp_path, source):
        workspace_of(tmp_path / "out").mkdir()
        (workspace_of(tmp_path / "out") / "state").write_text("half done")
    with pytest.raises(OutputError, match=r"was in the middle of its work; give --resume to go on with it"):
        _open(tmp_path, source)
    with _open(tmp_path, source, resume=True) as writer:
        assert (workspace_of(tmp_path / "out") / "state").read_text() == "half done"
        for part in PARTS:
            _write(writer, source, part)
        _finish(writer)
    assert not workspace_of(tmp_path / "out").exists()
    assert not (tmp_path / "out" / workspace_of(tmp_path / "out").name).exists()


def test_a_workspace_of_another_run_is_swept_away(tmp_path, source):
    with _open(tmp_path, source):
        workspace_of(tmp_path / "out").mkdir()
        (workspace_of(tmp_path / "out") / "state").write_text("half done")
    with pytest.raises(OutputError, match="of another recipe"):
        _open(tmp_path, source, mark="b", resume=True)
    with _open(tmp_path, source, mark="b", overwrite=True):
        assert not workspace_of(tmp_path / "out").exists()
