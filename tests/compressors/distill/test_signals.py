"""Losses on hidden states and attention against sums written out by hand; layer maps against the papers' lists."""

from __future__ import annotations

import math

import pytest
import torch

from modelzip.compressors.distill.hidden import (
    Projection,
    attention_divergence,
    attention_error,
    cosine,
    hidden_states,
    patient,
)
from modelzip.compressors.distill.signals import SIGNALS, layer_map

KEPT = torch.tensor([[True, False]])


def test_hidden_states_are_compared_by_their_mean_squared_difference_without_padding():
    student, teacher = torch.tensor([[[1.0, 2.0], [50.0, 0.0]]]), torch.tensor([[[0.0, 4.0], [0.0, 0.0]]])
    assert float(hidden_states(student, teacher, KEPT)) == 2.5  # (1 + 4) / 2
    assert float(hidden_states(student, teacher)) == 626.25


def test_a_projection_learns_to_recover_a_wider_teacher():
    generator = torch.Generator().manual_seed(0)
    student, truth = torch.randn(64, 1, 4, generator=generator), torch.randn(4, 6, generator=generator)
    projection = Projection(4, 6, generator=generator)
    assert torch.allclose(projection.weight @ projection.weight.T, torch.eye(4), atol=1e-5)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        hidden_states(projection(student), student @ truth).backward()
        optimizer.step()
    assert float((projection.weight - truth).norm() / truth.norm()) < 1e-3  # measured: 2.3e-5


def test_patient_layers_compare_the_first_tokens_direction_only():
    student = torch.tensor([[[3.0, 4.0], [9.0, 9.0]], [[0.0, 2.0], [7.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 0.0]]])
    wanted = ((0.6 - 1) ** 2 + 0.8**2) / 2  # the second example has the same direction
    assert float(patient(student, teacher)) == pytest.approx(wanted, abs=1e-6)
    assert float(patient(10 * student, teacher)) == pytest.approx(wanted, abs=1e-6)


def test_cosine_is_zero_for_the_same_direction_one_for_a_right_angle_and_two_for_the_opposite():
    student = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]]])
    teacher = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [-5.0, 0.0]]])
    assert float(cosine(student, teacher)) == pytest.approx(1.0)
    assert float(cosine(student, teacher, torch.tensor([[True, True, False]]))) == pytest.approx(0.5)


def test_attention_is_compared_among_kept_tokens():
    student = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]]])
    teacher = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [1.0, 0.0]]]])
    assert float(attention_error(student, teacher)) == pytest.approx((0.25 + 0.25 + 1 + 1) / 8)
    assert float(attention_error(student, teacher, KEPT)) == pytest.approx(0.25 / 2)
    assert float(attention_divergence(student[:, :1], teacher[:, :1])) == pytest.approx(math.log(2) / 2)
    assert float(attention_divergence(student[:, :1], teacher[:, :1], KEPT)) == pytest.approx(math.log(2))


def test_attention_divergence_has_finite_gradients_where_the_student_looks_nowhere():
    scores = torch.tensor([[[[0.0, -1e30], [0.0, 0.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]])
    attention_divergence(scores.softmax(-1), teacher).backward()
    assert torch.isfinite(scores.grad).all()


def test_every_signal_is_zero_between_a_model_and_itself_and_positive_otherwise():
    generator = torch.Generator().manual_seed(0)
    for name, signal in SIGNALS.items():
        shape = (2, 4, 5, 5) if signal.reads == "attention" else (2, 5, 8)
        first, second = (torch.randn(shape, generator=generator).softmax(-1) for _ in range(2))
        kept = torch.ones(2, 5, dtype=torch.bool)
        assert float(signal.loss(first, first, kept)) == pytest.approx(0, abs=1e-6), name
        assert float(signal.loss(first, second, kept)) > 1e-4, name
        assert signal.citation


def test_layer_maps_are_those_of_the_papers():
    assert layer_map(4, 12) == (3, 6, 9, 12)  # TinyBERT
    assert layer_map(6, 12) == (2, 4, 6, 8, 10, 12)
    assert layer_map(3, 12, "last") == (10, 11, 12)  # PKD-Last
    assert layer_map(5, 12, (2, 4, 6, 8, 10)) == (2, 4, 6, 8, 10)  # PKD-Skip
    assert layer_map(4, 6) == (2, 3, 5, 6)
    assert layer_map(6, 6) == layer_map(6, 6, "last") == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("given", [(1, 2), (0, 1, 2), (1, 2, 7), (3, 2, 4)])
def test_a_map_that_does_not_fit_is_refused(given):
    with pytest.raises(ValueError, match="layer map"):
        layer_map(3, 6, given)


def test_a_student_deeper_than_its_teacher_needs_a_map_of_its_own():
    with pytest.raises(ValueError, match="can't be mapped"):
        layer_map(6, 3)
    assert layer_map(4, 2, (1, 1, 2, 2)) == (1, 1, 2, 2)
