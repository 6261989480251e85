"""Opening a checkpoint: what is read, and the sentence for every way in which it can be broken."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint


def _write(folder: Path, header: object, data: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def _tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def sharded(models, tmp_path: Path) -> Path:
    return models.saved("llama", tmp_path / "sharded", max_shard_size="20KB")


def test_headers_tell_names_shapes_dtypes_and_bytes_of_one_file(saved):
    folder = saved("llama")
    checkpoint = Checkpoint.open(str(folder))
    expected = load_file(folder / "model.safetensors")
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert checkpoint.nbytes == sum(4 * tensor.numel() for tensor in expected.values())
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}
    assert (checkpoint.folder, checkpoint.source, checkpoint.quantization) == (folder, str(folder), None)


def test_many_shards_read_like_one_file(sharded, saved):
    many, one = Checkpoint.open(str(sharded)), Checkpoint.open(str(saved("llama")))
    assert len({info.file for info in many.tensors.values()}) > 3
    assert many.tensors.keys() == one.tensors.keys()
    left, right = many.read(many.tensors), one.read(one.tensors)
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_every_dtype_reads_as_safetensors_reads_it(tmp_path, dtype):
    tensors = {
        "matrix": torch.randn(3, 5).to(dtype),
        "scalar": torch.tensor(2).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    read = Checkpoint.open(str(tmp_path)).read(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].view(torch.uint8) if tensor.ndim else read[name].float(),
                           tensor.view(torch.uint8) if tensor.ndim else tensor.float())  # fmt: skip


def test_a_cast_touches_floats_only(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    read = Checkpoint.open(str(tmp_path)).read(["a", "b"], dtype=torch.bfloat16)
    assert (read["a"].dtype, read["b"].dtype) == (torch.bfloat16, torch.int32)


def test_side_files_are_everything_but_weights_index_and_config(sharded):
    for path in ("tokenizer.json", "LICENSE", "pytorch_model.bin", "a.gguf", ".cache/x", "1_Pooling/config.json",
                 "2_Dense/config.json", "2_Dense/model.safetensors", "extra/model.safetensors"):  # fmt: skip
        (sharded / path).parent.mkdir(exist_ok=True)
        (sharded / path).write_text("x")
    found = {str(path) for path in Checkpoint.open(str(sharded)).side_files}
    module = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert found == {"tokenizer.json", "LICENSE", "generation_config.json"} | module


@pytest.mark.parametrize(
    ("header", "data", "found"),
    [
        (b"", b"", "isn't JSON"),
        (b"{broken", b"", "isn't JSON"),
        ([1], b"", "isn't a JSON object"),
        ({"a": 3}, b"", "tensor a lacks"),
        ({"a": _tensor("F33")}, b"8 bytes!", "unknown dtype 'F33'"),
        ({"a": _tensor(shape=[-2])}, b"8 bytes!", "invalid shape"),
        ({"a": _tensor(shape=[True])}, b"8 bytes!", "invalid shape"),
        ({"a": _tensor(offsets=(8, 0))}, b"8 bytes!", "invalid shape or data_offsets"),
        ({"a": _tensor(shape=[3])}, b"8 bytes!", "has 8 bytes where F32 [3] needs 12"),
        ({"a": _tensor()}, b"short", "end at byte"),
        ({"a": _tensor()}, b"much too long", "end at byte"),
        ({"a": _tensor(offsets=(4, 12))}, b"twelve bytes", "was expected"),
        ({"a": _tensor(), "b": _tensor(offsets=(4, 12))}, b"twelve bytes", "tensor b starts"),
    ],
)
def test_each_defect_of_a_header_is_a_sentence_that_names_the_file(tmp_path, header, data, found):
    folder = _write(tmp_path / "model", header, data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(folder))
    message = str(caught.value)
    assert found in message
    assert str(folder / "model.safetensors") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "needs at least 8"),
        (b"abc", "needs at least 8"),
        (struct.pack("<Q", 10**12), "more than the 100000000"),
        (struct.pack("<Q", 1000) + b"{}", "claims 1000 bytes but the file has 10"),
    ],
)
def test_a_header_of_the_wrong_length_is_refused_unread(tmp_path, data, found):
    folder = _write(tmp_path / "model", {})
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=found):
        Checkpoint.open(str(folder))


def _change_index(folder: Path, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("path", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b"])
def test_an_index_that_leaves_its_folder_is_refused(sharded, path):
    _change_index(sharded, lambda weights: weights.update({"lm_head.weight": path}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint.open(str(sharded))


def test_a_missing_shard_is_named_with_the_number_of_others(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {shards[0].name}, one of {len(shards)} "):
        Checkpoint.open(str(sharded))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {shards[0].name} and 1 more of {len(shards)} "):
        Checkpoint.open(str(sharded))


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    _change_index(sharded, lambda weights: weights.update({"ghost.weight": weights["lm_head.weight"]}))
    with pytest.raises(CheckpointError, match=r"lacks the tensor ghost\.weight"):
        Checkpoint.open(str(sharded))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_a_sentence(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(str(sharded))


def test_a_folder_without_config_is_no_model_and_one_below_is_suggested(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json\."):
        Checkpoint.open(str(tmp_path))
    _write(tmp_path / "inner", {})
    with pytest.raises(CheckpointError, match="inner has: name that instead"):
        Checkpoint.open(str(tmp_path))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        Checkpoint.open(str(tmp_path))


def test_the_nearest_folder_is_suggested_for_a_misspelt_one(saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "my-llama")
    with pytest.raises(CheckpointError, match=r"did you mean .*my-llama"):
        Checkpoint.open(str(tmp_path / "my-lama"))


def test_a_name_beside_existing_folders_is_a_path_and_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="There is no model at out/model"):
        Checkpoint.open("out/model")


@pytest.mark.parametrize("name", ["some-model", "some-org/some-model"])
def test_a_hub_id_without_network_is_a_sentence(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no folder .* hub can't be reached .* no complete copy") as caught:
        Checkpoint.open(name, revision="v1")
    assert "revision v1" in str(caught.value)


def test_a_hub_id_is_fetched_at_its_revision_without_foreign_weights(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = {}

    def snapshot(name, *, revision, ignore_patterns):
        asked.update(name=name, revision=revision, ignored=ignore_patterns)
        return str(saved("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    checkpoint = Checkpoint.open("some-org/llama", revision="abc")
    assert checkpoint.source == "some-org/llama"
    assert (asked["name"], asked["revision"]) == ("some-org/llama", "abc")
    assert "*.bin" in asked["ignored"]


def test_a_revision_of_a_local_folder_is_refused(saved):
    with pytest.raises(CheckpointError, match="leave the revision out"):
        Checkpoint.open(str(saved("llama")), revision="main")


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({torch.bfloat16: 100, torch.float32: 10}, torch.bfloat16),
        ({torch.bfloat16: 100, torch.float32: 60}, torch.float32),
        ({torch.int32: 1000, torch.float16: 10}, torch.float16),
        ({torch.int32: 10}, torch.float32),
    ],
)
def test_the_dtype_is_that_of_most_bytes_that_models_compute_in(tmp_path, sizes, wanted):
    tensors = {f"t{number}": torch.zeros(size, dtype=dtype) for number, (dtype, size) in enumerate(sizes.items())}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(str(tmp_path)).dtype == wanted
