"""A student of some of its teacher's layers begins as the teacher with the others skipped, whatever its config says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline.train.opening import open_student
from modelzip.pipeline.train.student import Student, with_layers

LAYERED = ["llama", "gemma2", "gemma3", "qwen3", "phi", "opt", "gpt2", "gpt-neox", "bert-mlm", "distilbert", "mixtral"]
KEPT = (1, 3)


def student(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The student at its start, and the teacher that has lost the same layers."""
    origin = Checkpoint.open(str(folder))
    made = open_student(Student(with_layers(origin, KEPT), origin, "layers", KEPT), seed=0).eval()
    teacher = getattr(transformers, origin.config["architectures"][0]).from_pretrained(folder).eval()
    stack = next(module for module in teacher.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in set(range(len(stack))) - set(KEPT):
        stack[layer].register_forward_hook(skipped, with_kwargs=True)
    return made, teacher


def skipped(module, args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.mark.parametrize("name", LAYERED)
@torch.no_grad()
def test_a_student_of_layers_begins_as_the_teacher_without_the_others(name, models, tmp_path):
    key = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(name, "num_hidden_layers")
    models.FAMILIES[name].build(**{key: 4}).save_pretrained(tmp_path)
    if name.startswith("gemma"):  # as files of older releases are
        config = json.loads((tmp_path / "config.json").read_text())
        del config["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 4}))
    made, teacher = student(tmp_path)
    for mine, theirs in zip(models.outputs(made), models.outputs(teacher), strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_layers_without_experts_stay_so_in_the_student(models, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0, 3]}
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **heads, **experts)).save_pretrained(tmp_path)
    made, teacher = student(tmp_path)
    assert made.config.mlp_only_layers == [1]
    tokens = torch.randint(0, 64, (2, 8))
    assert torch.equal(made(tokens).logits, teacher(tokens).logits)


def test_attention_that_is_scaled_by_the_layers_number_is_refused(models, tmp_path):
    models.FAMILIES["gpt2"].build(n_layer=4, scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="scaled by the layer's number"):
        with_layers(Checkpoint.open(str(tmp_path)), KEPT)
