"""The order of examples, what is hidden from a masked language model, and when a run measures, saves and stops."""

from __future__ import annotations

import random

import torch

from modelzip.pipeline.train.material import Masking, Padding, masked, padded
from modelzip.pipeline.train.order import POOL, epoch_order, seeded
from modelzip.pipeline.train.rhythm import best_row, measured_since

_DRAW = random.Random(0)
LENGTHS = [_DRAW.randint(3, 60) for _ in range(1003)]


def test_every_example_comes_once_an_epoch_and_in_another_order_in_the_next():
    orders = [epoch_order(LENGTHS, batch_size=8, seed=0, epoch=epoch) for epoch in range(2)]
    assert all(sorted(order.tolist()) == list(range(len(LENGTHS))) for order in orders)
    assert not torch.equal(*orders)
    assert torch.equal(orders[1], epoch_order(LENGTHS, batch_size=8, seed=0, epoch=1))
    assert not torch.equal(orders[1], epoch_order(LENGTHS, batch_size=8, seed=1, epoch=1))


def test_batches_of_like_lengths_hold_less_padding_than_shuffled_ones():
    order = epoch_order(LENGTHS, batch_size=8, seed=0, epoch=0)

    def padding(places: torch.Tensor) -> int:
        lengths = torch.tensor(LENGTHS)[places]
        return sum(int((part.max() - part).sum()) for part in lengths.split(8))

    shuffled = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0))
    assert padding(order) < 0.1 * padding(shuffled)  # measured: 0.025
    assert len(LENGTHS) > 2 * POOL * 8


def test_only_the_last_batch_is_short_so_that_no_batch_mixes_lengths():
    order = epoch_order(LENGTHS, batch_size=8, seed=0, epoch=0)
    spans = [int(part.max() - part.min()) for part in torch.tensor(LENGTHS)[order].split(8)[:-1]]
    assert sorted(spans)[len(spans) // 2] <= 2  # measured: 1


def test_rows_are_filled_on_the_tokenizers_side():
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [7], "attention_mask": [1]}]
    right, left = (padded(rows, Padding(9, 0, side)) for side in ("right", "left"))
    assert right["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert right["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert left["input_ids"].tolist() == [[5, 6], [9, 7]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_fifteen_percent_are_hidden_eight_of_ten_of_them_by_the_mask_and_no_special_token_is():
    tokens = torch.randint(4, 100, (200, 64), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    masking = Masking(token=3, special=frozenset({0, 1, 2}), vocabulary=100, seed=0)
    shown, labels = masked(tokens, masking, [seeded(0, row) for row in range(200)])
    guessed = labels != -100
    assert not guessed[:, 0].any()
    assert 0.14 < float(guessed[:, 1:].double().mean()) < 0.16
    assert torch.equal(labels[guessed], tokens[guessed])
    assert torch.equal(shown[~guessed], tokens[~guessed])
    assert 0.77 < float((shown[guessed] == 3).double().mean()) < 0.83
    assert 0.08 < float((shown[guessed] == tokens[guessed]).double().mean()) < 0.13


CURVE = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "eval_loss": 2.0, "accuracy": 0.5},
    {"step": 4, "eval_loss": 1.0, "accuracy": 0.5},
    {"step": 6, "eval_loss": 1.5, "accuracy": 0.7},
]


def test_the_best_row_is_the_first_with_the_least_loss_or_greatest_accuracy():
    assert best_row(CURVE, "loss") == CURVE[2]
    assert best_row(CURVE, "accuracy") == CURVE[3]
    assert best_row(CURVE[:3], "accuracy") == CURVE[1]
    assert best_row(CURVE[:1], "loss") is None


def test_patience_counts_the_measurements_after_the_best():
    assert measured_since(CURVE, CURVE[2]) == 1
    assert measured_since(CURVE, CURVE[1]) == 2
