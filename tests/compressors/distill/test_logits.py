"""Losses on logits, one for each item, against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from modelzip.compressors.distill.cache import TopLogits, cached_divergence, top_logits
from modelzip.compressors.distill.logits import (
    hard_labels,
    logit_error,
    mixed,
    next_labels,
    self_distillation,
    soft_logits,
)

STUDENT, TEACHER = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])  # (1/2, 1/2) and (3/4, 1/4)
FORWARD = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
REVERSE = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_forward_divergence_covers_the_teacher_and_reverse_seeks_it():
    assert float(soft_logits(STUDENT, TEACHER)) == pytest.approx(FORWARD, abs=1e-7)
    assert float(soft_logits(STUDENT, TEACHER, direction="reverse")) == pytest.approx(REVERSE, abs=1e-7)
    assert abs(FORWARD - REVERSE) > 0.01


def test_the_temperature_softens_both_and_its_square_multiplies():
    wanted = 4 * FORWARD  # logits twice as large at T = 2 are the same distributions
    assert float(soft_logits(2 * STUDENT, 2 * TEACHER, temperature=2.0)) == pytest.approx(wanted, abs=1e-6)


def test_the_squared_temperature_keeps_the_gradients_size():
    sizes = []
    for temperature in (10.0, 40.0):
        student = _random(5, 7).requires_grad_()
        soft_logits(student, _random(5, 7, seed=1), temperature=temperature).sum().backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] / sizes[1] == pytest.approx(1, abs=0.02)  # measured: 1.008; without T² it is 16


def test_the_gradient_is_the_difference_of_probabilities():
    student, teacher = _random(4, 6).requires_grad_(), _random(4, 6, seed=1)
    soft_logits(student, teacher, temperature=3.0).sum().backward()
    wanted = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))  # Hinton et al. 2015, eq. 2, times T²
    assert torch.allclose(student.grad, wanted.detach(), atol=1e-6)


def test_each_item_has_its_own_loss_whatever_stands_beside():
    student, teacher = torch.stack([STUDENT, TEACHER]), torch.stack([TEACHER, TEACHER])  # [2, 1, 2]
    wanted = torch.tensor([[FORWARD], [0.0]])
    assert torch.allclose(soft_logits(student, teacher), wanted, atol=1e-7)
    assert torch.allclose(logit_error(student, teacher), torch.tensor([[math.log(3.0) ** 2], [0.0]]))


def test_a_causal_models_labels_move_to_where_they_are_predicted():
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    assert next_labels(labels).tolist() == [[6, 7, -100], [-100, 9, -100]]


def test_hard_labels_are_the_cross_entropy_of_each_label_that_counts():
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0], [9.0, -9.0]]]).requires_grad_()
    losses = hard_labels(logits, torch.tensor([[0, 1, -100]]))
    assert losses.tolist() == [pytest.approx([-math.log(0.75), -math.log(0.5), 0.0], abs=1e-6)]
    losses.sum().backward()
    assert logits.grad.abs().sum(-1).gt(0).tolist() == [[True, True, False]]
    assert float(mixed(torch.tensor(1.0), torch.tensor(3.0), 0.25)) == 2.5


def test_the_error_of_logits_is_their_squared_distance():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 1.0]])
    assert logit_error(student, teacher).tolist() == [5.0, 1.0]


def test_every_exit_is_drawn_to_the_last_classifier_which_stays():
    exits = [torch.cat([STUDENT, TEACHER]).requires_grad_(), torch.cat([TEACHER, TEACHER]).requires_grad_()]
    last = torch.cat([TEACHER, TEACHER]).requires_grad_()
    losses = self_distillation(exits, last)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([REVERSE, 0.0], abs=1e-7)  # the other exits agree already
    assert self_distillation(exits, last, direction="forward").tolist() == pytest.approx([FORWARD, 0.0], abs=1e-7)
    assert last.grad is None
    assert exits[0].grad.any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_logits_cached_give_the_full_loss(temperature, direction):
    student, teacher = _random(2, 3, 50), 3 * _random(2, 3, 50, seed=1)
    cached = top_logits(teacher, k=50, temperature=temperature)
    full = soft_logits(student, teacher, temperature=temperature, direction=direction).mean()
    found = cached_divergence(student, cached, direction=direction).mean()
    assert float(found) == pytest.approx(float(full), rel=2e-4)  # measured: 5.8e-5, of fp16's rounding


def test_the_cached_loss_is_the_divergence_with_all_other_tokens_as_one():
    student, teacher = torch.zeros(1, 4), torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert float(cached_divergence(student, top_logits(teacher, k=2))) == pytest.approx(wanted, abs=1e-4)


def test_the_cached_loss_grows_to_the_full_one_with_k():
    student, teacher = _random(8, 100), 3 * _random(8, 100, seed=1)
    losses = [float(cached_divergence(student, top_logits(teacher, k=k)).mean()) for k in (1, 4, 16, 64, 99)]
    assert losses == sorted(losses)
    assert losses[-1] < float(soft_logits(student, teacher).mean()) * 1.001


def test_mass_on_tokens_that_are_not_listed_is_punished():
    """Which a renormalised top k wouldn't see: the student agrees with the teacher among the listed tokens."""
    teacher = torch.tensor([[5.0, 4.0, 0.0, 0.0]])
    student = torch.tensor([[5.0, 4.0, 9.0, 0.0]]).requires_grad_()
    loss = cached_divergence(student, top_logits(teacher, k=2))
    loss.backward()
    assert loss.item() > 3  # measured: 3.62
    assert student.grad[0, 2] > 0.9


def test_each_position_has_its_own_loss_from_the_cache():
    student, teacher = _random(2, 3, 20), _random(2, 3, 20, seed=1)
    found = cached_divergence(student, top_logits(teacher, k=4))
    assert found.shape == (2, 3)
    assert torch.allclose(found[1, 2], cached_divergence(student[1, 2], top_logits(teacher[1, 2], k=4)))


def test_the_cache_survives_the_disk_bit_for_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    cached = top_logits(_random(3, 7, 40), k=5, temperature=2.0)
    save_file(cached.tensors(), tmp_path / "cache.safetensors")
    again = TopLogits.from_tensors(load_file(tmp_path / "cache.safetensors"))
    assert again.temperature == 2.0
    assert (again.indices.dtype, again.values.dtype) == (torch.int32, torch.float16)
    assert all(torch.equal(getattr(again, name), getattr(cached, name)) for name in ("indices", "values", "rest"))
    assert cached.nbytes == 21 * (6 * 5 + 2)
    assert torch.equal(again[1].indices, cached.indices[1])
