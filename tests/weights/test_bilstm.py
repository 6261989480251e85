"""The BiLSTM student: nothing but its real tokens counts, and transformers opens what it saved."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import modelzip.weights  # noqa: F401  teaches transformers the model type
from modelzip.weights.bilstm import BiLstmConfig, BiLstmForSequenceClassification, embedding_start

CONFIG = {"vocab_size": 96, "embedding_size": 12, "hidden_size": 10, "inner_size": 14, "num_labels": 3}


@pytest.fixture
def student() -> BiLstmForSequenceClassification:
    torch.manual_seed(0)
    return BiLstmForSequenceClassification(BiLstmConfig(**CONFIG)).eval()


def test_the_logits_are_those_of_the_formula_worked_out_token_by_token(student, models):
    """Two LSTM cells in a loop, one from each end, with the gates in torch's order."""
    tokens = models.tokens(count=1, length=5)[0]
    parts = dict(student.named_parameters())

    def last_state(order, suffix):
        state, cell = torch.zeros(10), torch.zeros(10)
        for token in order:
            gates = (
                parts[f"lstm.weight_ih_l0{suffix}"] @ student.embedding.weight[token]
                + parts[f"lstm.bias_ih_l0{suffix}"]
                + parts[f"lstm.weight_hh_l0{suffix}"] @ state
                + parts[f"lstm.bias_hh_l0{suffix}"]
            )
            enter, forget, new, leave = gates.split(10)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = leave.sigmoid() * cell.tanh()
        return state

    states = torch.cat([last_state(tokens, ""), last_state(tokens.flip(0), "_reverse")])
    inner = (parts["inner.weight"] @ states + parts["inner.bias"]).clamp(min=0)
    wanted = parts["classifier.weight"] @ inner + parts["classifier.bias"]
    assert torch.allclose(student(tokens[None]).logits[0], wanted, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_on_either_side(student, models, side):
    tokens = models.tokens(count=3, length=9)
    alone = torch.cat([student(row[None, :length]).logits for row, length in zip(tokens, (9, 4, 1), strict=True)])
    padded, mask = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate((9, 4, 1)):
        place = slice(0, length) if side == "right" else slice(12 - length, 12)
        padded[row, place], mask[row, place] = tokens[row, :length], 1
    assert torch.allclose(student(padded, mask).logits, alone, atol=1e-6)
    assert not torch.allclose(student(padded).logits, alone, atol=1e-3)


def test_a_text_of_padding_alone_gives_finite_logits(student):
    assert torch.isfinite(student(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4)).logits).all()


def test_the_order_of_the_tokens_counts(student, models):
    tokens = models.tokens(count=1)
    assert not torch.allclose(student(tokens).logits, student(tokens.flip(1)).logits, atol=1e-4)


def test_it_is_opened_by_the_auto_classes_with_the_same_logits(student, models, tmp_path):
    student.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is BiLstmForSequenceClassification
    assert AutoConfig.from_pretrained(tmp_path).inner_size == 14
    assert again.config.num_labels == 3
    tokens = models.tokens()
    assert torch.equal(again(tokens).logits, student(tokens).logits)


def test_it_learns_which_of_two_tokens_came_first(models):
    """Which a bag of words can't."""
    torch.manual_seed(0)
    student = BiLstmForSequenceClassification(BiLstmConfig(**{**CONFIG, "num_labels": 2, "dropout": 0.0}))
    tokens = models.tokens(count=64, length=8) % 40 + 10
    labels = torch.arange(64) % 2
    tokens[:, 2], tokens[:, 5] = 5 + labels, 6 - labels
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        student(tokens, labels=labels).loss.backward()
        optimizer.step()
    assert float((student(tokens).logits.argmax(1) == labels).float().mean()) > 0.95  # measured: 1


def test_the_start_from_a_teacher_is_the_best_of_its_size():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(40, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 5
    start = embedding_start(teacher, 6)
    centred = teacher - teacher.mean(0)
    best = torch.linalg.svdvals(centred)[6:].square().sum()
    found = torch.linalg.lstsq(start, centred).solution
    assert float((start @ found - centred).square().sum() / best) == pytest.approx(1, abs=1e-4)  # Eckart & Young
    whole, teacher = embedding_start(teacher, 16).double(), teacher.double()
    assert torch.allclose(torch.cdist(whole, whole), torch.cdist(teacher, teacher), atol=1e-4)
    with pytest.raises(ValueError, match="make it smaller"):
        embedding_start(teacher, 17)
