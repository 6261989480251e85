"""Early exits: at full speed the first exit, at speed 0 the model that came in, between them each sample for itself."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import modelzip.weights  # noqa: F401  teaches transformers the model type
from modelzip.weights.departures import exits_taken, leaves, uncertainty
from modelzip.weights.exits import ExitsForSequenceClassification

FAMILIES = ["bert-classifier", "distilbert"]
LAYERS = 4


def _build(models, name: str) -> ExitsForSequenceClassification:
    key = "n_layers" if name == "distilbert" else "num_hidden_layers"
    family = models.FAMILIES[name]
    config = getattr(transformers, family.config_class)(**{**family.config, key: LAYERS, "num_labels": 3})
    torch.manual_seed(0)
    base = getattr(transformers, family.model_class)(config)
    with torch.no_grad():  # far from a constant, which transformers' small start is close to
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model = ExitsForSequenceClassification.from_classifier(base, exit_size=16)
    with torch.no_grad():  # exits that differ from sample to sample
        for parameter in model.exits.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def model(request, models) -> ExitsForSequenceClassification:
    return _build(models, request.param)


@pytest.fixture
def batch(models) -> dict[str, torch.Tensor]:
    """Eight texts of different lengths, padded on the right."""
    mask = (torch.arange(12) < torch.tensor([12, 3, 7, 12, 5, 9, 2, 11])[:, None]).long()
    return {"input_ids": models.tokens(count=8) * mask, "attention_mask": mask}


def _middle(model, batch) -> float:
    """The speed at which samples leave after the most different layers, between two uncertainties."""
    every = model.every_exit(**batch)
    unsure = torch.stack([uncertainty(logits) for logits in every[:-1]]).flatten().sort().values
    speeds = (unsure[1:] + unsure[:-1]) / 2
    return max(speeds.tolist(), key=lambda speed: len(exits_taken(every, speed)[1].unique()))


def test_uncertainty_is_the_entropys_share_of_the_largest():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    wanted = 1.5 * math.log(2) / math.log(3)
    assert uncertainty((probabilities + 1e-30).log()).tolist() == pytest.approx([wanted, 1, 0], abs=1e-6)
    assert leaves(torch.zeros(1, 3), 1.0).all()
    assert not leaves(torch.tensor([[90.0, 0.0]]), 0.0).any()


def test_without_speed_the_logits_are_those_of_the_model_that_came_in(model, batch):
    found = model(**batch, speed=0.0)
    assert torch.equal(found.logits, model.base(**batch).logits)
    assert found.layers.tolist() == [LAYERS] * 8


def test_at_full_speed_everybody_takes_the_first_exit_and_no_other_layer_runs(model, batch):
    ran = []
    for layer in next(part for part in model.base.modules() if isinstance(part, torch.nn.ModuleList)):
        layer.register_forward_hook(lambda module, *_: ran.append(module))
    found = model(**batch, speed=1.0)
    assert found.layers.tolist() == [1] * 8
    assert len(ran) == 1
    assert torch.allclose(found.logits, model.every_exit(**batch)[0], atol=1e-6)


def test_between_them_samples_leave_one_by_one_as_if_each_were_alone(model, batch):
    speed = _middle(model, batch)
    together = model(**batch, speed=speed)
    assert len(set(together.layers.tolist())) >= 3
    for row in range(8):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()}, speed=speed)
        assert int(alone.layers) == int(together.layers[row])
        assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-5)


def test_the_layers_that_are_not_needed_see_fewer_samples(model, batch):
    speed, sizes = _middle(model, batch), []
    for layer in next(part for part in model.base.modules() if isinstance(part, torch.nn.ModuleList)):
        layer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    layers = model(**batch, speed=speed).layers
    assert sizes == [int((layers > number).sum()) for number in range(len(sizes))]
    assert sizes[-1] < 8


def test_one_pass_through_all_exits_tells_what_every_speed_would_give(model, batch):
    every = model.every_exit(**batch)
    for speed in (0.0, _middle(model, batch), 0.9, 1.0):
        logits, layers = exits_taken(every, speed)
        found = model(**batch, speed=speed)
        assert torch.equal(found.layers, layers)
        assert torch.allclose(found.logits, logits, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_way_attention_is_computed_makes_no_difference(models, batch, attention):
    model = _build(models, "bert-classifier")
    wanted = model(**batch, speed=_middle(model, batch))
    model.base.set_attn_implementation(attention)
    found = model(**batch, speed=_middle(model, batch))
    assert torch.equal(found.layers, wanted.layers)
    assert torch.allclose(found.logits, wanted.logits, atol=1e-5)


def test_training_trains_the_exits_alone_against_a_teacher_without_dropout(model, batch):
    model.train()
    first, second = model(**batch), model(**batch)
    assert torch.equal(first.logits, second.logits)
    assert len(first.exit_logits) == LAYERS - 1
    sum(logits.square().sum() for logits in first.exit_logits).backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    assert all(parameter.grad is not None for parameter in model.exits.parameters())
    assert {name.split(".")[0] for name, part in model.named_parameters() if part.requires_grad} == {"exits"}


def test_training_shows_the_exits_what_they_are_asked_later(model, batch):
    every = model.every_exit(**batch)
    found = model.train()(**batch)
    assert all(torch.equal(*pair) for pair in zip(found.exit_logits, every[:-1], strict=True))


def test_it_is_opened_by_the_auto_classes_and_exits_the_same(model, batch, tmp_path):
    speed = _middle(model, batch)
    model.config.speed = speed
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is ExitsForSequenceClassification
    assert not again.training
    assert (again.config.num_labels, again.config.vocab_size) == (3, 96)
    found, wanted = again(**batch), model(**batch, speed=speed)
    assert torch.equal(found.layers, wanted.layers)
    assert torch.equal(found.logits, wanted.logits)
    assert len(set(found.layers.tolist())) > 1


def test_the_loss_of_evaluation_is_that_of_the_logits_given(model, batch):
    labels = torch.arange(8) % 3
    found = model(**batch, labels=labels, speed=1.0)
    assert torch.allclose(found.loss, torch.nn.functional.cross_entropy(found.logits, labels))


def test_a_model_that_cannot_have_exits_is_refused(models):
    with pytest.raises(ValueError, match="single output"):
        ExitsForSequenceClassification.from_classifier(models.FAMILIES["bert-classifier"].build(num_labels=1))
    with pytest.raises(ValueError, match="single layer"):
        ExitsForSequenceClassification.from_classifier(models.FAMILIES["bert-classifier"].build(num_hidden_layers=1))
