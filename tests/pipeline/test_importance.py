"""Importance against masks differentiated by hand, and what pruning by it is worth."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelzip.checkpoints.errors import CalibrationError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.checkpoints.units import Units, find_heads, find_neurons
from modelzip.compressors.prune.structural import choose
from modelzip.compressors.prune.structural_settings import Heads, Neurons, UnitSettings
from modelzip.pipeline.importance import importance, language_model_loss, masked_lm_loss, self_loss
from modelzip.pipeline.smaller import headers_of
from modelzip.pipeline.whole import loss_of

spec = importlib.util.spec_from_file_location("structural_help", Path(__file__).with_name("structural.py"))
help = importlib.util.module_from_spec(spec)
spec.loader.exec_module(help)


def whole(folder: Path) -> Any:
    return load_whole(Checkpoint.open(str(folder)), dtype=torch.float32, device=torch.device("cpu"))


def units_of(settings: UnitSettings, checkpoint: Checkpoint) -> list[Units]:
    headers = headers_of(checkpoint)
    return (find_heads if isinstance(settings, Heads) else find_neurons)(headers.model, headers.structure)


def masked_loss(model: nn.Module, window: Tensor, scale: dict[str, Tensor], width: int) -> Tensor:
    """The next token's cross entropy with each output projection's weight scaled by head: no hook, no mask."""
    kept = {name: model.get_submodule(name).weight for name in scale}
    changed = {f"{name}.weight": kept[name] * scale[name].repeat_interleave(width) for name in scale}
    logits = torch.func.functional_call(model, changed, (window,)).logits
    return nn.functional.cross_entropy(logits[0, :-1], window[0, 1:])


@pytest.mark.parametrize(
    ("settings", "ending", "width", "count"),
    [
        (Heads(), "self_attn.o_proj", 8, 4),
        (Neurons(), "mlp.down_proj", 1, 48),
    ],
)
def test_importance_is_the_mean_absolute_gradient_of_a_samples_loss(settings, ending, width, count, models, saved):
    windows = models.tokens(count=5)
    model = whole(saved("qwen3"))
    units = units_of(settings, Checkpoint.open(str(saved("qwen3"))))
    found = importance(model, units, [{"input_ids": windows[:2]}, {"input_ids": windows[2:]}], language_model_loss)
    expected = torch.zeros(2, count)
    for window in windows:
        scale = {f"model.layers.{layer}.{ending}": torch.ones(count, requires_grad=True) for layer in range(2)}
        gradients = torch.autograd.grad(masked_loss(model, window[None], scale, width), list(scale.values()))
        expected += torch.stack(gradients).abs() / len(windows)
    torch.testing.assert_close(torch.stack(found).float(), expected, rtol=2e-4, atol=1e-7)  # measured 3e-5


def test_importance_is_what_a_small_change_of_the_mask_costs(models, saved):
    window = models.tokens(count=1)
    model = whole(saved("llama")).double()
    units = units_of(Heads(), Checkpoint.open(str(saved("llama"))))
    found = importance(model, units, [{"input_ids": window}], language_model_loss)
    step = 3e-3  # Llama's norms are in fp32, so that a smaller one drowns in their rounding
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj"
        for head in range(4):
            costs = []
            for sign in (1, -1):
                scale = torch.ones(4, dtype=torch.float64)
                scale[head] += sign * step
                costs.append(float(masked_loss(model, window, {name: scale}, 8)))
            assert float(found[layer][head]) == pytest.approx(abs(costs[0] - costs[1]) / (2 * step), rel=1e-3)


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert-classifier", "bart", "t5"])
def test_every_kind_of_model_has_a_loss_and_every_neuron_a_score(name, models, saved):
    checkpoint = Checkpoint.open(str(saved(name)))
    model = whole(saved(name))
    windows = models.tokens(count=3)
    batch = {"input_ids": windows}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = windows
    kind, loss = loss_of("auto", model, checkpoint, seed=0)
    assert kind == ("language-model" if name in ("opt", "gpt2") else "self")
    scores = importance(model, units_of(Neurons(), checkpoint), [batch], loss)
    assert all(bool((score > 0).any() and score.isfinite().all()) for score in scores)


def test_labelled_batches_are_scored_by_any_loss_of_samples(models, saved):
    checkpoint = Checkpoint.open(str(saved("bert-classifier")))
    model = whole(saved("bert-classifier"))
    batch = {"input_ids": models.tokens(count=3), "labels": torch.tensor([0, 1, 1])}

    def labelled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    scores = importance(model, units_of(Heads(), checkpoint), [batch], labelled)
    other = importance(model, units_of(Heads(), checkpoint), [{**batch, "labels": 1 - batch["labels"]}], labelled)
    assert not torch.equal(torch.stack(scores), torch.stack(other))


def test_the_models_own_labels_find_what_its_output_depends_on(models):
    """Of a classifier whose heads are scaled down, those scaled down the most must matter least."""
    model = models.FAMILIES["bert-classifier"].build()
    scale = torch.tensor([1.0, 0.01, 1.0, 0.01])
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight *= scale.repeat_interleave(8)
    from modelzip.checkpoints.blocks import Block, Structure
    from modelzip.checkpoints.units import find_heads

    structure = Structure(tuple(Block(f"bert.encoder.layer.{i}", ()) for i in range(2)), (), (), ())
    scores = importance(
        model, find_heads(model, structure), [{"input_ids": models.tokens(count=16)}], self_loss(torch.Generator())
    )
    for score in scores:
        assert score[[1, 3]].max() < 0.2 * score[[0, 2]].min()


def test_masked_tokens_are_hidden_and_no_others_are_predicted():
    class Told(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            self.seen = input_ids
            logits = torch.zeros(*input_ids.shape, 10)
            return type("Output", (), {"logits": logits})

    model, tokens = Told(), torch.arange(1, 9).repeat(3, 1)
    losses = masked_lm_loss(0, torch.Generator().manual_seed(0), share=0.25)(model, {"input_ids": tokens})
    assert (model.seen == 0).sum(dim=1).tolist() == [2, 2, 2]
    assert torch.equal(model.seen[model.seen != 0], tokens[model.seen != 0])
    assert losses.tolist() == pytest.approx([2.302585] * 3)


def test_a_masked_language_model_needs_a_mask_token(models, saved, tmp_path):
    checkpoint = Checkpoint.open(str(saved("bert-mlm")))
    with pytest.raises(CalibrationError, match="no tokenizer with a mask token"):
        loss_of("masked-lm", whole(saved("bert-mlm")), checkpoint, seed=0)
    assert loss_of("auto", whole(saved("bert-mlm")), checkpoint, seed=0)[0] == "self"


@pytest.fixture(scope="module")
def taught(models, tmp_path_factory):
    """A pico Llama that has learned to continue a cycle of tokens, with windows to measure it on."""
    model = models.FAMILIES["llama"].build(num_key_value_heads=4, num_attention_heads=4)
    generator = torch.Generator().manual_seed(1)
    follower = torch.randperm(models.VOCABULARY, generator=generator)

    def windows(count: int) -> Tensor:
        """Each token follows from the one before the last, so that attention is needed."""
        rows = [torch.randint(models.VOCABULARY, (count, 2), generator=generator)]
        for place in range(14):
            rows.append(follower[rows[0][:, :1]] if place == 0 else follower[rows[-2][:, -1:]])
        return torch.cat(rows, dim=1)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 0.3
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        batch = windows(32)
        logits = model(batch).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("taught")
    model.save_pretrained(folder)
    return folder, windows(32), windows(32)


@pytest.mark.parametrize("settings", [Heads(), Neurons()], ids=["heads", "neurons"])
def test_pruning_by_importance_beats_chance_and_the_reverse(settings, taught):
    folder, calibration, held_back = taught
    checkpoint = Checkpoint.open(str(folder))
    units = units_of(settings, checkpoint)
    scores = importance(whole(folder), units, [{"input_ids": calibration}], language_model_loss)
    generator = torch.Generator().manual_seed(0)
    orders = {"by importance": scores, "reversed": [-score for score in scores]}
    orders |= {f"random {i}": [torch.rand(one.count, generator=generator) for one in units] for i in range(16)}
    losses = {}
    for name, order in orders.items():
        model = whole(folder)
        for one, stay in zip(units, choose(order, share=0.25, scope="uniform"), strict=True):
            gone = sorted(set(range(one.count)) - set(stay.units.tolist()))
            model.get_submodule(one.output).weight.data.view(32, one.count, one.width)[:, gone] = 0
        with torch.no_grad():
            losses[name] = float(language_model_loss(model, {"input_ids": held_back}).mean())
    random = sum(losses[f"random {i}"] for i in range(16)) / 16
    # measured: heads 0.840, 0.909, 0.909; neurons 0.647, 0.677, 0.698
    assert losses["by importance"] < 0.97 * min(random, losses["reversed"])
