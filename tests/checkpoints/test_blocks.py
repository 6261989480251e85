"""What is found in each family: blocks, linears, ties, and what is left alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from modelzip.checkpoints.blocks import find_structure
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton


@pytest.fixture(scope="module")
def structure(saved):
    def of(name: str):
        checkpoint = Checkpoint.open(str(saved(name)))
        return find_structure(skeleton(checkpoint), checkpoint)

    return of


def test_every_linear_of_every_block_is_found_and_no_other(family, structure, models):
    found = [linear.name for block in structure(family).blocks for linear in block.linears]
    assert sorted(found) == sorted(models.FAMILIES[family].expected_linears())


def test_blocks_come_in_order_of_execution(family, structure, models):
    stacks = models.FAMILIES[family].stacks
    expected = [f"{stack}.{index}" for stack in stacks for index in range(models.LAYERS)]
    assert [block.name for block in structure(family).blocks] == expected


def test_shapes_and_checkpoint_names_of_linears_are_those_on_disk(family, structure, saved):
    tensors = Checkpoint.open(str(saved(family))).tensors
    linears = [linear for block in structure(family).blocks for linear in block.linears]
    assert len({linear.tensor for linear in linears}) == len(linears)
    for linear in linears:
        on_disk = tensors[linear.tensor].shape
        assert linear.shape == (on_disk[::-1] if linear.transposed else on_disk)
        assert linear.transposed == (family == "gpt2")


def test_routers_fused_experts_heads_and_embeddings_are_left_alone_with_the_reason(family, structure, models):
    reasons = dict(structure(family).left_alone)
    for name, reason in models.FAMILIES[family].left_alone.items():
        assert reasons.get(name, "").startswith(reason), name


def test_nothing_is_both_compressed_and_left_alone(family, structure):
    found = structure(family)
    linears = {linear.name for block in found.blocks for linear in block.linears}
    assert not linears & {name for name, _ in found.left_alone}


def test_ties_are_found_as_declared(family, structure, models):
    matrices = [{name for name in group if name.endswith("weight")} for group in structure(family).tied]
    expected = models.FAMILIES[family].tied
    assert [group for group in matrices if group] == ([set(expected)] if expected else [])


def test_rest_and_blocks_make_up_the_whole_state(family, structure, saved):
    model = skeleton(Checkpoint.open(str(saved(family))))
    found = structure(family)
    inside = {name for name in model.state_dict() if name.startswith(tuple(f"{b.name}." for b in found.blocks))}
    assert set(found.rest) | inside == set(model.state_dict())
    assert not set(found.rest) & inside


def test_a_skeleton_holds_no_weights_but_real_rotary_tables(saved):
    model = skeleton(Checkpoint.open(str(saved("llama"))))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    # head size 8, theta 10000: the definition of rotary frequencies
    expected = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)


@pytest.fixture
def with_config(saved, tmp_path):
    def make(name: str, **changes) -> Checkpoint:
        folder = tmp_path / "model"
        shutil.copytree(saved(name), folder)
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return Checkpoint.open(str(folder))

    return make


def test_without_architectures_a_causal_model_is_taken_where_there_is_one(with_config):
    assert type(skeleton(with_config("llama", architectures=None))).__name__ == "LlamaForCausalLM"


def test_without_architectures_an_encoder_decoder_is_bare(with_config):
    assert type(skeleton(with_config("t5", architectures=None))).__name__ == "T5Model"


def test_an_unknown_model_type_is_a_sentence(with_config):
    with pytest.raises(CheckpointError, match=r"model type 'lama', which transformers .* doesn't know"):
        skeleton(with_config("llama", model_type="lama"))


@pytest.mark.parametrize("changes", [{"model_type": "own"}, {"architectures": ["OwnForCausalLM"]}])
def test_a_model_with_its_own_code_is_refused(with_config, changes):
    with pytest.raises(CheckpointError, match="from its own repository"):
        skeleton(with_config("llama", auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"}, **changes))


def test_an_own_architecture_whose_class_transformers_has_needs_no_code(with_config):
    model = skeleton(with_config("llama", auto_map={"AutoModelForCausalLM": "llama.LlamaForCausalLM"}))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_config_that_fits_no_model_is_a_sentence(with_config):
    with pytest.raises(CheckpointError, match=r"config\.json can't be turned into a LlamaForCausalLM"):
        skeleton(with_config("llama", hidden_act="no-such-function"))
