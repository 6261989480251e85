"""What a lesson asks of two models, on models that say what a test lets them say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelzip.pipeline.train.lesson import Lesson, Objective

HALF, MOST = [0.0, 0.0], [math.log(3.0), 0.0]  # (1/2, 1/2) and (3/4, 1/4)
IDS = torch.tensor([[0, 1, 0], [0, 0, 1]])


class Saying(nn.Module):
    """Says the same of every input, whatever it is."""

    def __init__(self, logits: Any, **inside: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.inside = inside
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=2))

    def forward(self, **batch: Any) -> Any:
        return SimpleNamespace(logits=self.logits, **self.inside)


def test_a_language_model_learns_from_teacher_and_text_where_a_token_follows():
    student, teacher = Saying([[HALF, HALF, [9.0, 0.0]]] * 2), Saying([[MOST, HALF, [0.0, 9.0]]] * 2)
    lesson = Lesson(student, Objective("next-token", alpha=0.25), teacher=teacher)
    found = lesson(input_ids=IDS, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    soft, hard = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), math.log(2)
    assert found["items"].tolist() == [2, 1]
    assert found["loss"].tolist() == pytest.approx([0.25 * soft + 1.5 * hard, 0.25 * soft + 0.75 * hard], abs=1e-6)
    assert teacher.logits.grad is None


def test_texts_in_which_nothing_counts_cost_nothing():
    student = Saying([[HALF, HALF, HALF]] * 2)
    found = Lesson(student, Objective("masked-token"))(input_ids=IDS, labels=torch.full((2, 3), -100))
    found["loss"].sum().backward()
    assert (found["loss"].tolist(), found["items"].tolist()) == ([0, 0], [0, 0])
    assert not student.logits.grad.any()


def test_a_number_is_compared_with_label_and_teacher_by_squared_error():
    student, teacher = Saying([[1.0], [0.0]]), Saying([[3.0], [1.0]])
    lesson = Lesson(student, Objective("number", alpha=0.5), teacher=teacher)
    found = lesson(input_ids=IDS, labels=torch.tensor([0.0, 5.0]))
    assert found["loss"].tolist() == [0.5 * 4 + 0.5 * 1, 0.5 * 1 + 0.5 * 25]
    assert "correct" not in found


def states(*firsts: list[float]) -> tuple[Tensor, ...]:
    """Hidden states [2, 3, 2] after embeddings and each layer; of the first token these."""
    return tuple(torch.tensor([[first, [0.0, 0.0], [0.0, 0.0]]] * 2) for first in firsts)


def test_patient_layers_are_all_mapped_ones_but_the_last_and_count_by_their_mean():
    right, up, left = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    student = Saying([[0.0, 0.0]] * 2, hidden_states=states(up, right, right, right))
    teacher = Saying([[0.0, 0.0]] * 2, hidden_states=states(up, right, up, right, left, up, left))
    objective = Objective("class", alpha=1.0, signals={"patient": 0.5}, layers=(2, 4, 6))
    found = Lesson(student, objective, teacher=teacher)(input_ids=IDS)
    assert found["loss"].tolist() == pytest.approx([0.5 * (2 + 4) / 2] * 2)  # squared chords of 90 and 180 degrees
